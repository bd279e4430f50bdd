"""Trees of models: compared, stacked and unstacked."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

PyTree = Any
Path = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it

_REMEDY = (
  'Load models that were fine-tuned from this anchor (the same head, the '
  'same dtype: `jax.tree.map(lambda x: x.astype(...), model)`), or take the '
  'leaf out of every tree.'
)


_ABSENT = object()


class Family(NamedTuple):
  """An anchor and its models, flattened to one order of leaves."""

  paths: list[str]  # 'block_0/attention/kernel'
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
    anchor, *models = (
      list(map(as_jax, self.floats(leaves)))
      for leaves in (self.anchor, *self.models)
    )
    return anchor, models

  def tree(
    self, leaves: Iterable[Any], rest: Sequence[Any] | None = None
  ) -> PyTree:
    """Return the anchor's tree: floating `leaves`, elsewhere `rest` or None."""
    rest = rest or [None] * len(self.paths)
    return self.treedef.unflatten(fill(rest, self.floating, leaves))


def fill(
  leaves: Sequence[Any], indices: list[int], values: Iterable[Any]
) -> list[Any]:
  """Return the leaves with the `values` at the `indices`."""
  filled = list(leaves)
  for i, value in zip(indices, values, strict=True):
    filled[i] = value
  return filled


def path_name(path: Path) -> str:
  """Return a key path of jax.tree_util as text, 'block_0/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def by_path(tree: PyTree) -> dict[str, float]:
  """Return the mean of each leaf on the host, by the name of its path."""
  leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
  return {path_name(path): float(np.mean(leaf)) for path, leaf in leaves}


def is_array(leaf: Any) -> bool:
  """Return True for what has a shape and a dtype (not a Python number)."""
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def form(leaf: Any, lead: int = 0) -> Any:
  """Return what leaves must share: the shape after `lead` axes, the dtype."""
  if is_array(leaf):
    return tuple(leaf.shape[lead:]), leaf.dtype
  return leaf is _ABSENT


def is_floating(leaf: Any) -> bool:
  """Return True for an array of real floating point numbers."""
  return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def as_jax(leaf: Any) -> jax.Array:
  """Return a jax array; `jnp.asarray` takes its time even with those."""
  return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def wide(*dtypes: Any) -> Any:
  """Return the dtype that reductions use: float64 if any is, else float32."""
  # Not `jnp.promote_types`, which refuses under strict dtype promotion.
  return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def first_of_stack(leaf: Any) -> Any:
  """Return the first model's value of a stacked leaf; of floats the shape."""
  if is_floating(leaf):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return leaf[0] if is_array(leaf) else leaf


