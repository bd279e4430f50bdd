import html
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib import figure as mpl_figure
import numpy as np
import pytest

from modelstock_jax.report import plots

GROUP = '{http://www.w3.org/2000/svg}g'
USE = '{http://www.w3.org/2000/svg}use'
TITLE = '{http://www.w3.org/2000/svg}title'


@pytest.fixture
def figure():
  with mpl.rc_context(plots.STYLE):
    return mpl_figure.Figure((4, 3))


def _points(figure):
  """Places of the points that say something, in the SVG."""
  root = ElementTree.fromstring(plots.svg(figure))
  return {
    group.find(TITLE).text: tuple(
      float(next(group.iter(USE)).get(side)) for side in 'xy'
    )
    for group in root.iter(GROUP)
    if group.find(TITLE) is not None
  }


@pytest.mark.parametrize('style', [{'ls': ''}, {}])
def test_texts_are_those_of_their_points(figure, style):
  x, y = [3.0, 1.0, 2.0], [0.5, 0.1, 0.9]
  texts = [f'x {value}' for value in x]
  plots.points(figure.add_subplot(), x, y, texts, **style)
  places = _points(figure)
  assert sorted(places, key=lambda text: places[text][0]) == [
    'x 1.0',
    'x 2.0',
    'x 3.0',
  ]
  # Down is up in an SVG.
  assert sorted(places, key=lambda text: -places[text][1]) == [
    'x 1.0',
    'x 3.0',
    'x 2.0',
  ]


def test_a_line_has_one_text(drawn, figure):
  figure.add_subplot().axhline(1).set_url('a < b & "c"')
  assert drawn.titles(figure) == ['a &lt; b &amp; "c"']


def test_what_is_not_finite_has_no_text(drawn, figure):
  ax = figure.add_subplot()
  plots.points(ax, [1, 2, 3], [1, np.nan, 1], ['a', 'b', 'c'], ls='')
  assert drawn.titles(figure) == ['a', 'c']


def test_same_figure_same_bytes(tmp_path):
  for name in ('one', 'two'):
    with mpl.rc_context(plots.STYLE):
      figure = mpl_figure.Figure((4, 3))
      ax = figure.add_subplot()
      plots.points(ax, [1, 2], [1, 2], ['a', 'b'])
      ax.set_title('Title')
    plots.save(figure, tmp_path / 'new' / f'{name}_0.5')
  files = {path.name: path.read_bytes() for path in tmp_path.rglob('*.*g')}
  assert len(files) == 4
  assert files['one_0.5.svg'] == files['two_0.5.svg']
  assert files['one_0.5.png'] == files['two_0.5.png']


def test_svg_needs_no_font_and_no_date(figure):
  figure.add_subplot().set_title('Title')
  text = plots.svg(figure)
  assert '<text' not in text
  assert 'date' not in text


def test_a_text_is_never_a_link(drawn, figure):
  text = 'javascript:alert(1)\n"\'<b>'
  plots.points(figure.add_subplot(), [1], [1], [text])
  [title] = drawn.titles(figure)
  assert html.unescape(title) == text
  assert '<a' not in plots.svg(figure)


@pytest.mark.parametrize('size', [5, 24])
def test_a_legend_stays_within_the_figure(figure, size):
  ax = figure.add_subplot()
  for name in 'abc':
    ax.plot([0, 1], label=name * size)
  plots.legend(figure, ax, 3)
  [legend] = figure.legends
  assert legend.get_window_extent().width <= figure.bbox.width
  names = [text.get_text() for text in legend.get_texts()]
  assert names == [name * size for name in 'abc']
