"""MonoSoup: one model, its displacements split by their singular values."""

import functools
import itertools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp

from modelstock_jax.merging import layers as layers_lib
from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import trees

PyTree = trees.PyTree


class Mono(NamedTuple):
  """Result of `mono_soup`.

  Attributes:
    params: the edited weights, structure and dtypes of the anchor.
    low: for each leaf the coefficient of its low part, float32, shaped as its
      separate layers; that of the high part is 1 - low. None for leaves that
      are the model's: of fewer than two axes, or not floating point.
    rank: as `low`, int32, the number of singular directions in the high part.
  """

  params: PyTree
  low: PyTree
  rank: PyTree


def mono_soup(
  anchor: PyTree, model: PyTree, *, layers: layers_lib.Layers | None = None
) -> Mono:
  r"""Keep main directions of a displacement, shrink the rest: MonoSoup.

  For each leaf the displacement $\Delta = w_1 - w_0$ as a matrix has singular
  values $\sigma_1 \ge \sigma_2 \ge \dots$ With
  $p_i = \sigma_i / \sum_j \sigma_j$, the effective rank
  $k = \lceil \exp(-\sum_i p_i \log p_i) \rceil$ parts it into the best
  approximation of rank k and a rest, $\Delta = \Delta_{high} + \Delta_{low}$,

  $$ w = w_0 + (1 - \lambda) \Delta_{high} + \lambda \Delta_{low}, \qquad
     \lambda = \rho + (1 - \rho) \sqrt{1 - P}, $$

  where $P = \sum_{i \le k} \sigma_i^2 / \sum_i \sigma_i^2$ and
  $\rho = (\sigma_{k+1} / \sigma_1)^2$, 0 where k is the full rank.

  Singular values need complete matrices: sharded weights are gathered.

  Args:
    anchor: w_0, a tree of arrays.
    model: w_1, one fine-tuned model, a tree like it.
    layers: see `model_stock`. The leaves of one `group` are one matrix, joined
      along their output axes (query, key and value, as in PyTorch); `axes` hold
      separate matrices; `filter_axis` is the output axis of a kernel with more
      than two, all its others being inputs.

  Returns:
    `Mono(params, low, rank)`, computed in float32 (float64 for float64
    leaves). Leaves of fewer than two axes (biases, scales), and what did not
    move, are the model's.

  Raises:
    ValueError: if the trees differ (all differing leaves are named), or the
      leaves of a group do not make one matrix.

  Source: Abdollahpoorrostam et al. Model soups need only one ingredient. 2026,
  arXiv:2602.09689, and its program (the 'freevariance' version).

  >>> import jax.numpy as jnp
  >>> soup = mono_soup(jnp.zeros((2, 2)), jnp.diag(jnp.array([3.0, 0.0])))
  >>> int(soup.rank), float(soup.low)  # of rank one: nothing to shrink
  (1, 0.0)
  """
  family = trees.align(anchor, [model], least=1)
  matrices = _matrices(family, layers)
  leaves, indices = family.models[0], list(matrices)
  edited, low, rank = _edit(
    [family.anchor[i] for i in indices],
    [leaves[i] for i in indices],
    matrices=tuple(matrices.values()),
  )
  return Mono(
    family.tree(edited, leaves, indices),
    family.tree(low, indices=indices),
    family.tree(rank, indices=indices),
  )


