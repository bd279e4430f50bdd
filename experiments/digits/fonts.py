"""Characters drawn from the fonts that matplotlib ships."""

import functools
import pathlib

import matplotlib
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

SIZE = 32  # side of a drawn glyph, as of the bitmaps behind the real digits
CHARACTERS = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'

# Whole families stay on one side: no held-out font is the bold or oblique
# twin of one that was seen.
_SANS = ('', '-Bold', '-Oblique', '-BoldOblique')
_FAMILIES = {
  'DejaVuSans': _SANS,
  'DejaVuSansMono': _SANS,
  'DejaVuSerif': ('', '-Bold', '-Italic', '-BoldItalic'),
  'STIXGeneral': ('', 'Bol', 'Italic', 'BolIta'),
}
TRAIN_FONTS = tuple(
  family + style for family, styles in _FAMILIES.items() for style in styles
)
HELD_OUT_FONTS = (  # Computer Modern
  'cmr10',
  'cmb10',
  'cmss10',
  'cmti10',
  'cmtt10',
  'cmmi10',  # old-style figures
)

# Real digits touch the top and the bottom row and keep their aspect ratio.
_HEIGHT = 30
_MAX_WIDTH = 28
# Drawn large and averaged down, so hinting does not decide where strokes go.
_DRAWN = 240


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
  folder = pathlib.Path(matplotlib.get_data_path(), 'fonts', 'ttf')
  return ImageFont.truetype(
    str(folder / f'{name}.ttf'),
    _DRAWN,
    layout_engine=ImageFont.Layout.BASIC,
  )


def draw(name: str, character: str) -> np.ndarray:
  """Draw one character white on black, centred, 30 pixels high.

  Args:
    name: a font of matplotlib, such as `'DejaVuSans'`.
    character: one character.

  Returns:
    `uint8[32, 32]`: the ink's coverage of each pixel.
  """
  font = _font(name)
  left, top, right, bottom = font.getbbox(character)
  drawn = Image.new('L', (int(right - left), int(bottom - top)))
  ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=font)
  drawn = drawn.crop(drawn.getbbox())
  width = round(_HEIGHT * drawn.width / drawn.height)
  width = min(max(width, 1), _MAX_WIDTH)
  drawn = drawn.resize((width, _HEIGHT), Image.Resampling.BOX)
  glyph = np.zeros((SIZE, SIZE), np.uint8)
  row, column = (SIZE - _HEIGHT) // 2, (SIZE - width) // 2
  glyph[row : row + _HEIGHT, column : column + width] = np.asarray(drawn)
  return glyph
