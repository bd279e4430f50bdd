"""YOYO-Scale: a coefficient for each model, from the Gram matrix."""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import NamedTuple

import jax
from jax import numpy as jnp

from modelstock_jax.merging import geometry
from modelstock_jax.merging import layers as layers_lib
from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import options as options_lib
from modelstock_jax.merging import trees

PyTree = trees.PyTree

# Of projected gradients; the error falls at least as 1 / STEPS^2, and as
# exp(-STEPS / sqrt(condition of G)) where that is less.
STEPS = 1000


class Scaled(NamedTuple):
  """Result of `yoyo_scale`.

  Attributes:
    params: the merged weights, structure and dtypes of the anchor.
    coefficients: for each leaf `[N]` float32, lambda of each model, led by the
      axes of the leaf that hold separate layers or filters. None for a leaf
      that is not floating point.
  """

  params: PyTree
  coefficients: PyTree


def yoyo_scale(
  anchor: PyTree,
  models: Sequence[PyTree] | PyTree,
  *,
  stacked: bool = False,
  layers: layers_lib.Layers | None = None,
  unit: options_lib.Unit = 'layer',
) -> Scaled:
  r"""Merge displacements of unequal norms and angles: YOYO-Scale.

  For each layer, with $G_{ij} = d_i \cdot d_j$ of the displacements,

  $$ w = w_0 + \sum_i \lambda_i d_i, \qquad
     \lambda = \arg\min_{\lambda \ge 0,\ \sum \lambda_i \le 1}
     \tfrac12 \lambda^T G \lambda - b^T \lambda, \qquad
     b_i = \frac{1}{N - 1} \sum_{j \ne i} G_{ij}. $$

  This is the point of the hull of the anchor and the models nearest to the
  centre $\mu$ of all fine-tuned weights, if $d_i \cdot (\mu - w_0)$ is what
  other models say it is: noise is independent from model to model, so it
  shows in $G_{ii}$ alone. Models with less noise get larger coefficients.
  With equal norms and angles every $\lambda_i$ is t / N of `model_stock`.

  Args:
    anchor: see `model_stock`, as all others.
    models: N >= 2 trees, or one stacked tree.
    stacked: True if `models` is one tree.
    layers: grouping of leaves that share coefficients.
    unit: 'layer', 'filter' or 'model'.

  Returns:
    `Scaled(params, coefficients)`. A layer that no model moved, or one of two,
    stays the anchor; identical models are returned. Leaves that are not
    floating point must agree. NaN in a model makes its layer NaN.

  Raises:
    ValueError: as `model_stock`.

  Source: the README of github.com/andehury/YOYO-Scale (no paper). Its program
  adds 1e-12 to the diagonal of G and finds the minimum by active sets; here G
  is as it is, and the minimum found by accelerated projected gradients, begun
  at Model Stock's.

  >>> import jax.numpy as jnp
  >>> anchor = jnp.zeros(3)
  >>> models = [jnp.array([1.0, 1.0, 0.0]), jnp.array([1.0, 0.0, 3.0])]
  >>> merged = yoyo_scale(anchor, models)  # more of the shorter one
  >>> [round(float(x), 4) for x in merged.coefficients]
  [0.4737, 0.0526]
  """
  options = options_lib.StockOptions(unit)
  family, static = layers_lib.prepare(anchor, models, stacked, layers, options)
  merged, coefficients = _merge(*family.arrays(), static=static)
  return Scaled(family.tree(merged, family.agreed), family.tree(coefficients))


@functools.partial(jax.jit, static_argnames='static')
def _merge(anchors, models, *, static: layers_lib.Static):
  """Compute the merged leaves, and their coefficients `[..., N]`."""
  groups = layers_lib.grams(anchors, models, static)
  # One scale for all models, which shortens what none of them has.
  solved = _solve(
    [
      layers_lib.unscaled(gram, scales, jnp.min(scales, axis=-1, keepdims=True))
      for gram, scales in groups.values()
    ]
  )
  by_group = dict(zip(groups, solved, strict=True))
  coefficients = [by_group[unit.group] for unit in static.units]
  merged = [
    _combine(anchor, column, each, unit.keep)
    for anchor, column, each, unit in zip(
      anchors,
      layers_lib.columns(models, static),
      coefficients,
      static.units,
      strict=True,
    )
  ]
  return merged, coefficients