def align(
  anchor: PyTree,
  models: Any,
  *,
  stacked: bool = False,
  least: int = 2,
  anchor_name: str = 'the anchor',
) -> Family:
  """Flatten an anchor and its models, and check that they belong together.

  Args:
    anchor: a tree of arrays.
    models: a sequence of N trees of the anchor's paths, shapes and dtypes, or
      with `stacked` one tree of it whose leaves lead with N.
    stacked: True if `models` is one tree.
    least: number of models that are needed; two for an angle.
    anchor_name: name of the anchor in errors.

  Returns:
    A `Family`.

  Raises:
    ValueError: naming every leaf that is missing, superfluous, of another
      shape or dtype, or not floating point and unequal across models.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(anchor)
  expected = dict(leaves)
  if not expected:
    raise ValueError(f'anchor: the tree has no leaves, it is {anchor!r}.')
  if stacked:
    _check_axes(models)
    num_models = stack_size(models)
    _check_number(num_models, least)
    by_name = {'the stack': models}
  else:
    check_sequence(models, least)
    num_models = len(models)
    by_name = {f'model {i}': model for i, model in enumerate(models)}
  flat = {
    name: dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    for name, tree in by_name.items()
  }
  lead = (num_models,) if stacked else ()
  _raise(_differences(expected, flat, lead, anchor_name))
  models = [[leaves[path] for path in expected] for leaves in flat.values()]
  anchors = list(expected.values())
  family = Family(
    paths=list(map(path_name, expected)),
    treedef=treedef,
    anchor=anchors,
    models=models,
    num_models=num_models,
    floating=[i for i, leaf in enumerate(anchors) if is_floating(leaf)],
    agreed=list(map(first_of_stack, models[0])) if stacked else models[0],
  )
  _raise(_disagreements(family, stacked))
  return family


def _check_axes(stack: PyTree) -> None:
  """Raise where jax would, on taking a model out of the stack."""
  for leaf in filter(is_array, jax.tree.leaves(stack)):
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
    jnp.stack([jnp.asarray(leaf) for leaf in column])
    if is_array(column[0])
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
  return jax.tree.map(lambda x: x[i] if is_array(x) else x, stack)


def is_tracer(leaf: Any) -> bool:
  """Return True if the values of a leaf are not known yet (under jit)."""
  return isinstance(leaf, jax.core.Tracer)


def mean(column: Sequence[jax.Array] | jax.Array, num_models: int) -> jax.Array:
  """Average one leaf over models, in float32 or wider: `[...]`."""
  dtype = wide(column[0].dtype)
  total = column[0].astype(dtype)
  for i in range(1, num_models):
    total = total + column[i].astype(dtype)
  return total / num_models


def stack_size(stack: PyTree) -> int:
  """Return N of a stacked tree, the same in every array leaf."""
  leaves = jax.tree_util.tree_flatten_with_path(stack)[0]
  shapes = [(path_name(p), x.shape) for p, x in leaves if is_array(x)]
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


def _differences(
  expected: Mapping[Path, Any],
  models: Mapping[str, Mapping[Path, Any]],
  lead: tuple[int, ...],
  anchor_name: str,
) -> list[str]:
  """List where models differ from the anchor in paths, shapes or dtypes."""
  problems = []
  for name, leaves in models.items():
    for path in {**expected, **leaves}:
      anchor, leaf = expected.get(path, _ABSENT), leaves.get(path, _ABSENT)
      if form(anchor) == form(leaf, len(lead)):
        continue
      text = (
        f'{path_name(path)}: {anchor_name} has {_shown(anchor)}, {name} has '
        f'{_shown(leaf)}'
      )
      if lead and is_array(anchor) and is_array(leaf):
        text += f', not {anchor.dtype}{[*lead, *anchor.shape]}'
      problems.append(text)
  return problems


def _disagreements(family: Family, stacked: bool) -> list[str]:
  """List leaves that are not averaged and differ between models."""
  problems = []
  for path, anchor, *column in zip(
    family.paths, family.anchor, *family.models, strict=True
  ):
    if is_floating(anchor) or any(map(is_tracer, column)):
      continue
    if stacked and is_array(anchor):
      column = [column[0][m] for m in range(family.num_models)]
    first, *rest = values = list(map(_comparable, column))
    if not all(v is first or np.array_equal(v, first) for v in rest):
      kind = anchor.dtype if is_array(anchor) else type(anchor).__name__
      shown = ' and '.join(repr(value)[:60] for value in values[:3])
      problems.append(
        f'{path}: {kind} is not averaged, and the models disagree: {shown}'
      )
  return problems


def _comparable(leaf: Any) -> Any:
  if not is_array(leaf):
    return leaf
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def _shown(leaf: Any) -> str:
  if leaf is _ABSENT:
    return 'no such leaf'
  if is_array(leaf):
    return f'{leaf.dtype}{list(leaf.shape)}'
  return f'{type(leaf).__name__} {leaf!r}'[:60]


def _raise(problems: list[str]) -> None:
  if problems:
    shown = '\n  '.join(problems)
    raise ValueError(
      f'The trees differ in {len(problems)} places:\n  {shown}\n{_REMEDY}'
    )
