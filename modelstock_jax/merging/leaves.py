"""Leaves of trees: names, kinds, and places in memory."""

import reprlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

Path = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it


def path_name(path: Path) -> str:
  """Return a key path of jax.tree_util as text, 'block_0/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def is_array(leaf: Any) -> bool:
  """Return True for what has a shape and a dtype (not a Python number)."""
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def is_floating(leaf: Any) -> bool:
  """Return True for an array of real floating point numbers."""
  return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_tracer(leaf: Any) -> bool:
  """Return True if the values of a leaf are not known yet (under jit)."""
  return isinstance(leaf, jax.core.Tracer)


def wide(*dtypes: Any) -> Any:
  """Return the dtype that reductions use: float64 if any is, else float32."""
  # Not `jnp.promote_types`, which refuses under strict dtype promotion.
  return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def as_jax(leaf: Any) -> jax.Array:
  """Return a number or an array as a jax array in device memory."""
  # Explicit transfers, which a transfer guard allows.
  if not isinstance(leaf, jax.Array):
    return jax.device_put(leaf)
  if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
    return jax.device_put(leaf, jax.memory.Space.Device)
  return leaf


def number(name: str, value: Any) -> Any:
  """Return a number, on the host if it is known: it may be on any device.

  Args:
    name: name of the argument, for the error.
    value: a finite real number, or an array of one.

  Raises:
    ValueError: it is something else.
  """
  known = value if is_tracer(value) else np.asarray(jax.device_get(value))
  if (
    known.ndim
    or not jnp.issubdtype(known.dtype, np.number)
    or jnp.issubdtype(known.dtype, np.complexfloating)
    or not (is_tracer(known) or np.isfinite(known))
  ):
    shown = reprlib.repr(value).replace('\n', ' ')
    raise ValueError(f'{name}: must be one finite number, got {shown}.')
  return known


def on_device(leaf: Any) -> Any:
  """Return a floating leaf so that jit accepts it."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf
  # Not `as_jax` of numpy arrays: it may share their memory, jit does not.
  return as_jax(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)


def copy(leaf: Any) -> Any:
  """Return a copy of an array, which outlives its donation; others as is."""
  return leaf.copy() if is_array(leaf) else leaf


def take(leaf: Any, i: int) -> Any:
  """Return `leaf[i]` of an array; other leaves as they are."""
  if isinstance(leaf, jax.Array):
    return _take(leaf, jax.device_put(i))
  return leaf[i] if is_array(leaf) else leaf


def widened(column: Any, i: int, dtype: Any) -> jax.Array:
  """Return the leaf of model `i`, of a list or a stack, in a wider dtype."""
  # Not the other way: XLA's CPU backend would slice bfloat16 as float32, and
  # turn the slice back first.
  if isinstance(column, jax.Array):
    return column.astype(dtype)[i]
  return column[i].astype(dtype)


@jax.jit
def _take(leaf: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)


def varying(leaf: Any) -> frozenset[str]:
  """Return the manual mesh axes of `shard_map` over which an array varies."""
  kind = jax.typeof(leaf)
  # jax 0.10 moved it.
  kind = getattr(kind, 'manual_axis_type', kind)
  return frozenset(getattr(kind, 'varying', getattr(kind, 'vma', ())))


def is_local(leaf: Any) -> bool:
  """Return True if this process can read all of an array."""
  here = getattr(leaf, 'is_fully_addressable', True)
  return here or leaf.is_fully_replicated


def devices(leaf: Any) -> tuple[jax.Device, ...] | None:
  """Return the devices to which an array is committed, in order, or None."""
  sharding = None if is_tracer(leaf) else getattr(leaf, 'sharding', None)
  if sharding is None or not getattr(leaf, 'committed', True):
    return None
  return tuple(sharding.devices_indices_map(leaf.shape))
