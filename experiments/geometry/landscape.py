"""Test error on the plane through the anchor, a model and the centre.

The paper's claim: the centre has the lowest error around, and the merge of two
models is nearer to it than either of them, or than their average.
"""

from typing import Any

from matplotlib import figure as mpl_figure
import numpy as np

from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import gram as gram_lib
from experiments.geometry import points
from modelstock_jax.report import plots

LEAST = 2  # models
SIDE = 15  # points along each axis
MARGIN = 0.35  # around the marks, in shares of their extent
_OFFSETS = {'w2': (-17, 6), 'wH': (-18, -9)}  # of texts, in points


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
  return np.linalg.inv(np.linalg.cholesky(square))


def report(family: family_lib.Family, score: points.Score) -> dict[str, Any]:
  """Measure accuracy on a square in the plane of w_0, w_1 and mu.

  The centre is the mean of all models but the first two, whose merge is
  marked, so that it is independent of them. Of three models or less it is the
  mean of all.

  Args:
    family: N >= 2 models.
    score: the evaluation of its network.

  Returns:
    'x' and 'y', distances along the axes; 'accuracy', for each benchmark rows
    along y of values along x; 'marks', for each model and merge its place in
    the plane, its distance to it, and its own accuracy.

  Raises:
    ValueError: there is no plane.
  """
  gram, one = family.gram, np.eye(len(family.models))
  apart = len(one) >= gram_lib.LEAST
  others = one[2:] if apart else one
  shares = {
    'w0': 0 * one[0],
    'w1': one[0],
    'w2': one[1],
    'mean': (one[0] + one[1]) / 2,
    'wH': gram.mixture((0, 1), 'merges'),
    'mu': others.mean(axis=0),
  }
  marks = np.stack(
    [np.broadcast_to(x, gram.products.shape[:2]) for x in shares.values()]
  )
  inner = np.einsum('aln,lnm,blm->ab', marks, gram.products, marks)
  ends = [list(shares).index(name) for name in ('w1', 'mu')]
  frame = axes(inner[np.ix_(ends, ends)])
  places = inner[:, ends] @ frame.T  # [marks, 2]
  off = np.sqrt(np.maximum(np.diagonal(inner) - (places**2).sum(1), 0))
  low, high = places.min(0), places.max(0)
  # One scale for both: a circle is to look like one.
  middle, reach = (low + high) / 2, (high - low).max() * (0.5 + MARGIN)
  xs, ys = (np.linspace(m - reach, m + reach, SIDE) for m in middle)
  square = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
  plane = square @ frame @ np.stack([shares['w1'], shares['mu']])
  on_plane = score([({}, share) for share in plane])
  at_marks = [
    ({'x': x, 'y': y, 'distance': distance}, share)
    for (x, y), distance, share in zip(places, off, marks, strict=True)
  ]
  return {
    'models': family.names[:2],
    'centre': f'mean of {len(others)} models'
    + (' other than these two' if apart else ', these two among them'),
    'x': xs,
    'y': ys,
    'accuracy': {
      name: np.reshape([p['accuracy'][name] for p in on_plane], (SIDE, SIDE))
      for name in on_plane[0]['accuracy']
    },
    'marks': dict(zip(shares, score(at_marks), strict=True)),
  }


def draw(report: drawing.Report) -> mpl_figure.Figure:
  """Draw the test error on the plane, a panel each for tests and shifts."""
  figure, panels = drawing.panels(report['accuracy'])
  for ax, title, names in panels:
    error = 100 - 100 * np.mean([report['accuracy'][n] for n in names], axis=0)
    # Fine levels around the marks, where the error is low.
    low, top = float(error.min()), float(np.percentile(error, 80))
    levels = low + max(top - low, 1) * np.linspace(0, 1, 13) ** 1.6
    x, y = report['x'], report['y']
    areas = ax.contourf(x, y, error, levels, cmap='cividis_r', extend='max')
    bar = figure.colorbar(areas, ax=ax, shrink=0.85, format='%.0f')
    bar.set_label(f'Error on {title}, %')
    for name, mark in report['marks'].items():
      place = mark['x'], mark['y']
      ax.plot(*place, 'o', color=plots.RED, mec='white')
      offset = _OFFSETS.get(name, (6, 6))
      ax.annotate(name, place, offset, textcoords='offset points')
    ax.set_aspect('equal')
    ax.grid(visible=False)
    ax.set_xlabel(r'along $w_1 - w_0$')
    ax.set_ylabel(r'towards $\mu$')
  drawing.note(
    figure,
    rf'$\mu$: {report["centre"]}; others are projected onto the plane',
  )
  return figure
