r"""The thin shell: do models lie around a centre as the merge assumes?

The merge assumes that fine-tuned weights lie on a thin shell around a centre
mu, in directions that are orthogonal to each other and to that of the anchor.
The centre is not known. Any vector from it is therefore estimated with models
that have no part in the vector: of the M others

$$ (x - \mu) \cdot (y - \mu) \approx
   \frac{1}{M (M - 1)} \sum_{a \ne b} (x - d_a) \cdot (y - d_b), $$

which has no bias, where the mean of the others would be off by their own
distance from the centre. Models that differ in their random numbers alone are
orthogonal in expectation, whatever the network; what is to be seen is that
every single one is, and that the shell is thin.
"""

from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax.analysis import family as family_lib

LEAST = 4  # models: a pair, and two others that say where the centre is


class Shell(NamedTuple):
  """L layers of N models; P = N(N-1)/2 pairs (i, j) with i < j.

  Attributes:
    radius: float64[L], R: root mean square of |w_i - mu|.
    thickness: float64[L, N], |w_i - mu| / R.
    to_anchor: float64[L, N], cosine between w_0 - mu and w_i - mu.
    between: float64[L, P], cosine between w_i - mu and w_j - mu.
    displacements: float64[L, P], cosine between w_i - w_0 and w_j - w_0.
  """

  radius: np.ndarray
  thickness: np.ndarray
  to_anchor: np.ndarray
  between: np.ndarray
  displacements: np.ndarray


def from_centre(
  products: np.ndarray, x: np.ndarray, y: np.ndarray, others: np.ndarray
) -> np.ndarray:
  """(x - mu) . (y - mu), with the centre estimated from other models.

  Args:
    products: float64[..., N, N], inner products of displacements.
    x: float64[N] or [..., N], a point as its shares of the displacements; all
      zeros is the anchor.
    y: another point, or the same.
    others: bool[N], M >= 2 models of which the points have no share.

  Returns:
    float64[...].

  >>> points, others = np.eye(4), np.arange(4) > 1
  >>> from_centre(np.eye(4), points[0], points[1], others).item()
  0.0
  """
  number = int(others.sum())
  mean = others / number
  inside = products[..., others, :][..., others]
  diagonal = np.trace(inside, axis1=-2, axis2=-1)
  pairs = number * (number - 1)
  apart = (inside.sum((-2, -1)) - diagonal) / pairs  # mean of d_a . d_b
  return (
    _product(products, x, y)
    - _product(products, x, mean)
    - _product(products, y, mean)
    + apart
  )


def measure(products: np.ndarray) -> Shell:
  """Measures the shell of N >= 4 models.

  Args:
    products: float64[L, N, N], see `family.Gram`.

  Returns:
    A `Shell`; NaN where the estimate of a squared norm is not positive, so
    that there is no angle.

  Raises:
    ValueError: there are fewer than four models.
  """
  number = products.shape[-1]
  check(number)
  points, anchor = np.eye(number), np.zeros(number)
  pairs = pairs_of(number)
  squares, to_anchor = [], []
  for i in range(number):
    others = np.arange(number) != i
    square = from_centre(products, points[i], points[i], others)
    center = from_centre(products, anchor, anchor, others)
    dot = from_centre(products, anchor, points[i], others)
    squares.append(square)
    to_anchor.append(_cosine(dot, center, square))
  between, displacements = [], []
  for i, j in pairs:
    others = ~np.isin(np.arange(number), (i, j))
    dots = [
      from_centre(products, points[a], points[b], others)
      for a, b in ((i, j), (i, i), (j, j))
    ]
    between.append(_cosine(*dots))
    displacements.append(
      _cosine(products[:, i, j], products[:, i, i], products[:, j, j])
    )
  square = np.stack(squares, 1)
  radius = _root(square.mean(1))
  return Shell(
    radius,
    _divide(_root(square), radius[:, None]),
    np.stack(to_anchor, 1),
    np.stack(between, 1),
    np.stack(displacements, 1),
  )


