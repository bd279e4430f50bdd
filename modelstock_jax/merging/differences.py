"""Differences between trees of models, listed at once before any is merged."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import operator
import reprlib
import types
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.merging import leaves as leaves_lib

_LOAD = (
  'Load models that were fine-tuned from this anchor, with the same head; give '
  'all trees one dtype, `jax.tree.map(lambda x: x.astype(...), tree)` (the '
  "models' float32 rather than an anchor's float64); or take the leaf out of "
  'every tree.'
)
_NUMPY = (
  'Give torch tensors as numpy arrays: `jax.tree.map(lambda x: '
  'x.detach().cpu().float().numpy(), state_dict)`.'
)
_X64 = (
  'jax would compute float64 in float32. Cast the leaves of every tree, '
  "`x.astype('float32')`, or allow float64 at the start: "
  "`jax.config.update('jax_enable_x64', True)`."
)
_AGREE = (
  'Give all trees one value, or take the leaf out of every tree (in Equinox '
  '`eqx.partition(model, eqx.is_inexact_array)`, then `eqx.combine`).'
)
_MOVE = "Move them to the anchor's place: `jax.device_put(model, sharding)`."
_OUTSIDE = 'Merge outside of shard_map and pmap: `jax.jit` gathers nothing.'
_ABSENT = object()

# The leaves of each tree by its name, 'the anchor' or 'model 0'.
Named = Mapping[str, Sequence[Any]]


def check_kinds(trees: Mapping[str, Mapping[leaves_lib.Path, Any]]) -> None:
  """Raise where leaves are torch tensors, or float64 that jax would narrow."""
  narrow = jax.dtypes.canonicalize_dtype(np.float64) != np.float64
  torch, wide = [], []
  for name, leaves in trees.items():
    for path, leaf in leaves.items():
      if type(leaf).__module__.partition('.')[0] == 'torch':
        torch.append(f'{leaves_lib.path_name(path)} of {name}')
      elif narrow and getattr(leaf, 'dtype', None) == np.float64:
        wide.append(f'{leaves_lib.path_name(path)} of {name}')
  _raise(torch, _NUMPY, 'There are torch tensors in')
  _raise(wide, _X64, 'There is float64, without jax_enable_x64, in')


def check_structure(
  expected: Mapping[leaves_lib.Path, Any],
  models: Mapping[str, Mapping[leaves_lib.Path, Any]],
  lead: tuple[int, ...],
  anchor_name: str,
  any_float: bool,
) -> None:
  """Raise where models differ from the anchor in paths, shapes or dtypes.

  Args:
    expected: leaves of the anchor by path.
    models: the same of each model or of the stack, by its name.
    lead: (N,) of a stack, else ().
    anchor_name: name of the anchor in errors.
    any_float: accept any floating dtype for a floating leaf of the anchor.
  """
  problems = []
  for name, leaves in models.items():
    pairs = [(p, x, leaves.get(p, _ABSENT)) for p, x in expected.items()]
    pairs += [(p, _ABSENT, x) for p, x in leaves.items() if p not in expected]
    for path, anchor, leaf in pairs:
      if _fits(anchor, leaf, lead, any_float):
        continue
      text = (
        f'{leaves_lib.path_name(path)}: {anchor_name} has {_shown(anchor)}, '
        f'{name} has {_shown(leaf)}'
      )
      if lead and leaves_lib.is_array(anchor) and leaves_lib.is_array(leaf):
        text += f', not {anchor.dtype}{[*lead, *anchor.shape]}'
      problems.append(text)
  _raise(problems, _LOAD)


def _fits(
  anchor: Any, leaf: Any, lead: tuple[int, ...], any_float: bool
) -> bool:
  if leaves_lib.is_array(anchor) and leaves_lib.is_array(leaf):
    alike = leaf.dtype == anchor.dtype or (
      any_float and all(map(leaves_lib.is_floating, (anchor, leaf)))
    )
    return alike and tuple(leaf.shape) == (*lead, *anchor.shape)
  if anchor is _ABSENT or leaf is _ABSENT:
    return False
  return not leaves_lib.is_array(anchor) and not leaves_lib.is_array(leaf)


def _shown(leaf: Any) -> str:
  if leaf is _ABSENT:
    return 'no such leaf'
  if leaves_lib.is_array(leaf):
    return f'{leaf.dtype}{list(leaf.shape)}'
  return f'{type(leaf).__name__} {leaf!r}'[:60]


def check_places(paths: Sequence[str], trees: Named) -> None:
  """Raise where leaves lie on other devices than the first one."""
  first, problems = None, []
  for name, leaves in trees.items():
    for path, leaf in zip(paths, leaves, strict=True):
      if devices := leaves_lib.devices(leaf):
        ids = reprlib.repr([device.id for device in devices])
        first = first or (devices, f'{ids} as {path} of {name}')
        if devices != first[0]:
          where = f'the {devices[0].platform} devices {ids}'
          problems.append(f'{path}: {name} is on {where}, not {first[1]}')
  _raise(problems, _MOVE)


def check_axes(paths: Sequence[str], trees: Named, stacked: bool) -> None:
  """Raise where leaves are cut differently over explicit mesh axes."""

  def add(total, model):
    return total + (model[0] if stacked else model).astype(total.dtype)

  problems = []
  for path, anchor, *models in zip(paths, *trees.values(), strict=True):
    kinds = list(map(jax.typeof, (anchor, *models)))
    if any(any(kind.sharding.spec) for kind in kinds):
      try:
        jax.eval_shape(functools.partial(functools.reduce, add), models, anchor)
      except Exception:  # of which class depends on the version of jax
        on = [f'{kind} on {dict(kind.sharding.mesh.shape)}' for kind in kinds]
        shown = ', '.join(map('{} is {}'.format, trees, on))
        problems.append(f'{path}: cut over explicit mesh axes, {shown}')
  _raise(problems, _MOVE)


def check_complete(paths: Sequence[str], trees: Named) -> None:
  """Raise where leaves are shards, as inside `shard_map`: norms are local."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = frozenset(a for a in mesh.manual_axes if mesh.shape[a] > 1)
  if not axes:
    return
  # Types do not say it with check_vma=False, nor in pmap.
  known = all(leaves_lib.varying(jax.lax.axis_index(a)) for a in axes)
  problems = [
    f'{path}: {name} may be a shard, it varies over mesh axes {sorted(over)}'
    for name, leaves in trees.items()
    for path, leaf in zip(paths, leaves, strict=True)
    if (over := axes & leaves_lib.varying(leaf) if known else axes)
  ]
  _raise(problems, _OUTSIDE)


