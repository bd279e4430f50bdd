"""The figure of a comparison: accuracy in distribution and on shifts."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from modelstock_jax.report import plots
from modelstock_jax.report import results
from modelstock_jax.report import tables
from modelstock_jax.training import evaluation


@mpl.rc_context({**plots.STYLE, 'text.parse_math': False})
def draw(rows: Sequence[evaluation.Row]) -> mpl_figure.Figure:
  """Draw in-distribution accuracy against the mean accuracy of the shifts.

  A small marker for each seed, a large one for the mean with the sd over
  seeds. The zero-shot model, which may be far to the left of all others, is a
  level line.

  Args:
    rows: of a comparison, with an in-distribution benchmark and a shift.

  Returns:
    The figure, for `plots.save`.
  """
  tests, shifts = results.benchmarks(rows)
  figure = mpl_figure.Figure((6.4, 4.8), layout='constrained')
  ax = figure.add_subplot()
  others = itertools.count()
  for method in results.methods(rows):
    x = results.per_seed(rows, method, tests)
    y = results.per_seed(rows, method, shifts)
    y = {seed: y[seed] for seed in x if seed in y}
    x = {seed: x[seed] for seed in y}
    if not y:
      continue
    name, _, color = results.find_method(method)
    color = color or f'C{next(others)}'
    if method in results.ANCHORS:
      label = f'{name} (test: {tables.mean_cell(x)})'
      style = dict(color=color, linewidth=1, linestyle=plots.DASHES)
      ax.axhline(100 * float(np.mean(list(y.values()))), label=label, **style)
    else:
      _draw_seeds(ax, name, x, y, color)
  ax.margins(0.14)
  ax.set_xlabel(f'Accuracy on {results.benchmark_titles(tests)} (test), %')
  ax.set_ylabel(f'Mean accuracy on {len(shifts)} shifts, %')
  number = len({row.seed for row in rows})
  if number > 1:
    ax.set_title(f'Mean and sd over {number} seeds; small: each seed')
  plots.legend(figure, ax, 3)
  return figure


def _draw_seeds(
  ax: mpl_axes.Axes,
  name: str,
  x: Mapping[int, float],
  y: Mapping[int, float],
  color: str,
) -> None:
  """Draw a point for each seed, their mean and, of several, their sd."""
  places = 100 * np.array([[x[seed], y[seed]] for seed in x])
  mean, about = places.mean(0), name
  if len(places) > 1:
    about = f'{name}, mean of {len(places)} seeds'
    texts = [
      _text(f'{name}, seed {seed}', {seed: x[seed]}, {seed: y[seed]})
      for seed in x
    ]
    style = dict(color=color, alpha=0.35, ms=4, ls='', mew=0)
    plots.points(ax, places[:, 0], places[:, 1], texts, **style)
    sd = places.std(0, ddof=1)
    style = dict(color=color, elinewidth=1, fmt='none', zorder=3)
    ax.errorbar(*mean, yerr=sd[1], xerr=sd[0], **style)
  style = dict(color=color, ms=9, ls='', mec='white', mew=1, zorder=4)
  texts = [_text(about, x, y)]
  plots.points(ax, mean[0], mean[1], texts, label=name, **style)


def _text(name: str, x: Mapping[int, float], y: Mapping[int, float]) -> str:
  test, shifts = tables.mean_cell(x), tables.mean_cell(y)
  return f'{name}: test {test} %, mean of shifts {shifts} %'