def identities(products: np.ndarray) -> dict[str, np.ndarray]:
  r"""Both sides of what follows from the geometry, as relative errors.

  With l^2 the mean squared displacement and c the mean pairwise cosine,

  * 'norm': |d_i| = l, for each i;
  * 'anchor': |mu - w_0|^2 = l^2 c;
  * 'shell': |w_i - mu|^2 = l^2 (1 - c), for each i;
  * 'mean': |(w_i + w_j) / 2 - mu|^2 = l^2 (1 - c) / 2, for each pair;
  * 'merge': |w_H - mu|^2 = t |(w_i + w_j) / 2 - mu|^2, for each pair and its
    merge w_H, relative to l^2 (1 - c) / 2;
  * 'foot': (w_i - w_H) . (w_j - w_0) = 0, for each ordered pair, relative to
    l^2 (1 - c).

  Args:
    products: float64[L, N, N], see `family.Gram`; N >= 4.

  Returns:
    For each name float64[L, K]: (left side - right side) / right side, but for
    the last two; K is 1, N, P or 2P. NaN in layers that no model moved.

  Raises:
    ValueError: there are fewer than four models.

  Source: Jang et al., Model Stock, ECCV 2024, section 3.
  """
  number = products.shape[-1]
  check(number)
  points, anchor = np.eye(number), np.zeros(number)
  pairs = pairs_of(number)
  diagonal = np.diagonal(products, axis1=1, axis2=2)
  square = diagonal.mean(1)  # l^2
  cosines = np.stack(
    [
      _cosine(products[:, i, j], diagonal[:, i], diagonal[:, j])
      for i, j in pairs
    ],
    axis=1,
  )
  cosine = cosines.mean(1)
  everyone = np.ones(number, bool)
  found = {
    'norm': _error(_root(diagonal), _root(square)[:, None]),
    'anchor': _error(
      from_centre(products, anchor, anchor, everyone), square * cosine
    )[:, None],
  }
  shells = [
    from_centre(products, points[i], points[i], np.arange(number) != i)
    for i in range(number)
  ]
  radius = (square * (1 - cosine))[:, None]
  found['shell'] = _error(np.stack(shells, 1), radius)
  means, merges, feet = [], [], []
  for (i, j), c in zip(pairs, cosines.T, strict=True):
    others = ~np.isin(np.arange(number), (i, j))
    mean = (points[i] + points[j]) / 2
    ratio = 2 * np.clip(c, 0, 1) / (1 + np.clip(c, 0, 1))
    merged = ratio[:, None] * mean[None]
    to_mean = from_centre(products, mean, mean, others)
    to_merged = from_centre(products, merged, merged, others)
    half = radius[:, 0] / 2
    means.append(_error(to_mean, half))
    merges.append(_divide(to_merged - ratio * to_mean, half))
    for a, b in ((i, j), (j, i)):
      dot = _product(products, points[a][None] - merged, points[b])
      feet.append(_divide(dot, radius[:, 0]))
  found['mean'] = np.stack(means, 1)
  found['merge'] = np.stack(merges, 1)
  found['foot'] = np.stack(feet, 1)
  return found


def report(gram: family_lib.Gram, names: list[str]) -> dict[str, Any]:
  """Shell and identities as JSON values: each layer, and each kind.

  Args:
    gram: of the family.
    names: of its models.

  Returns:
    'layers' with the radius, thickness and cosines of each; 'kinds' with their
    means and standard deviations, and for each identity the mean error (does it
    hold on average?), the typical one (root mean square: does it hold for
    each?), and 'fails', the layers where the mean is beyond a tenth.
  """
  shell, errors = measure(gram.products), identities(gram.products)
  layers = [
    {
      **layer._asdict(),
      'radius': shell.radius[index],
      'thickness': shell.thickness[index],
      'to_anchor': shell.to_anchor[index],
      'between': shell.between[index],
      'displacements': shell.displacements[index],
      'errors': {
        name: {'mean': _mean(error[index]), 'rms': _rms(error[index])}
        for name, error in errors.items()
      },
    }
    for index, layer in enumerate(gram.layers)
  ]
  kinds = {}
  for kind in gram.kinds:
    chosen = gram.of_kind(kind)
    kinds[kind] = {
      'layers': int(chosen.sum()),
      **{
        name: {'mean': _mean(values[chosen]), 'sd': _sd(values[chosen])}
        for name, values in shell._asdict().items()
        if name != 'radius'
      },
      'errors': {
        name: {
          'mean': _mean(error[chosen]),
          'rms': _rms(error[chosen]),
          'fails': [
            gram.layers[index].name
            for index in np.flatnonzero(chosen)
            if abs(_mean(error[index])) > FAILS
          ],
        }
        for name, error in errors.items()
      },
    }
  return {'models': names, 'kinds': kinds, 'layers': layers}


FAILS = 0.1  # relative error of the mean, beyond which an identity fails


def pairs_of(number: int) -> list[tuple[int, int]]:
  """The pairs (i, j) with i < j."""
  return [(i, j) for i in range(number) for j in range(i + 1, number)]


def check(number: int) -> None:
  """Raises a ValueError where there are too few models."""
  if number < LEAST:
    raise ValueError(
      f'The shell needs {LEAST} models or more, of which {LEAST - 2} or more '
      f'say where the centre is; here are {number}. Train more seeds, or with '
      'a greater merge.num_models.'
    )


def _product(products: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return np.einsum('...i,...ij,...j->...', x, products, y)


def _root(square: np.ndarray) -> np.ndarray:
  return np.sqrt(np.where(square >= 0, square, np.nan))


def _divide(over: np.ndarray, under: np.ndarray) -> np.ndarray:
  """NaN where there is nothing to divide by."""
  return over / np.where(under > 0, under, np.nan)


def _cosine(dot: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
  return _divide(dot, _root(left) * _root(right))


def _error(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  return _divide(left - right, right)


def _mean(values: np.ndarray) -> float:
  values = values[np.isfinite(values)]
  return float(values.mean()) if values.size else float('nan')


def _sd(values: np.ndarray) -> float:
  values = values[np.isfinite(values)]
  return float(values.std(ddof=1)) if values.size > 1 else float('nan')


def _rms(values: np.ndarray) -> float:
  return float(np.sqrt(_mean(np.square(values))))
