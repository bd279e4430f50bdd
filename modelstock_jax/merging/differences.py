"""Differences between trees of models, listed at once before any is merged."""

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
  'Load models that were fine-tuned from this anchor (the same head, the '
  'same dtype: `jax.tree.map(lambda x: x.astype(...), model)`), or take the '
  'leaf out of every tree.'
)
_AGREE = (
  'Give every tree the same value, or take the leaf out of every tree (in '
  'Equinox `eqx.partition(model, eqx.is_inexact_array)`, and `eqx.combine` '
  'after the merge).'
)
_MOVE = (
  'Move all trees to one place: `jax.device_put(model, sharding)`, with the '
  "sharding of the anchor's leaves."
)
_OUTSIDE = (
  'Merge outside of `jax.shard_map` and `jax.pmap`, under `jax.jit`: sharded '
  'arrays are not gathered there.'
)
_ABSENT = object()

# The leaves of each tree by its name, 'the anchor' or 'model 0'.
Named = Mapping[str, Sequence[Any]]


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
    floating = leaves_lib.is_floating(anchor) and leaves_lib.is_floating(leaf)
    return tuple(leaf.shape) == (*lead, *anchor.shape) and (
      leaf.dtype == anchor.dtype or (any_float and floating)
    )
  if anchor is _ABSENT or leaf is _ABSENT:
    return False
  return not leaves_lib.is_array(anchor) and not leaves_lib.is_array(leaf)


def _shown(leaf: Any) -> str:
  if leaf is _ABSENT:
    return 'no such leaf'
  if leaves_lib.is_array(leaf):
    return f'{leaf.dtype}{list(leaf.shape)}'
  return f'{type(leaf).__name__} {leaf!r}'[:60]


def check_places(
  paths: Sequence[str], trees: Named, *, together: bool = True
) -> None:
  """Raise where leaves lie on other devices than the first one.

  Args:
    paths: names of the leaves.
    trees: their values.
    together: True compares all leaves, False those of one path.
  """
  first, problems = {}, []
  for name, leaves in trees.items():
    for path, leaf in zip(paths, leaves, strict=True):
      if (devices := leaves_lib.devices(leaf)) is None:
        continue
      ids = reprlib.repr([device.id for device in devices])
      key = None if together else path
      seen = first.setdefault(key, (devices, f'{ids} as {path} of {name}'))
      if devices != seen[0]:
        where = f'the {devices[0].platform} devices {ids}'
        problems.append(f'{path}: {name} is on {where}, not {seen[1]}')
  _raise(problems, _MOVE)


def check_axes(paths: Sequence[str], trees: Named, stacked: bool) -> None:
  """Raise where leaves are cut differently over explicit mesh axes."""
  lead = 1 if stacked else 0

  def add(anchor, *models):
    models = [x[0] if stacked else x for x in models]
    models = [x.astype(anchor.dtype) for x in models]
    return functools.reduce(operator.add, models, anchor)

  problems = []
  for path, anchor, *models in zip(paths, *trees.values(), strict=True):
    kinds = list(map(jax.typeof, (anchor, *models)))
    cuts = [kinds[0].sharding.spec]
    cuts += [kind.sharding.spec[lead:] for kind in kinds[1:]]
    if not any(map(any, cuts)):
      continue
    try:
      jax.eval_shape(add, anchor, *models)
    except Exception:  # of which class depends on the version of jax
      pairs = zip(trees, kinds, strict=True)
      shown = ', '.join(
        f'{name} is {kind} on {dict(kind.sharding.mesh.shape)}'
        for name, kind in pairs
      )
      problems.append(f'{path}: cut over explicit mesh axes, {shown}')
  _raise(problems, _MOVE)


def check_complete(paths: Sequence[str], trees: Named) -> None:
  """Raise where leaves are shards, as inside `shard_map`: norms are local."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = frozenset(a for a in mesh.manual_axes if mesh.shape[a] > 1)
  if not axes:
    return
  # False with check_vma=False and in pmap, where types do not say it.
  known = all(leaves_lib.varying(jax.lax.axis_index(a)) for a in axes)
  problems = []
  for name, leaves in trees.items():
    for path, leaf in zip(paths, leaves, strict=True):
      if over := leaves_lib.varying(leaf) & axes if known else axes:
        verb = 'varies' if known else 'may vary (check_vma is off)'
        problems.append(
          f'{path}: {name} {verb} over the manual mesh axes {sorted(over)}, so '
          'that its cosine would be that of a shard'
        )
  _raise(problems, _OUTSIDE, 'The trees are cut into shards')


def check_values(
  paths: Sequence[str], columns: Sequence[Sequence[Any]]
) -> None:
  """Raise where leaves that are not averaged differ between models.

  Args:
    paths: names of the leaves.
    columns: the value of each model, one sequence a leaf.
  """
  problems = []
  for path, column in zip(paths, columns, strict=True):
    if any(map(leaves_lib.is_tracer, column)):
      continue
    first, *rest = values = list(map(_comparable, column))
    if not all(_same(first, value) for value in rest):
      kind = getattr(column[0], 'dtype', type(column[0]).__name__)
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
  here = leaves_lib.is_local(leaf)
  return np.asarray(jax.device_get(leaf)) if here else leaf


# What a function does, as far as that can be compared.
_behaviour = operator.attrgetter(
  *('__code__', '__globals__', '__defaults__', '__kwdefaults__', '__closure__')
)


def _same(left: Any, right: Any) -> bool:
  """Return True for equal values, partials, stateless objects and lambdas."""
  if left is right:
    return True
  if isinstance(left, jax.Array) or isinstance(right, jax.Array):
    return bool(jax.device_get(_equal(left, right)))
  if leaves_lib.is_array(left) or np.array_equal(left, right):
    return np.array_equal(left, right)
  try:
    if isinstance(left, types.FunctionType):
      return _behaviour(left) == _behaviour(right)
    return left.__reduce_ex__(2) == right.__reduce_ex__(2)
  except Exception:  # not comparable, by whatever error of its class
    return False


@jax.jit
def _equal(left: jax.Array, right: jax.Array) -> jax.Array:
  return jnp.array_equal(left, right)


def _raise(
  problems: list[str], remedy: str, title: str = 'The trees differ'
) -> None:
  if problems:
    shown = '\n  '.join(problems)
    raise ValueError(f'{title} in {len(problems)} places:\n  {shown}\n{remedy}')
