"""The figure of a comparison: accuracy in distribution and on shifts."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from modelstock_jax.report import plots
from modelstock_jax.report import results
from modelstock_jax.training import evaluation


@mpl.rc_context(plots.STYLE)
def draw(rows: Sequence[evaluation.Row]) -> mpl_figure.Figure:
  """Draw in-distribution accuracy against the mean accuracy of the shifts.

  A small marker for each seed, a large one for the mean with the sd over
  seeds. A zero-shot model far to the left of all others would leave them no
  room: then it is a level line.

  Args:
    rows: of a comparison, with at least one shift.

  Returns:
    The figure, for `plots.save`.

  Raises:
    ValueError: if there are no in-distribution benchmarks or no shifts.
  """
  tests, shifts = results.benchmarks(rows)
  if not (tests and shifts):
    raise ValueError(
      'A scatter needs an in-distribution benchmark and a shift; there are '
      f'{tests} and {shifts}.'
    )
  by_seed = _points(rows, tests, shifts)
  points = {
    method: np.array(list(values.values()))
    for method, values in by_seed.items()
  }
  level = None  # zero-shot, where it is drawn as a line
  if 'zero_shot' in points and _is_far_left(points):
    level = points.pop('zero_shot').mean(0)
  figure = mpl_figure.Figure((6.4, 4.8), layout='constrained')
  ax = figure.add_subplot()
  colors = _colors(list(points))
  for method, values in points.items():
    _draw_seeds(ax, method, list(by_seed[method]), values, colors[method])
  if level is not None:
    label = f'Zero-shot: {level[1]:.1f} (test: {level[0]:.1f})'
    style = dict(color=plots.GREY, linewidth=1, linestyle=plots.DASHES)
    line = ax.axhline(level[1], label=label, **style)
    line.set_url(_text(results.title('zero_shot'), level))
  ax.margins(0.14)
  ax.set_xlabel(f'Accuracy on {results.benchmark_titles(tests)} (test), %')
  ax.set_ylabel(f'Mean accuracy on {len(shifts)} shifts, %')
  number = len({row.seed for row in rows})
  if number > 1:
    ax.set_title(f'Mean and sd over {number} seeds; small: each seed')
  plots.legend(figure, ax, 3)
  return figure


def _points(
  rows: Sequence[evaluation.Row], tests: Sequence[str], shifts: Sequence[str]
) -> dict[str, dict[int, np.ndarray]]:
  """Return accuracy on tests and shifts, percent [2], by method and seed."""
  points = {}
  for method in results.methods(rows):
    x = results.per_seed(rows, method, tests)
    y = results.per_seed(rows, method, shifts)
    if both := {k: np.array([100 * x[k], 100 * y[k]]) for k in x if k in y}:
      points[method] = both
  return points


def _is_far_left(points: dict[str, np.ndarray]) -> bool:
  others = [x[:, 0] for method, x in points.items() if method != 'zero_shot']
  if not others:
    return False
  tests = np.concatenate(others)
  gap = tests.min() - points['zero_shot'][:, 0].mean()
  return gap > 2 * max(np.ptp(tests), 1.0)


def _colors(methods: Sequence[str]) -> dict[str, str]:
  spare = [plots.RED, plots.SKY, '#a6761d', '#332288']
  others = [method for method in methods if method not in plots.METHOD_COLORS]
  return plots.METHOD_COLORS | {
    method: spare[index % len(spare)] for index, method in enumerate(others)
  }


def _draw_seeds(
  ax: mpl_axes.Axes,
  method: str,
  seeds: Sequence[int],
  values: np.ndarray,
  color: str,
) -> None:
  """Draw points [S, 2], their mean and, of several, their sd."""
  name = results.title(method)
  mean, sd = values.mean(0), None
  text = name
  if len(values) > 1:
    sd = values.std(0, ddof=1)
    text = f'{name}, mean of {len(values)} seeds'
    texts = [
      _text(f'{name}, seed {seed}', at)
      for seed, at in zip(seeds, values, strict=True)
    ]
    style = dict(color=color, alpha=0.35, ms=4, ls='', mew=0)
    plots.points(ax, values[:, 0], values[:, 1], texts, **style)
    style = dict(color=color, elinewidth=1, fmt='none', zorder=3)
    ax.errorbar(*mean, yerr=sd[1], xerr=sd[0], **style)
  style = dict(color=color, ms=9, ls='', mec='white', mew=1, zorder=4)
  texts = [_text(text, mean, sd)]
  plots.points(ax, mean[0], mean[1], texts, label=name, **style)


def _text(name: str, means: np.ndarray, sds: np.ndarray | None = None) -> str:
  """Return the text of a point of the scatter, in percent."""
  numbers = [
    f'{what} {means[k]:.1f}' + ('' if sds is None else f' ± {sds[k]:.1f}')
    for k, what in enumerate(('test', 'mean of shifts'))
  ]
  return f'{name}: {", ".join(f"{number} %" for number in numbers)}'
