"""TFDS builders of the bundled data sets: writing them needs TensorFlow.

Handwritten digits (scikit-learn's), digits in fonts the anchor never saw, made
like the real ones, and the 36 characters in 16 fonts that the demo's anchor is
pretrained on. `modelstock_jax.data.sources` reads what `prepare.py` writes.
"""

from typing import Any

import numpy as np
from PIL import Image
from sklearn import datasets
import tensorflow_datasets as tfds

from experiments.digits import fonts

_TRAIN_PER_CLASS = 80
_VALIDATION_PER_CLASS = 40
_SEED = 0

_DIGITS = '0123456789'
_COPIES = 10


def assign(labels: np.ndarray) -> dict[str, list[int]]:
  """Assign every row to one split, by class and by a fixed permutation.

  Rows of a split stand in rounds of one row per class, so every prefix of
  10 n training rows holds n of each class: `train[:200]` is a balanced set.

  Args:
    labels: `int[n]`, the class of each row.

  Returns:
    Rows of `train` (80 per class), `validation` (40 per class) and `test`
    (all others).
  """
  rng = np.random.default_rng(_SEED)
  splits = {'train': [], 'validation': [], 'test': []}
  for label in np.unique(labels):
    rows = rng.permutation(np.flatnonzero(labels == label)).tolist()
    held_out = _TRAIN_PER_CLASS + _VALIDATION_PER_CLASS
    splits['train'].append(rows[:_TRAIN_PER_CLASS])
    splits['validation'].append(rows[_TRAIN_PER_CLASS:held_out])
    splits['test'].append(rows[held_out:])
  return {name: _in_rounds(rows) for name, rows in splits.items()}


def _in_rounds(by_class: list[list[int]]) -> list[int]:
  longest = max(len(rows) for rows in by_class)
  return [
    rows[turn]
    for turn in range(longest)
    for rows in by_class
    if turn < len(rows)
  ]


def jitter(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Turn, scale, slant and move a glyph a little, then shrink it to 8x8.

  Args:
    glyph: `uint8[32, 32]`.
    rng: the source of the angle (within 6 degrees), the scales (within 10 %),
      the slant (within 0.1) and the move (within 1.5 pixels of 32).

  Returns:
    `uint8[8, 8]`: the ink of 4x4 blocks in 17 levels, the fullest block at
    255: every real digit has a full block too, these fonts are thin.
  """
  angle = np.deg2rad(rng.uniform(-6, 6))
  scale = np.diag(rng.uniform(0.9, 1.1, size=2))
  slant = np.array([[1, rng.uniform(-0.1, 0.1)], [0, 1]])
  turn = np.array(
    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  )
  matrix = turn @ slant @ scale  # from places in the result to the glyph's
  centre = np.full(2, fonts.SIZE / 2)
  offset = centre + rng.uniform(-1.5, 1.5, size=2) - matrix @ centre
  moved = Image.fromarray(glyph).transform(
    (fonts.SIZE, fonts.SIZE),
    Image.Transform.AFFINE,
    (*matrix[0], offset[0], *matrix[1], offset[1]),
    Image.Resampling.BILINEAR,
  )
  blocks = np.asarray(moved, np.float64).reshape(8, 4, 8, 4)
  ink = blocks.sum(axis=(1, 3))
  counts = np.round(16 * ink / ink.max())
  return np.round(counts * (255 / 16)).astype(np.uint8)


class Digits(tfds.core.GeneratorBasedBuilder):
  """8x8 grey digits: ink counts 0..16 of 4x4 blocks, scaled to 0..255."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        'Handwritten digits of 43 people, 8x8 pixels, as they ship with '
        'scikit-learn: the test part of a larger collection. A pixel counts '
        'the inked ones among 4x4 pixels of a 32x32 bitmap (0..16), stored '
        'here as round(count * 255 / 16).'
      ),
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=list(_DIGITS)),
          'index': tfds.features.Scalar(np.int32),
        }
      ),
      homepage='https://archive.ics.uci.edu/dataset/80',
      citation=(
        'E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten '
        'Digits. UCI Machine Learning Repository, 1998. CC BY 4.0.'
      ),
      # The order of the records is part of the data: see `assign`.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    digits: Any = datasets.load_digits()
    return {
      name: self._generate_examples(digits.images, digits.target, rows)
      for name, rows in assign(digits.target).items()
    }

  def _generate_examples(self, images, labels, rows):
    for position, row in enumerate(rows):
      pixels = np.round(images[row] * (255 / 16)).astype(np.uint8)
      yield (
        position,
        {
          'image': pixels[..., None],
          'label': int(labels[row]),
          'index': row,
        },
      )


class FontDigits(tfds.core.GeneratorBasedBuilder):
  """8x8 grey digits of six held-out fonts, ten jittered copies of each."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        'Digits in the six Computer Modern fonts that ship with matplotlib, '
        'ten copies each, turned, scaled, slanted and moved a little at 32x32 '
        'and averaged down to 8x8.'
      ),
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=list(_DIGITS)),
          'font': tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {'test': self._generate_examples()}

  def _generate_examples(self):
    key = 0
    for number, font in enumerate(fonts.HELD_OUT_FONTS):
      for copy in range(_COPIES):
        for label, digit in enumerate(_DIGITS):
          rng = np.random.default_rng((number, copy, label))
          image = jitter(fonts.draw(font, digit), rng)
          yield (
            key,
            {'image': image[..., None], 'label': label, 'font': font},
          )
          key += 1


class Glyphs(tfds.core.GeneratorBasedBuilder):
  """32x32 grey characters 0-9 and A-Z, one of each per font."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        'The digits and capital letters drawn white on black, 30 pixels '
        'high, in the DejaVu and STIX fonts that ship with matplotlib.'
      ),
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(fonts.SIZE, fonts.SIZE, 1), encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(names=list(fonts.CHARACTERS)),
          'font': tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for turn, font in enumerate(fonts.TRAIN_FONTS):
      for label, character in enumerate(fonts.CHARACTERS):
        yield (
          turn * len(fonts.CHARACTERS) + label,
          {
            'image': fonts.draw(font, character)[..., None],
            'label': label,
            'font': font,
          },
        )
