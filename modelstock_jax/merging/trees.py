"""Trees of models: compared, stacked and unstacked."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.merging import differences
from modelstock_jax.merging import leaves as leaves_lib

PyTree = Any


class Family(NamedTuple):
  """An anchor and its models, flattened to one order of leaves."""

  paths: list[str]  # 'block_0/attention/kernel'
  names: list[str]  # 'the anchor', 'model 0', ... or 'the stack'
  treedef: Any  # the anchor's
  anchor: list[Any]  # one leaf a path
  models: list[list[Any]]  # N lists of leaves, or one list of stacked leaves
  num_models: int
  floating: list[int]  # indices of the leaves that can be averaged
  agreed: list[Any]  # one model's leaves; of stacked floating ones the shape

  def floats(self, leaves: Sequence[Any]) -> list[Any]:
    """Return those of all `leaves` that can be averaged."""
    return [leaves[i] for i in self.floating]

  def arrays(self) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    """Return the floating leaves of the anchor and of `models`."""
    return self.floats(self.anchor), list(map(self.floats, self.models))

  def named(self) -> dict[str, list[Any]]:
    """Return the floating leaves of each tree by its name."""
    trees = (self.anchor, *self.models)
    return dict(zip(self.names, map(self.floats, trees), strict=True))

  def tree(
    self,
    leaves: Iterable[Any],
    rest: Sequence[Any] | None = None,
    indices: list[int] | None = None,
  ) -> PyTree:
    """Return the anchor's tree of new leaves and of copies of others.

    Args:
      leaves: the new leaves.
      rest: all leaves, of which others are copied; None makes them None.
      indices: of the new leaves; None means those that are floating.
    """
    indices = self.floating if indices is None else indices
    rest = rest or [None] * len(self.paths)
    rest = fill(rest, indices, [None] * len(indices))
    # Copies, because the models may be donated after the merge.
    copies = list(map(leaves_lib.copy, rest))
    return self.treedef.unflatten(fill(copies, indices, leaves))


def fill(
  leaves: Sequence[Any], indices: list[int], values: Iterable[Any]
) -> list[Any]:
  """Return the leaves with the `values` at the `indices`."""
  filled = list(leaves)
  for i, value in zip(indices, values, strict=True):
    filled[i] = value
  return filled


def by_path(tree: PyTree) -> dict[str, float]:
  """Return the mean of each leaf on the host, by the name of its path."""
  return dict(leaf_means(tree))


def leaf_means(tree: PyTree) -> list[tuple[str, float]]:
  """Return name and mean of each leaf, on the host."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  values = [x if leaves_lib.is_local(x) else jnp.mean(x) for _, x in leaves]
  return [
    (leaves_lib.path_name(path), float(np.mean(value)))
    for (path, _), value in zip(leaves, jax.device_get(values), strict=True)
  ]


def first_of_stack(leaf: Any) -> Any:
  """Return the first model's value of a stacked leaf; of floats the shape."""
  if leaves_lib.is_floating(leaf):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return leaves_lib.take(leaf, 0)