def _solve(matrices: list[jax.Array]) -> list[jax.Array]:
  """Compute the coefficients `[..., N]` of each Gram matrix."""
  num_models = matrices[0].shape[-1]
  starts = []
  for matrix in matrices:
    cosine = geometry.mean_cosine(matrix, 'cosine')
    ratio = geometry.interpolation_ratio(jnp.clip(cosine, 0, 1), num_models)
    starts.append(jnp.stack([ratio / num_models] * num_models, axis=-1))
  # All at once: a program of many short loops would take long to compile.
  dtype = leaves_lib.wide(*(matrix.dtype for matrix in matrices))

  def joined(arrays, *shape):
    rows = [array.reshape(-1, *shape).astype(dtype) for array in arrays]
    return jnp.concatenate(rows)

  solved = coefficients(
    joined(matrices, num_models, num_models), joined(starts, num_models)
  )
  sizes = [math.prod(start.shape[:-1]) for start in starts]
  parts = jnp.split(solved, list(itertools.accumulate(sizes))[:-1])
  return [
    part.reshape(start.shape).astype(start.dtype)
    for part, start in zip(parts, starts, strict=True)
  ]


def coefficients(matrices: jax.Array, start: jax.Array) -> jax.Array:
  """Minimise over the simplex with 0, by accelerated projected gradients.

  Args:
    matrices: `[K, N, N]` Gram matrices G.
    start: `[K, N]` feasible lambdas.

  Returns:
    `[K, N]` the lambdas.
  """
  num_models = matrices.shape[-1]
  norms = jnp.sum(jnp.where(jnp.eye(num_models, dtype=bool), matrices, 0), -1)
  target = (jnp.sum(matrices, axis=-1) - norms) / (num_models - 1)
  # The largest eigenvalue is at most the largest sum of a row.
  bound = jnp.max(jnp.sum(jnp.abs(matrices), axis=-1), axis=-1, keepdims=True)
  bound = jnp.where(bound == 0, 1, bound)
  # Scaled first: squares of short steps would underflow.
  matrices, target = matrices / bound[..., None], target / bound

  def gradient(x):
    return jnp.sum(matrices * x[:, None, :], axis=-1) - target

  def step(_, carry):
    x, ahead, momentum = carry
    new = _project(ahead - gradient(ahead))
    # Begun anew where it went too far (O'Donoghue, Candes 2015).
    back = jnp.sum((ahead - new) * (new - x), axis=-1, keepdims=True) > 0
    momentum = jnp.where(back, 1, momentum)
    following = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
    ahead = new + (momentum - 1) / following * (new - x)
    return new, ahead, following

  carry = start, start, jnp.ones_like(start[:, :1])
  return jax.lax.fori_loop(0, STEPS, step, carry)[0]


def _project(x: jax.Array) -> jax.Array:
  """Return the nearest points with x >= 0 and sum(x) <= 1: `[K, N]`."""
  inside = jnp.maximum(x, 0)
  # Else on the face sum(x) = 1: subtract what leaves a sum of 1.
  largest = -jnp.sort(-x, axis=-1)
  counts = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)[None]
  excess = (jnp.cumsum(largest, axis=-1) - 1) / counts
  kept = jnp.sum(largest > excess, axis=-1, keepdims=True)
  shift = jnp.take_along_axis(excess, jnp.maximum(kept, 1) - 1, axis=-1)
  total = jnp.sum(inside, axis=-1, keepdims=True)
  return jnp.where(total > 1, jnp.maximum(x - shift, 0), inside)


def _combine(anchor, column, coefficients, keep):
  """Compute (1 - sum(lambda)) w_0 + sum(lambda_i w_i), exact at the corners."""
  dtype = leaves_lib.wide(anchor.dtype)
  share = 1 - jnp.sum(coefficients, axis=-1)
  total = layers_lib.spread(share, anchor, keep, dtype) * anchor.astype(dtype)
  for i in range(coefficients.shape[-1]):
    share = layers_lib.spread(coefficients[..., i], anchor, keep, dtype)
    total = total + share * leaves_lib.widened(column, i, dtype)
  return total.astype(anchor.dtype)
