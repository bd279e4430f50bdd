import numpy as np

from modelstock_jax.data.builders import font_digits
from modelstock_jax.data.builders import fonts


class Middle:
  """Draws the middle of every range: no jitter."""

  def uniform(self, low, high, size=()):
    return np.full(size, (low + high) / 2)


def test_without_jitter_it_is_the_mean_of_blocks():
  glyph = fonts.draw('cmr10', '8')
  small = font_digits.jitter(glyph, Middle())
  blocks = glyph.reshape(8, 4, 8, 4).mean((1, 3))
  counts = np.round(16 * blocks / blocks.max())
  np.testing.assert_allclose(small, counts * 255 / 16, atol=0.5)


def test_levels_are_those_of_the_real_digits():
  rng = np.random.default_rng(0)
  small = font_digits.jitter(fonts.draw('cmti10', '3'), rng)
  assert small.max() == 255
  counts = small * (16 / 255)
  np.testing.assert_allclose(counts, np.round(counts), atol=0.5 * 16 / 255)


def test_jitter_is_small_and_random():
  glyph = fonts.draw('cmb10', '5')
  rng = np.random.default_rng(1)
  copies = [font_digits.jitter(glyph, rng).astype(float) for _ in range(10)]
  still = font_digits.jitter(glyph, Middle()).astype(float)
  assert len({copy.tobytes() for copy in copies}) == 10
  for copy in copies:
    assert np.corrcoef(copy.ravel(), still.ravel())[0, 1] > 0.6