def align(
  anchor: PyTree,
  models: Any,
  *,
  stacked: bool = False,
  least: int = 2,
  anchor_name: str = 'the anchor',
  any_float: bool = False,
) -> Family:
  """Flatten an anchor and its models, and check that they belong together.

  Args:
    anchor: a tree of arrays.
    models: a sequence of N trees of the anchor's paths, shapes and dtypes, or
      with `stacked` one tree of it whose leaves lead with N.
    stacked: True if `models` is one tree.
    least: number of models that are needed; two for an angle.
    anchor_name: name of the anchor in errors.
    any_float: True accepts models of another floating dtype.

  Returns:
    A `Family`, its floating leaves jax arrays in device memory.

  Raises:
    ValueError: naming every leaf that is a torch tensor, float64 without
      jax_enable_x64, missing, superfluous, of another
      shape or dtype, on another device, cut over other explicit mesh axes, or
      not floating point and unequal across models.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(anchor)
  expected = dict(leaves)
  if not expected:
    raise ValueError(f'anchor: the tree has no leaves, it is {anchor!r}.')
  if stacked:
    num_models = stack_size(models)
    _check_number(num_models, least)
    by_name = {'the stack': models}
  else:
    check_sequence(models, least)
    num_models = len(models)
    by_name = {f'model {i}': model for i, model in enumerate(models)}
  flat = {
    name: _like(expected, treedef, tree) for name, tree in by_name.items()
  }
  differences.check_kinds({anchor_name: expected, **flat})
  lead = (num_models,) if stacked else ()
  differences.check_structure(expected, flat, lead, anchor_name, any_float)
  is_floating = list(map(leaves_lib.is_floating, expected.values()))
  anchors, *models = (
    [
      leaves_lib.on_device(leaves[path]) if floats else leaves[path]
      for path, floats in zip(expected, is_floating, strict=True)
    ]
    for leaves in (expected, *flat.values())
  )
  family = Family(
    paths=list(map(leaves_lib.path_name, expected)),
    names=[anchor_name, *flat],
    treedef=treedef,
    anchor=anchors,
    models=models,
    num_models=num_models,
    floating=[i for i, floats in enumerate(is_floating) if floats],
    agreed=list(map(first_of_stack, models[0])) if stacked else models[0],
  )
  paths, named = family.floats(family.paths), family.named()
  differences.check_places(paths, named)
  differences.check_axes(paths, named, stacked)
  differences.check_values(
    [
      (path, column)
      for path, floats, *column in zip(
        family.paths, is_floating, *models, strict=True
      )
      if not floats
    ],
    num_models if stacked else 0,
  )
  return family


def _check_axes(stack: PyTree) -> None:
  """Raise where jax would, on taking a model out of the stack."""
  for leaf in filter(leaves_lib.is_array, jax.tree.leaves(stack)):
    # Of the mesh axes, only Explicit ones are in a type.
    sharding = getattr(jax.typeof(leaf), 'sharding', None)
    axis = next(iter(getattr(sharding, 'spec', None) or ()), None)
    if axis is not None:
      raise ValueError(
        'models: the stack is cut over models along the mesh axis '
        f'{axis!r}, which is Explicit, where jax cannot slice. Make the '
        'mesh with axis_types=(jax.sharding.AxisType.Auto,) * number of axes, '
        'or cut other axes of the leaves.'
      )


def stack(models: Sequence[PyTree]) -> PyTree:
  """Stack N models into one tree: what a sharded training step holds.

  Args:
    models: N >= 2 trees of equal structure, shapes and dtypes.

  Returns:
    A tree of the first model's structure whose array leaves `[...]` became
    `[N, ...]`. Leaves that are not arrays (an Equinox activation) must agree
    and are kept.

  Raises:
    ValueError: if the trees differ; all differing leaves are named.

  >>> import jax.numpy as jnp
  >>> stack([{'w': jnp.zeros(3)}, {'w': jnp.ones(3)}])['w'].shape
  (2, 3)
  """
  check_sequence(models, 2)
  family = align(models[0], models)
  leaves = [
    jnp.stack(list(map(leaves_lib.as_jax, column)))
    if leaves_lib.is_array(column[0])
    else column[0]
    for column in zip(*family.models, strict=True)
  ]
  return jax.tree.unflatten(family.treedef, leaves)


def unstack(stack: PyTree) -> list[PyTree]:
  """Split a stacked tree into its N models: the inverse of `stack`.

  Args:
    stack: a tree whose array leaves are `[N, ...]`.

  Returns:
    N trees whose array leaves are `[...]`.

  Raises:
    ValueError: if the leaves do not lead with one common N.

  >>> import jax.numpy as jnp
  >>> [float(m['w']) for m in unstack({'w': jnp.array([1.0, 2.0])})]
  [1.0, 2.0]
  """
  return [row(stack, i) for i in range(stack_size(stack))]


def row(stack: PyTree, i: int) -> PyTree:
  """Return model `i` of a stacked tree."""
  return jax.tree.map(lambda x: leaves_lib.take(x, i), stack)


def mean(column: Sequence[jax.Array] | jax.Array, num_models: int) -> jax.Array:
  """Average one leaf over models, in float32 or wider: `[...]`."""
  dtype = leaves_lib.wide(column[0].dtype)
  total = leaves_lib.widened(column, 0, dtype)
  for i in range(1, num_models):
    total = total + leaves_lib.widened(column, i, dtype)
  return total / num_models


def stack_size(stack: PyTree) -> int:
  """Return N of a stacked tree, the same in every array leaf."""
  _check_axes(stack)
  leaves = jax.tree_util.tree_flatten_with_path(stack)[0]
  shapes = [
    (leaves_lib.path_name(p), x.shape)
    for p, x in leaves
    if leaves_lib.is_array(x)
  ]
  if not shapes:
    raise ValueError('The stacked tree has no array leaves.')
  sizes = {tuple(shape[:1]) for _, shape in shapes}
  if len(sizes) > 1 or () in sizes:
    shown = '\n'.join(f'  {path}: {shape}' for path, shape in shapes[:20])
    raise ValueError(
      'The leaves of a stacked tree must lead with one number of models, '
      f'but their shapes are\n{shown}\nBuild it with `ms.stack([w1, w2])`.'
    )
  return sizes.pop()[0]


def _like(
  expected: Mapping[leaves_lib.Path, Any], treedef: Any, tree: PyTree
) -> dict[leaves_lib.Path, Any]:
  """Return the leaves of a tree that most often is like another, by path."""
  leaves, structure = jax.tree.flatten(tree)
  if structure == treedef:  # spares the paths, which take the longest
    return dict(zip(expected, leaves, strict=True))
  return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def check_sequence(models: Any, least: int) -> None:
  """Raise unless `models` is a sequence of enough models."""
  if not isinstance(models, Sequence) or isinstance(models, str):
    raise ValueError(
      f'models: a sequence of N >= {least} trees is needed, not '
      f'{type(models)}. A tree whose leaves are [N, ...] goes with '
      'stacked=True.'
    )
  _check_number(len(models), least)


def _check_number(number: int, least: int) -> None:
  if number < least:
    raise ValueError(
      f'models: at least {least} must be given, not {number}. To move one '
      'model towards its anchor use `ms.wise_ft(anchor, model, alpha=...)`.'
    )
