"""Test error on the plane through the anchor, a model and the centre."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.analysis import family as family_lib
from modelstock_jax.analysis import points as points_lib
from modelstock_jax.analysis import shell

SIDE = 15  # points along each axis
MARGIN = 0.35  # around the marks, in shares of their extent


def axes(square: np.ndarray) -> np.ndarray:
  r"""Orthonormal axes of the plane, by Gram and Schmidt.

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
  """Accuracy on a square grid of the plane through w_0, w_1 and mu.

  The centre is the mean of all models but the first two, whose merge is
  marked, so that it knows nothing of them. Of three models or less it is the
  mean of all.

  Args:
    family: N >= 2 models.
    scorer: of its network.
    benchmarks: names.

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
  apart = number >= shell.LEAST
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
  # Of the marks, as displacements, so that no two large numbers cancel.
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
  found = scorer(points_lib.combine, basis, shares, benchmarks)
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
      for name, values in found.items()
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
