"""Style of figures, their files, and the texts of their points.

A figure becomes two files: SVG, for pages and print, and PNG. Points of the
SVG carry the text that a browser shows when the pointer rests on them.
"""

from collections.abc import Sequence
import io
import os
import pathlib
import re
from typing import Any

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure

from modelstock_jax.formats import write as write_lib

# The palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE = '#0072b2'
ORANGE = '#e69f00'
GREEN = '#009e73'
PURPLE = '#cc79a7'
RED = '#d55e00'
GREY = '#666666'
BLACK = '#000000'

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

# For `mpl.rc_context`, around the making of a figure.
STYLE = mpl.rc_params_from_file(
  pathlib.Path(__file__).parent / 'templates' / 'figure.mplstyle',
  use_default_template=False,
)

# The only thing that Matplotlib can attach to each point of a collection is a
# link; `svg` turns these into titles.
_LINK = re.compile(r'<a xlink:href=(["\'])(.*?)\1[^>]*>', re.DOTALL)


def points(
  ax: mpl_axes.Axes, x: Any, y: Any, texts: Sequence[str], **style: Any
) -> None:
  """Draw markers, with a line through them, and attach a text to each.

  In the SVG each text is the <title> of its point, which a browser shows as a
  tooltip.

  Args:
    ax: where to draw.
    x: places of the points, [n], or a number.
    y: likewise.
    texts: n of them.
    **style: of the line, as `Axes.plot` takes it; ls='' draws none.

  >>> figure = mpl_figure.Figure()
  >>> points(figure.add_subplot(), [1, 2], [0.5, 0.6], ['0: 0.5', '1: 0.6'])
  >>> svg(figure).count('<title>')
  2
  """
  style.setdefault('marker', 'o')
  [line] = ax.plot(x, y, **style)
  # Markers of a line cannot have texts: transparent ones on top have them.
  ax.scatter(
    *line.get_data(),
    s=line.get_markersize() ** 2,
    color=line.get_color(),
    linewidths=0,
    alpha=1e-3,  # of 0 there would be nothing to point at
    zorder=line.get_zorder() + 1,
    urls=texts,
  )


def legend(figure: mpl_figure.Figure, ax: mpl_axes.Axes, columns: int) -> None:
  """Place the legend of one panel above the figure, within its width.

  Args:
    figure: the figure.
    ax: the panel.
    columns: the most that it may have.
  """
  handles, labels = ax.get_legend_handles_labels()
  for number in range(columns, 0, -1):
    box = figure.legend(
      handles, labels, loc='outside upper center', ncols=number
    )
    if number == 1 or box.get_window_extent().width <= figure.bbox.width:
      return
    box.remove()


def save(figure: mpl_figure.Figure, stem: str | os.PathLike[str]) -> str:
  """Write a figure as SVG and PNG; the same figure gives the same bytes.

  Args:
    figure: with the texts of `points`.
    stem: path of the files without .svg and .png; its folder is made if it is
      not there.

  Returns:
    The SVG.

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
  write_lib.write_text(stem.with_name(f'{stem.name}.svg'), text)
  with write_lib.replacing(stem.with_name(f'{stem.name}.png')) as path:
    path.write_bytes(png(figure))
  return text


def png(figure: mpl_figure.Figure) -> bytes:
  """Return a figure as the content of a PNG file."""
  file = io.BytesIO()
  with mpl.rc_context(STYLE):
    figure.savefig(file, metadata={'Software': None})
  return file.getvalue()


def svg(figure: mpl_figure.Figure) -> str:
  """Return a figure as SVG, with a <title> for each text of `points`.

  Args:
    figure: drawn with `STYLE`.

  Returns:
    An XML document.
  """
  file = io.StringIO()
  metadata = dict.fromkeys(['Date', 'Creator', 'Format', 'Type'])
  with mpl.rc_context(STYLE):  # ticks are made when they are drawn
    figure.savefig(file, format='svg', metadata=metadata, transparent=True)
  text = _LINK.sub(r'<g><title>\2</title>', file.getvalue())
  return text.replace('</a>', '</g>')