class _Matrix(NamedTuple):
  """Layout of a leaf as a matrix; hashable, a static argument."""

  group: str | int  # leaves of equal group are one, side by side
  keep: tuple[int, ...]  # axes with a matrix for every index
  outputs: int  # the axis of columns; the others are rows

  @property
  def moves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes that become the first and the last ones, and their new places."""
    return (*self.keep, self.outputs), (*range(len(self.keep)), -1)


def _matrices(
  family: trees.Family, layers: layers_lib.Layers | None
) -> dict[int, _Matrix]:
  """Return the matrix of each leaf that is one, by index of the leaf."""
  units = layers_lib.units_of(family, layers, 'layer')
  filters = layers_lib.units_of(family, layers, 'filter')
  matrices = {
    i: _Matrix(unit.group, unit.keep, *outputs)
    for i, unit, each in zip(family.floating, units, filters, strict=True)
    if (outputs := set(each.keep) - set(unit.keep))
  }
  # As many inputs each: else they cannot stand side by side.
  layers_lib.check_groups(
    (
      (family.paths[i], matrix.group, _inputs(family.anchor[i], matrix))
      for i, matrix in matrices.items()
    ),
    'number of inputs',
  )
  return matrices


def _inputs(leaf: Any, matrix: _Matrix) -> int:
  axes, _ = matrix.moves
  return math.prod(n for a, n in enumerate(leaf.shape) if a not in axes)


@functools.partial(jax.jit, static_argnames='matrices')
def _edit(anchors, models, *, matrices):
  """Compute the edited leaves, their low coefficients and their ranks."""
  groups: dict[Any, list[int]] = {}
  for i, matrix in enumerate(matrices):
    groups.setdefault(matrix.group, []).append(i)
  edited: list[Any] = [None] * len(matrices)
  lows, ranks = [*edited], [*edited]
  for members in groups.values():
    dtype = leaves_lib.wide(*(anchors[i].dtype for i in members))
    parts = []
    for i in members:
      step = models[i].astype(dtype) - anchors[i].astype(dtype)
      parts.append(_as_matrix(_gathered(step), matrices[i]))
    steps, low, rank = _shrink(jnp.concatenate(parts, axis=-1))
    ends = list(itertools.accumulate(part.shape[-1] for part in parts))[:-1]
    for i, part in zip(members, jnp.split(steps, ends, axis=-1), strict=True):
      step = _as_leaf(part, anchors[i], matrices[i])
      edited[i] = (anchors[i].astype(dtype) + step).astype(anchors[i].dtype)
      lows[i], ranks[i] = low, rank
  return edited, lows, ranks


def _shrink(steps: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Compute edited displacements `[..., m, n]`, coefficients, ranks `[...]`."""
  u, values, v = jnp.linalg.svd(steps, full_matrices=False)
  count = values.shape[-1]
  # Scaled first: squares of short steps would underflow.
  largest = values[..., :1]
  scaled = values / jnp.where(largest == 0, 1, largest)
  total = jnp.sum(scaled, axis=-1, keepdims=True)
  shares = scaled / jnp.where(total == 0, 1, total)
  logs = jnp.log(jnp.where(shares == 0, 1, shares))
  entropy = -jnp.sum(shares * logs, axis=-1)
  rank = jnp.clip(jnp.ceil(jnp.exp(entropy)), 1, count).astype(jnp.int32)
  index = jnp.arange(count).reshape((1,) * rank.ndim + (count,))
  high = index < rank[..., None]
  energy = scaled**2
  total_energy = jnp.sum(energy, axis=-1)
  # 1 - P as a sum: the difference would leave rounding under the root.
  rest = jnp.sum(jnp.where(high, 0, energy), axis=-1)
  rest = rest / jnp.where(total_energy == 0, 1, total_energy)
  rho = jnp.sum(jnp.where(index == rank[..., None], energy, 0), axis=-1)
  low = rho + (1 - rho) * jnp.sqrt(rest)
  main = jnp.matmul(
    u * jnp.where(high, values, 0)[..., None, :],
    v,
    precision=jax.lax.Precision.HIGHEST,
  )
  share = low[..., None, None]
  return (1 - share) * main + share * (steps - main), low, rank


def _gathered(leaf: jax.Array) -> jax.Array:
  """Return a leaf that is not cut over explicit axes, where jax has no SVD."""
  sharding = jax.typeof(leaf).sharding
  if not any(sharding.spec):
    return leaf
  return jax.sharding.reshard(leaf, sharding.update(spec=jax.P()))


def _as_matrix(leaf: jax.Array, matrix: _Matrix) -> jax.Array:
  """Return a leaf as `[*kept, inputs, outputs]`."""
  leaf = jnp.moveaxis(leaf, *matrix.moves)
  kept = leaf.shape[: len(matrix.keep)]
  return leaf.reshape(*kept, -1, leaf.shape[-1])


def _as_leaf(steps: jax.Array, leaf: jax.Array, matrix: _Matrix) -> jax.Array:
  """Invert `_as_matrix`, for a leaf like another."""
  axes, ends = matrix.moves
  shape = jnp.moveaxis(leaf, axes, ends).shape
  return jnp.moveaxis(steps.reshape(shape), ends, axes)