def check_values(
  columns: Iterable[tuple[str, Sequence[Any]]], stack_size: int
) -> None:
  """Raise where leaves that are not averaged differ between models.

  Args:
    columns: the name and the values of each leaf, one a model, or one of a
      stack.
    stack_size: number of models in a stack, else 0.
  """
  problems = []
  for path, column in columns:
    leaf = column[0]
    if any(map(leaves_lib.is_tracer, column)):
      continue
    models = [leaves_lib.take(leaf, i) for i in range(stack_size)] or column
    first, *rest = values = list(map(_comparable, models))
    if not all(_same(first, value) for value in rest):
      kind = getattr(leaf, 'dtype', type(leaf).__name__)
      shown = ' and '.join(repr(value)[:60] for value in values[:3])
      problems.append(
        f'{path}: {kind} is not averaged, and the models disagree: {shown}'
      )
  _raise(problems, _AGREE)


def _comparable(leaf: Any) -> Any:
  """Return an array on the host, if this process can have all of it."""
  if not leaves_lib.is_array(leaf):
    return leaf
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(jax.device_get(leaf)) if leaves_lib.is_local(leaf) else leaf


# What a function does, as far as that can be compared.
_behaviour = operator.attrgetter(
  *('__code__', '__globals__', '__defaults__', '__kwdefaults__', '__closure__')
)


def _same(left: Any, right: Any) -> bool:
  """Return True for equal values, partials, stateless objects and lambdas."""
  if isinstance(left, jax.Array) or isinstance(right, jax.Array):
    return bool(jax.device_get(jnp.array_equal(left, right)))
  if left is right or np.array_equal(left, right):
    return True
  try:
    if isinstance(left, types.FunctionType):
      return _behaviour(left) == _behaviour(right)
    return left.__reduce_ex__(2) == right.__reduce_ex__(2)
  except Exception:  # not comparable, by whatever error of its class
    return False


def _raise(
  problems: list[str], remedy: str, what: str = 'The trees differ in'
) -> None:
  if problems:
    shown = '\n  '.join(problems)
    raise ValueError(f'{what} {len(problems)} places:\n  {shown}\n{remedy}')
