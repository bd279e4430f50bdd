import numpy as np
import pytest

from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources
from modelstock_jax.data.builders import fonts


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
