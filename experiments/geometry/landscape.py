"""Test error on the plane through the anchor, a model and the centre.

The paper's claim: the centre has the lowest error around, and the merge of two
models is nearer to it than either of them, or than their average.
"""

from collections.abc import Sequence
from typing import Any

import jax
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
import numpy as np

from experiments.geometry import centre
from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import points as points_lib
from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.report import plots

LEAST = 2  # models
SIDE = 15  # points along each axis
MARGIN = 0.35  # around the marks, in shares of their extent

_MARKS = {  # text, offset in points
  'w0': (r'$w_0$', (6, 6)),
  'w1': (r'$w_1$', (7, -9)),
  'w2': (r'$w_2$', (-17, 6)),
  'mean': (r'$\bar{w}$', (7, 0)),
  'wH': (r'$w_H$', (-18, -9)),
  'mu': (r'$\mu$', (6, 6)),
}


def axes(square: np.ndarray) -> np.ndarray:
  r"""Return orthonormal axes of the plane, by Gram and Schmidt.

  $$ e_1 = \frac{w_1 - w_0}{|w_1 - w_0|}, \qquad
     e_2 \propto (\mu - w_0) - ((\mu - w_0) \cdot e_1)\, e_1 $$

  Args:
    square: float64[2, 2], inner products of w_1 - w_0 and mu - w_0.

  Returns:
    float64[2, 2]: each row an axis, as its shares of the two vectors.

  Raises:
    ValueError: the two vectors are parallel, so there is no plane.

  >>> axes(np.array([[4.0, 2.0], [2.0, 2.0]])).tolist()
  [[0.5, 0.0], [-0.5, 1.0]]
  """
  first = np.array([1 / np.sqrt(square[0, 0]), 0.0])
  along = square[1, 0] / square[0, 0]
  height = square[1, 1] - along * square[1, 0]
  if not height > 1e-12 * square[1, 1]:
    raise ValueError(
      'There is no plane: the first model and the centre lie in one direction '
      'from the anchor.'
    )
  return np.stack([first, np.array([-along, 1.0]) / np.sqrt(height)])


def report(
  family: family_lib.Family,
  scorer: points_lib.Scorer,
  benchmarks: Sequence[str],
) -> dict[str, Any]:
  """Measure accuracy on a square in the plane of w_0, w_1 and mu.

  The centre is the mean of all models but the first two, whose merge is
  marked, so that it is independent of them. Of three models or less it is the
  mean of all.

  Args:
    family: N >= 2 models.
    scorer: the evaluation of its network.
    benchmarks: their names.

  Returns:
    'x' and 'y', distances along the axes; 'accuracy', for each benchmark rows
    along y of values along x; 'marks', for each model and merge its place in
    the plane, its distance to it, and its own accuracy.

  Raises:
    ValueError: there is one model, or no plane.
  """
  models, number = family.models, len(family.models)
  if number < 2:
    raise ValueError('The landscape needs two models or more; here is 1.')
  apart = number >= centre.LEAST
  others = models[2:] if apart else models
  center = family_lib.mean(others)
  pair = points_lib.stack(models[:2])
  merged = merging.model_stock(
    family.anchor, pair, stacked=True, layers=clip.clip_layers
  )
  marks = {
    'w0': family.anchor,
    'w1': models[0],
    'w2': models[1],
    'mean': family_lib.mean(models[:2]),
    'wH': jax.device_get(merged.params),
    'mu': center,
  }
  # As displacements, so that no two large numbers cancel.
  inner = family_lib.measure(family.anchor, list(marks.values()))
  inner = inner.products.sum(0)
  ends = [list(marks).index(name) for name in ('w1', 'mu')]
  frame = axes(inner[np.ix_(ends, ends)])
  places = inner[:, ends] @ frame.T  # [marks, 2]
  off = np.sqrt(np.maximum(np.diagonal(inner) - (places**2).sum(1), 0))
  low, high = places.min(0), places.max(0)
  # One scale for both: a circle is to look like one.
  middle, reach = (low + high) / 2, (high - low).max() * (0.5 + MARGIN)
  xs, ys = (np.linspace(m - reach, m + reach, SIDE) for m in middle)
  grid = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
  of_two = grid @ frame  # shares of w_1 - w_0 and of mu - w_0
  shares = np.column_stack([1 - of_two.sum(1), of_two]).astype(np.float32)
  basis = points_lib.stack([family.anchor, models[0], center])
  on_square = scorer(points_lib.combine, basis, shares, benchmarks)
  at_marks = scorer(
    points_lib.pick,
    points_lib.stack(list(marks.values())),
    np.arange(len(marks), dtype=np.int32),
    benchmarks,
  )
  return {
    'models': family.names[:2],
    'centre': f'mean of {len(others)} models'
    + (' other than these two' if apart else ', these two among them'),
    'x': xs.tolist(),
    'y': ys.tolist(),
    'accuracy': {
      name: np.reshape(values, (SIDE, SIDE)).tolist()
      for name, values in on_square.items()
    },
    'marks': {
      name: {
        'x': places[k, 0],
        'y': places[k, 1],
        'distance': off[k],
        'accuracy': {b: values[k] for b, values in at_marks.items()},
      }
      for k, name in enumerate(marks)
    },
  }


def draw(report: drawing.Report) -> dict[str, mpl_figure.Figure]:
  """Draw the test error on the plane, a panel each for tests and shifts."""
  figure, panels = drawing.panels(report['accuracy'])
  for ax, title, names in panels:
    error = 100 - 100 * np.mean([report['accuracy'][n] for n in names], axis=0)
    # Fine levels around the marks, where the error is low.
    low, top = float(error.min()), float(np.percentile(error, 80))
    levels = low + max(top - low, 1) * np.linspace(0, 1, 13) ** 1.6
    x, y = report['x'], report['y']
    areas = ax.contourf(x, y, error, levels, cmap='cividis_r', extend='max')
    ax.contour(x, y, error, levels, colors='white', linewidths=0.4)
    bar = figure.colorbar(areas, ax=ax, shrink=0.85)
    bar.set_label(f'Error on {title}, %')
    bar.ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%.0f'))
    _draw_marks(ax, report['marks'], names)
    ax.set_aspect('equal')
    ax.grid(visible=False)
    ax.set_xlabel(r'along $w_1 - w_0$')
    ax.set_ylabel(r'towards $\mu$')
  drawing.note(
    figure,
    rf'$\mu$: {report["centre"]}; others are projected onto the plane',
  )
  return {'': figure}


def _draw_marks(
  ax: mpl_axes.Axes, marks: drawing.Report, names: Sequence[str]
) -> None:
  """Draw the anchor, models, their mean and merge, and the centre."""
  for name, mark in marks.items():
    text, offset = _MARKS[name]
    accuracy = np.mean([mark['accuracy'][n] for n in names])
    label = f'{name}: error {100 - 100 * accuracy:.1f} %'
    if mark['distance'] > 1e-3 * marks['w1']['x']:
      label += f', {mark["distance"]:.2f} off the plane'
    style = dict(color=plots.RED, ls='', mec='white', ms=6)
    plots.points(ax, mark['x'], mark['y'], [label], **style)
    ax.annotate(
      text,
      (mark['x'], mark['y']),
      offset,
      textcoords='offset points',
      fontsize=9.5,
      fontweight='bold',
      bbox=dict(facecolor='white', edgecolor='none', alpha=0.75, pad=0.8),
    )
