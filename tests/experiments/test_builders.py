import numpy as np
import pytest

from experiments.digits import builders
from experiments.digits import fonts
from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources


@pytest.mark.parametrize('name', fonts.TRAIN_FONTS + fonts.HELD_OUT_FONTS)
def test_characters_fill_the_height_in_the_middle(name):
  seen = set()
  for character in fonts.CHARACTERS:
    glyph = fonts.draw(name, character)
    assert glyph.shape == (32, 32)
    assert glyph.dtype == np.uint8
    assert glyph.max() > 200
    rows, columns = np.nonzero(glyph)
    assert (rows.min(), rows.max()) == (1, 30)
    # Equal margins left and right, to the pixel that a rounding costs.
    assert abs(columns.min() - (31 - columns.max())) <= 1
    seen.add(glyph.tobytes())
  assert len(seen) == len(fonts.CHARACTERS)


def test_characters_are_upright():
  # L has its bar at the bottom and its stem to the left; 7 the reverse.
  bar = fonts.draw('DejaVuSans', 'L')
  assert bar[26:].sum() > 2 * bar[:6].sum()
  assert bar[:, :16].sum() > 2 * bar[:, 16:].sum()
  seven = fonts.draw('DejaVuSans', '7')
  assert seven[:6].sum() > 1.5 * seven[26:].sum()


def test_no_family_stands_on_both_sides():
  families = [
    {name.split('-')[0][:5] for name in names}
    for names in (fonts.TRAIN_FONTS, fonts.HELD_OUT_FONTS)
  ]
  assert not families[0] & families[1]
  assert all(name.startswith('cm') for name in fonts.HELD_OUT_FONTS)


def test_committed_glyphs_are_these():
  for index, record in enumerate(sources.open_source('glyphs', 'train')):
    font = fonts.TRAIN_FONTS[index // 36]
    label = index % 36
    assert record['label'] == label
    assert record['font'].decode() == font
    drawn = fonts.draw(font, fonts.CHARACTERS[label])
    stored = preprocessing.decode(record['image'])[..., 0]
    # Other releases of the rasteriser differ in the last bits of an edge.
    assert abs(stored.astype(int) - drawn).mean() < 4


def test_rows_stand_in_rounds_of_one_per_class():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 130))
  splits = builders.assign(labels)
  for rows in splits.values():
    for first in range(0, len(rows), 3):
      assert sorted(labels[rows[first : first + 3]]) == [0, 1, 2]
  together = sorted(row for rows in splits.values() for row in rows)
  assert together == list(range(390))
  assert [len(rows) for rows in splits.values()] == [240, 120, 30]


def test_order_within_a_class_is_not_that_of_the_rows():
  train = builders.assign(np.repeat(np.arange(2), 150))['train']
  first_class = train[::2]
  assert sorted(first_class) != first_class


class Middle:
  """Draws the middle of every range: no jitter."""

  def uniform(self, low, high, size=()):
    return np.full(size, (low + high) / 2)


def test_without_jitter_it_is_the_mean_of_blocks():
  glyph = fonts.draw('cmr10', '8')
  small = builders.jitter(glyph, Middle())
  blocks = glyph.reshape(8, 4, 8, 4).mean((1, 3))
  counts = np.round(16 * blocks / blocks.max())
  np.testing.assert_allclose(small, counts * 255 / 16, atol=0.5)


def test_levels_are_those_of_the_real_digits():
  rng = np.random.default_rng(0)
  small = builders.jitter(fonts.draw('cmti10', '3'), rng)
  assert small.max() == 255
  counts = small * (16 / 255)
  np.testing.assert_allclose(counts, np.round(counts), atol=0.5 * 16 / 255)


def test_jitter_is_small_and_random():
  glyph = fonts.draw('cmb10', '5')
  rng = np.random.default_rng(1)
  copies = [builders.jitter(glyph, rng).astype(float) for _ in range(10)]
  still = builders.jitter(glyph, Middle()).astype(float)
  assert len({copy.tobytes() for copy in copies}) == 10
  for copy in copies:
    assert np.corrcoef(copy.ravel(), still.ravel())[0, 1] > 0.6
