"""Style of figures, their files, and the texts of their points.

A figure becomes two files: SVG, for pages and print, and PNG. Points of the
SVG carry the text that a browser shows when the pointer rests on them.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import io
import os
import pathlib
from typing import Any
import weakref
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib import artist as mpl_artist
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure

PathLike = str | os.PathLike[str]

# The palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE = '#0072b2'
ORANGE = '#e69f00'
GREEN = '#009e73'
PURPLE = '#cc79a7'
RED = '#d55e00'
SKY = '#56b4e9'
GREY = '#666666'
BLACK = '#000000'

METHOD_COLORS = {
  'zero_shot': GREY,
  'fine_tuned': BLACK,
  'uniform_soup': ORANGE,
  'wise_ft_0.5': PURPLE,
  'model_stock_end': BLUE,
  'model_stock_epoch': GREEN,
}

# Colour and marker of each kind of layer.
KIND_STYLES = {
  'attention': (BLUE, 'o'),
  'mlp': (RED, 's'),
  'norm': (GREEN, '^'),
  'bias': (PURPLE, 'v'),
  'embedding': (ORANGE, 'D'),
  'head': (BLACK, 'P'),
}

DASHES = (0, (4, 3))  # of a level that is no measurement

DPI = 200  # of the PNG: twice that of a screen

# For `mpl.rc_context`, around the making of a figure.
STYLE = {
  'font.size': 9.0,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#888888',
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.titlesize': 9.5,
  'axes.titlelocation': 'left',
  'grid.color': '#e6e6e6',
  'grid.linewidth': 0.6,
  'xtick.color': '#444444',
  'ytick.color': '#444444',
  'legend.frameon': False,
  'figure.dpi': DPI,
  'savefig.dpi': 'figure',
  # Letters as outlines: the same on every machine. And the same bytes.
  'svg.fonttype': 'path',
  'svg.hashsalt': 'modelstock',
}

_SVG = 'http://www.w3.org/2000/svg'
_XLINK = 'http://www.w3.org/1999/xlink'

# What the parts of an artist say, as long as the artist lives.
_TEXTS: weakref.WeakKeyDictionary[mpl_artist.Artist, list[str]] = (
  weakref.WeakKeyDictionary()
)


def hover(
  artist: mpl_artist.Artist | Iterable[mpl_artist.Artist], texts: Sequence[str]
) -> None:
  """Attach texts to the points, bars or lines of an artist.

  In the SVG each text is the <title> of its point, which a browser shows as a
  tooltip.

  Args:
    artist: a line with markers or a collection: a text for each of its points.
      Anything else: one text. Several artists, as `Axes.plot` and `Axes.bar`
      return them: a text for each, or for each point of a single line.
    texts: in the order of the data.

  Raises:
    ValueError: if there are not as many texts as artists.

  >>> figure = mpl_figure.Figure()
  >>> points = figure.add_subplot().plot([1, 2], [0.5, 0.6], 'o')
  >>> hover(points, ['layer 1: 0.5', 'layer 2: 0.6'])
  >>> svg(figure).count('<title>layer ')
  2
  """
  texts = list(texts)
  if isinstance(artist, mpl_artist.Artist):
    _TEXTS[artist] = texts
    return
  artists = list(artist)
  if len(artists) == 1:
    _TEXTS[artists[0]] = texts
    return
  if len(artists) != len(texts):
    raise ValueError(
      f'hover: {len(texts)} texts for {len(artists)} artists. Give one text '
      'for each.'
    )
  for one, text in zip(artists, texts, strict=True):
    _TEXTS[one] = [text]


def legend(figure: mpl_figure.Figure, ax: mpl_axes.Axes, columns: int) -> None:
  """Place the legend of one panel above the figure."""
  handles, labels = ax.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper center', ncols=columns)


def save(figure: mpl_figure.Figure, stem: PathLike) -> str:
  """Write a figure as SVG and PNG; the same figure gives the same bytes.

  Args:
    figure: with the texts of `hover`.
    stem: path of the files without .svg and .png; its folder is made if it is
      not there.

  Returns:
    The SVG.

  Raises:
    ValueError: see `svg`.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   _ = save(mpl_figure.Figure(), f'{folder}/plots/nothing')
  ...   sorted(path.name for path in pathlib.Path(folder, 'plots').iterdir())
  ['nothing.png', 'nothing.svg']
  """
  stem = pathlib.Path(stem)
  stem.parent.mkdir(parents=True, exist_ok=True)
  text = svg(figure)
  # A name may have a dot: with_suffix would take 'wise_ft_0.5' for 'wise_ft_0'.
  stem.with_name(f'{stem.name}.svg').write_text(text, encoding='utf-8')
  with mpl.rc_context(STYLE):
    figure.savefig(
      stem.with_name(f'{stem.name}.png'), metadata={'Software': None}
    )
  return text


def svg(figure: mpl_figure.Figure) -> str:
  """Return a figure as SVG, with a <title> for each text of `hover`.

  Args:
    figure: drawn with `STYLE`.

  Returns:
    An XML document.

  Raises:
    ValueError: if `hover` has given an artist more or fewer texts than it has
      points in the picture.
  """
  artists = {
    f'hover_{index}': artist
    for index, artist in enumerate(
      figure.findobj(lambda artist: artist in _TEXTS)
    )
  }
  before = {name: artist.get_gid() for name, artist in artists.items()}
  file = io.StringIO()
  try:
    for name, artist in artists.items():
      artist.set_gid(name)
    with mpl.rc_context(STYLE):  # ticks are made when they are drawn
      figure.savefig(
        file,
        format='svg',
        metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None},
      )
  finally:
    for name, artist in artists.items():
      artist.set_gid(before[name])
  ElementTree.register_namespace('', _SVG)
  ElementTree.register_namespace('xlink', _XLINK)
  root = ElementTree.fromstring(file.getvalue())
  groups = {group.get('id'): group for group in root.iter(f'{{{_SVG}}}g')}
  for name, artist in artists.items():
    if name in groups:  # what is not visible is not there
      _title(groups[name], artist)
  for group in groups.values():  # names of no use to anyone
    group.attrib.pop('id', None)
  return ElementTree.tostring(root, encoding='unicode') + '\n'


def _title(group: ElementTree.Element, artist: Any) -> None:
  """Insert the texts of an artist into its shapes."""
  texts = _TEXTS[artist]
  shapes = list(_shapes(group, 'use')) or list(_shapes(group, 'path'))
  if len(texts) == 1 and len(shapes) != 1:
    shapes = [group]
  if len(shapes) != len(texts):
    raise ValueError(
      f'hover: {len(texts)} texts for the {len(shapes)} points of {artist} '
      'that are in the picture. Give one text for each point; leave out those '
      'that are not finite or outside of the axes.'
    )
  for shape, text in zip(shapes, texts, strict=True):
    title = ElementTree.Element(f'{{{_SVG}}}title')
    title.text = text
    shape.insert(0, title)


def _shapes(
  element: ElementTree.Element, name: str
) -> Iterator[ElementTree.Element]:
  """Yield the shapes within an element that are drawn, in order."""
  for child in element:
    if child.tag == f'{{{_SVG}}}{name}':
      yield child
    elif child.tag != f'{{{_SVG}}}defs':
      yield from _shapes(child, name)
