"""TFDS builders of the bundled data sets: writing them needs TensorFlow.

Handwritten digits (scikit-learn's), digits in fonts the anchor never saw, made
like the real ones, and the 36 characters in 16 fonts that the demo's anchor is
pretrained on. `modelstock_jax.data.sources` reads what `prepare.py` writes.
"""

from collections.abc import Iterator
import itertools
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
  by_class = [
    rng.permutation(np.flatnonzero(labels == label)).tolist()
    for label in np.unique(labels)
  ]
  held_out = _TRAIN_PER_CLASS + _VALIDATION_PER_CLASS
  rounds = list(itertools.zip_longest(*by_class))
  parts = {
    'train': rounds[:_TRAIN_PER_CLASS],
    'validation': rounds[_TRAIN_PER_CLASS:held_out],
    'test': rounds[held_out:],
  }
  return {
    split: [row for turn in turns for row in turn if row is not None]
    for split, turns in parts.items()
  }


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


class _Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
  """A data set of labelled grey images, whose order is part of the data."""

  def __init__(
    self,
    name: str,
    labels: str,
    side: int,
    feature: dict[str, Any],
    splits: dict[str, Iterator[dict[str, Any]]],
    **about: Any,
  ):
    """Describe a data set.

    Args:
      name: of the data set.
      labels: a character for each class.
      side: of an image, pixels.
      feature: what a record has beside 'image' and 'label'.
      splits: records of each split.
      **about: arguments of `AdhocBuilder`.
    """
    image = tfds.features.Image(shape=(side, side, 1), encoding_format='png')
    label = tfds.features.ClassLabel(names=list(labels))
    features = {'image': image, 'label': label, **feature}
    super().__init__(
      name=name,
      version='1.0.0',
      features=tfds.features.FeaturesDict(features),
      split_datasets={
        split: enumerate(records) for split, records in splits.items()
      },
      file_format='array_record',
      disable_shuffling=True,
      **about,
    )


def digits(data_dir: str) -> tfds.core.DatasetBuilder:
  """Return the builder of 8x8 grey digits, handwritten by 43 people."""
  loaded: Any = datasets.load_digits()

  def records(rows):
    for row in rows:
      pixels = np.round(loaded.images[row] * (255 / 16)).astype(np.uint8)
      label = int(loaded.target[row])
      yield {'image': pixels[..., None], 'label': label, 'index': row}

  return _Builder(
    'digits',
    _DIGITS,
    8,
    {'index': tfds.features.Scalar(np.int32)},
    {split: records(rows) for split, rows in assign(loaded.target).items()},
    data_dir=data_dir,
    description=(
      'Handwritten digits of 43 people, 8x8 pixels, as they ship with '
      'scikit-learn: the test part of a larger collection. A pixel counts '
      'the inked ones among 4x4 pixels of a 32x32 bitmap (0..16), stored '
      'here as round(count * 255 / 16).'
    ),
    homepage='https://archive.ics.uci.edu/dataset/80',
    citation=(
      'E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten '
      'Digits. UCI Machine Learning Repository, 1998. CC BY 4.0.'
    ),
  )


def font_digits(data_dir: str) -> tfds.core.DatasetBuilder:
  """Return the builder of digits of six held-out fonts, ten copies of each."""

  def records():
    for number, font in enumerate(fonts.HELD_OUT_FONTS):
      for copy in range(_COPIES):
        for label, digit in enumerate(_DIGITS):
          rng = np.random.default_rng((number, copy, label))
          image = jitter(fonts.draw(font, digit), rng)
          yield {'image': image[..., None], 'label': label, 'font': font}

  return _Builder(
    'font_digits',
    _DIGITS,
    8,
    {'font': tfds.features.Text()},
    {'test': records()},
    data_dir=data_dir,
    description=(
      'Digits in the six Computer Modern fonts that ship with matplotlib, '
      'ten copies each, turned, scaled, slanted and moved a little at 32x32 '
      'and averaged down to 8x8.'
    ),
  )


def glyphs(data_dir: str) -> tfds.core.DatasetBuilder:
  """Return the builder of 32x32 characters 0-9 and A-Z, one of each font."""

  def records():
    for font in fonts.TRAIN_FONTS:
      for label, character in enumerate(fonts.CHARACTERS):
        image = fonts.draw(font, character)
        yield {'image': image[..., None], 'label': label, 'font': font}

  return _Builder(
    'glyphs',
    fonts.CHARACTERS,
    fonts.SIZE,
    {'font': tfds.features.Text()},
    {'train': records()},
    data_dir=data_dir,
    description=(
      'The digits and capital letters drawn white on black, 30 pixels '
      'high, in the DejaVu and STIX fonts that ship with matplotlib.'
    ),
  )


BUILDERS = {'digits': digits, 'font_digits': font_digits, 'glyphs': glyphs}
