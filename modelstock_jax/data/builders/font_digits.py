"""Digits in fonts the anchor never saw, made like the real ones, as TFDS."""

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from modelstock_jax.data.builders import fonts

_DIGITS = '0123456789'
_COPIES = 10


def jitter(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Turns, scales, slants and moves a glyph a little, then shrinks it to 8x8.

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
