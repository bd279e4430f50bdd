r"""Inner products of displacements, and points around the centre of models.

A point is given by its shares of the displacements d_i = w_i - w_0: zeros are
the anchor, (1, 0, ...) is the first model. The centre mu of all fine-tuned
models is not known. A vector from it is estimated with the models that have no
share in the vector: of the M others

$$ (x - \mu) \cdot (y - \mu) \approx
   \frac{1}{M (M - 1)} \sum_{a \ne b} (x - d_a) \cdot (y - d_b), $$

which has no bias, where the mean of the others would be off by their own
distance from the centre.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from modelstock_jax import merging
from modelstock_jax.report import merges

LEAST = 4  # models: a pair, and two others that locate the centre


class Gram(NamedTuple):
  """Inner products of the displacements of N models, layer by layer.

  Attributes:
    layers: L of them, as CLIP's, one for each group that shares a cosine.
    places: along the depth, see `merges.Merges`.
    products: float64[L, N, N].
  """

  layers: list[merges.Layer]
  places: list[str]
  products: np.ndarray

  def mixture(self, chosen: Sequence[int], kind: str) -> np.ndarray:
    """Return the average of models, or their merge, as shares of displacements.

    Args:
      chosen: indices of n of the models.
      kind: 'averages', or 'merges' for Model Stock of them.

    Returns:
      float64[L, N]; the anchor has the remaining share, up to one.

    >>> gram = Gram([], [], np.array([[[1.0, 0.5], [0.5, 1.0]]]))
    >>> gram.mixture([0, 1], 'merges').round(3)
    array([[0.333, 0.333]])
    """
    chosen, number = list(chosen), len(chosen)
    shares = np.zeros(self.products.shape[:2])
    shares[:, chosen] = 1 / number
    if kind == 'averages':
      return shares
    # What has not moved has no angle, and counts as orthogonal.
    inner = self.products[:, chosen][:, :, chosen]
    mean = np.nan_to_num(cosines(inner)).mean(axis=1).clip(0, 1)
    return shares * (number * mean / (1 + (number - 1) * mean))[:, None]


def by_path(tree: Any) -> dict[str, Any]:
  """Return the leaves of a tree by their paths."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {merging.path_name(path): leaf for path, leaf in leaves}


def measure(anchor: Any, models: Sequence[Any]) -> Gram:
  """Return inner products of displacements, all of them in float64.

  Where models agree to six digits, as the biases of a head do, differences of
  these products would be lost in float32.

  Args:
    anchor: w_0, a tree with the paths of CLIP.
    models: N trees like it.

  Returns:
    A `Gram`.

  >>> anchor = {'head': {'bias': np.zeros(2)}}
  >>> models = [{'head': {'bias': np.array(b)}} for b in ([3, 4], [0, 1])]
  >>> measure(anchor, models).products.tolist()
  [[[25.0, 4.0], [4.0, 1.0]]]
  """
  trees = [by_path(tree) for tree in (anchor, *models)]
  groups, layers, places = merges.group_layers(list(trees[0]))
  products = []
  for paths in groups.values():
    rows = [
      np.concatenate([np.ravel(tree[path]) for path in paths], dtype=np.float64)
      for tree in trees
    ]
    steps = np.stack(rows[1:]) - rows[0]
    products.append(steps @ steps.T)
  return Gram(layers, places, np.stack(products))


def product(products: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Return the inner product of two points given as shares of displacements.

  Args:
    products: float64[..., N, N], inner products of displacements.
    x: float64[N] or [..., N].
    y: float64[N] or [..., N].

  Returns:
    float64[...].
  """
  return np.einsum('...i,...ij,...j->...', x, products, y)


def from_centre(
  products: np.ndarray, x: np.ndarray, y: np.ndarray, others: np.ndarray
) -> np.ndarray:
  """Estimate (x - mu) . (y - mu), with the centre located by other models.

  Args:
    products: float64[..., N, N], inner products of displacements.
    x: float64[N] or [..., N], a point.
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
    product(products, x, y)
    - product(products, x, mean)
    - product(products, y, mean)
    + apart
  )


def squared_radii(products: np.ndarray) -> np.ndarray:
  """Estimate |w_i - mu|^2 of each model: float64[L, N] of [L, N, N]."""
  one = np.eye(products.shape[-1])
  squares = [from_centre(products, w, w, w == 0) for w in one]
  return np.stack(squares, axis=1)


def cosine(dot: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Return dot / sqrt(left * right), NaN where one of these is not positive."""
  norms = np.sqrt(np.where((left > 0) & (right > 0), left * right, np.nan))
  return dot / norms


def cosines(products: np.ndarray) -> np.ndarray:
  """Return the cosines between displacements.

  Args:
    products: float64[L, N, N], see `Gram`.

  Returns:
    float64[L, P] of P = N(N-1)/2 pairs (i, j) with i < j; NaN where a model of
    the pair has not moved.
  """
  i, j = np.triu_indices(products.shape[-1], 1)
  return cosine(products[:, i, j], products[:, i, i], products[:, j, j])
