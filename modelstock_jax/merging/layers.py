"""Layers: which leaves are measured as one, and their inner products."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp

from modelstock_jax.merging import differences
from modelstock_jax.merging import geometry
from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import options as options_lib
from modelstock_jax.merging import trees

PyTree = trees.PyTree


class Layer(NamedTuple):
  """The layer of one leaf, for `model_stock(layers=...)`.

  Attributes:
    group: leaves of one group share a cosine, as if they were one tensor
      (query, key and value kernels); None is a layer of its own.
    axes: axes of the leaf that hold separate layers (the first axis of a
      scan-over-layers stack), each of which gets its own cosine.
    filter_axis: the axis of output units, for `unit='filter'`; the last in
      Flax and Haiku kernels, the first in Equinox and PyTorch weights.
  """

  group: str | None = None
  axes: tuple[int, ...] = ()
  filter_axis: int = -1


# Maps each leaf to its layer: ('block_0/query/kernel', leaf) -> Layer.
Layers = Callable[[str, Any], Layer | None]


def displacement_gram(
  anchor: PyTree,
  models: Sequence[PyTree] | PyTree,
  *,
  stacked: bool = False,
  layers: Layers | None = None,
  unit: options_lib.Unit = 'layer',
) -> PyTree:
  r"""Compute all inner products of displacements, layer by layer.

  $$ G_{ij} = (w_i - w_0) \cdot (w_j - w_0) $$

  What `model_stock` and `yoyo_scale` are made of: norms are
  $\sqrt{G_{ii}}$, cosines $G_{ij} / \sqrt{G_{ii} G_{jj}}$, distances between
  models $\sqrt{G_{ii} + G_{jj} - 2 G_{ij}}$.

  Args:
    anchor: w_0, a tree of arrays.
    models: a sequence of N >= 2 trees like the anchor, or, with `stacked`,
      one tree whose leaves are `[N, ...]`.
    stacked: True if `models` is one stacked tree.
    layers: grouping of leaves into layers, see `model_stock`.
    unit: 'layer', 'filter' or 'model'.

  Returns:
    The anchor's structure with `[N, N]` matrices, float32 (float64 for float64
    leaves), led by the axes of the leaf that hold separate layers or filters.
    The leaves of one group all hold the sum over the group. None for a leaf
    that is not floating point.

  Raises:
    ValueError: as `model_stock`.

  >>> import jax.numpy as jnp
  >>> models = [{'w': jnp.array([1.0, 0.0])}, {'w': jnp.array([1.0, 2.0])}]
  >>> displacement_gram({'w': jnp.zeros(2)}, models)['w'].tolist()
  [[1.0, 1.0], [1.0, 5.0]]
  """
  options = options_lib.StockOptions(unit)
  family, static = prepare(anchor, models, stacked, layers, options)
  return family.tree(_matrices(*family.arrays(), static=static))


class Unit(NamedTuple):
  """Group and separate axes of one leaf; hashable, a static argument."""

  group: str | int  # leaves of equal group add their inner products
  keep: tuple[int, ...]  # axes with a cosine for every index


class Static(NamedTuple):
  """Static argument of the compiled programs: how all leaves are measured."""

  options: options_lib.StockOptions
  units: tuple[Unit, ...]  # one a floating leaf
  num_models: int
  stacked: bool


def prepare(
  anchor: PyTree,
  models: Sequence[PyTree] | PyTree,
  stacked: bool,
  layers: Layers | None,
  options: options_lib.StockOptions,
) -> tuple[trees.Family, Static]:
  """Check everything that can be wrong, before anything is computed."""
  family = trees.align(anchor, models, stacked=stacked)
  units = units_of(family, layers, options.unit)
  return family, Static(options, units, family.num_models, stacked)


def units_of(
  family: trees.Family, layers: Layers | None, unit: str
) -> tuple[Unit, ...]:
  """Return the unit of each floating leaf, which must not be a shard."""
  differences.check_complete(family.floats(family.paths), family.named())
  units, members = [], []
  for i in family.floating:
    path, leaf = family.paths[i], family.anchor[i]
    layer = (layers(path, leaf) if layers else None) or Layer()
    if not isinstance(layer, Layer):
      raise ValueError(
        f'{path}: layers must return a ms.Layer or None, got {layer!r}.'
      )
    axes = tuple(sorted(_axis(path, leaf, a) for a in layer.axes))
    if unit == 'model':
      units.append(Unit('', ()))
    elif unit == 'filter' and leaf.ndim - len(axes) >= 2:
      filters = _axis(path, leaf, layer.filter_axis)
      # Output units are units of their own: a group has nothing to share.
      units.append(Unit(i, tuple(sorted({*axes, filters}))))
    else:
      units.append(Unit(i if layer.group is None else layer.group, axes))
    group, keep = units[-1]
    members.append((path, group, tuple(leaf.shape[a] for a in keep)))
  check_groups(members, 'shape of layers')
  return tuple(units)


def _axis(path: str, leaf: Any, axis: int) -> int:
  if not -leaf.ndim <= axis < leaf.ndim:
    raise ValueError(
      f'{path}: layers names axis {axis}, but the shape is {leaf.shape}.'
    )
  return axis % leaf.ndim


def check_groups(members: Iterable[tuple[str, Any, Any]], noun: str) -> None:
  """Raise ValueError unless the leaves of each group have the same size.

  Args:
    members: path, group and size of each leaf.
    noun: name of the sizes in errors.
  """
  first: dict[Any, tuple[str, Any]] = {}
  for path, group, size in members:
    other, expected = first.setdefault(group, (path, size))
    if size != expected:
      raise ValueError(
        f'{path}: in one group with {other}, but its {noun} is {size}, that '
        f'of {other} is {expected}.'
      )


def grams(
  anchors, models, static: Static
) -> dict[Any, tuple[jax.Array, jax.Array]]:
  """Compute inner products of displacements that do not under- or overflow.

  Returns:
    For each group `[..., N, N]` inner products of s_i d_i, and `[..., N]` s_i:
    1, or the power of two that keeps the square of d_i within float32.
  """
  groups = dict.fromkeys(unit.group for unit in static.units)
  measure = functools.partial(_sum, anchors, models, static)
  rows = [(gram, *geometry.rescale(gram)) for gram in map(measure, groups)]
  kept = [(gram, jnp.ones_like(scales)) for gram, scales, _ in rows]

  def rescaled():
    # Of all leaves only these are read again; those that nobody moved, too.
    return [
      jax.lax.cond(
        needed, lambda g=group, s=scales: (measure(g, s), s), lambda p=pair: p
      )
      for group, (_, scales, needed), pair in zip(
        groups, rows, kept, strict=True
      )
    ]

  any_needed = jnp.any(jnp.array([needed for *_, needed in rows], bool))
  pairs = jax.lax.cond(any_needed, rescaled, lambda: kept)
  return dict(zip(groups, pairs, strict=True))


def _sum(anchors, models, static: Static, group, scales=None) -> jax.Array:
  """Compute the inner products of a group, with `scales` of `geometry.gram`."""
  measured = [
    geometry.gram(
      anchor,
      column,
      num_models=static.num_models,
      keep=unit.keep,
      scales=scales,
    )
    for anchor, column, unit in zip(
      anchors, columns(models, static), static.units, strict=True
    )
    if unit.group == group
  ]

  def add(total, gram):
    # float64 leaves may share a group with float32 ones.
    dtype = leaves_lib.wide(total.dtype, gram.dtype)
    return total.astype(dtype) + gram.astype(dtype)

  return functools.reduce(add, measured)


def unscaled(
  gram: jax.Array, scales: jax.Array, to: jax.Array | float = 1.0
) -> jax.Array:
  """Return inner products whose displacements have the scales `to`."""
  factors = to / scales
  return gram * factors[..., None] * factors[..., None, :]


@functools.partial(jax.jit, static_argnames='static')
def _matrices(anchors, models, *, static):
  """Compute the Gram matrix of each leaf's group: `[..., N, N]`."""
  groups = grams(anchors, models, static)
  return [unscaled(*groups[unit.group]) for unit in static.units]


def columns(models, static: Static):
  """Return for each leaf the values of all models, indexed by model."""
  return models[0] if static.stacked else list(zip(*models, strict=True))


def spread(value, leaf, keep: tuple[int, ...], dtype) -> jax.Array:
  """Broadcast a value for each index of the axes `keep` to a leaf's shape."""
  others = tuple(a for a in range(leaf.ndim) if a not in keep)
  value = jnp.expand_dims(value.astype(dtype), others)
  return jnp.broadcast_to(value, leaf.shape)
