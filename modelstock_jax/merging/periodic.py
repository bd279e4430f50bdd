"""Merging every so many steps: one line of anyone's training loop."""

import operator
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax.merging import layers as layers_lib
from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import options as options_lib
from modelstock_jax.merging import stock
from modelstock_jax.merging import trees

PyTree = trees.PyTree


def merge_every(
  every: int,
  step: int | jax.Array,
  anchor: PyTree,
  stack: PyTree,
  *,
  layers: layers_lib.Layers | None = None,
  unit: options_lib.Unit = 'layer',
  average: options_lib.Average = 'cosine',
  clip: options_lib.Clip = True,
  strength: float | jax.Array = 1.0,
) -> PyTree:
  r"""Replace all models by their merge, every so many steps.

  $$ w_i \leftarrow \begin{cases}
     \mathrm{ModelStock}(w_0; w_1, \dots, w_N) &
       \text{if } \mathtt{step} \in \{ e, 2e, 3e, \dots \} \\
     w_i & \text{otherwise}
     \end{cases} $$

  Works under `jit` and `scan`, where both the merge and nothing are in the
  program and the step decides between them (`lax.cond`). What the optimizer
  remembers of each model is left to the caller; keeping it is what the
  trainer of this library does unless told otherwise.

  Args:
    every: e >= 1, optimizer steps between merges.
    step: int32[] or a Python int, steps taken so far: 1 after the first. An
      array outside of `jit` is waited for, so count in Python there.
    anchor: w_0, a tree of arrays, see `model_stock`.
    stack: N >= 2 models in one tree whose leaves are `[N, ...]`.
    layers: see `model_stock`, as all others.
    unit: 'layer', 'filter' or 'model'.
    average: 'cosine' or 'angle'.
    clip: True clips cosines to [0, 1], see `model_stock`.
    strength: multiplies every ratio, >= 0.

  Returns:
    A tree of the structure, shapes, dtypes and devices of `stack`; `stack`
    itself where `step` is a number and it is not yet time. Leaves that are
    not floating point are those of `stack`.

  Raises:
    ValueError: for an `every` or a `step` that is no such number, and as
      `model_stock`; also on steps that do not merge.

  Source: Jang, Yun, Han. Model Stock: All we need is just a few fine-tuned
  models. ECCV 2024, arXiv:2403.19522, 'periodic merging', there every epoch.

  >>> import jax.numpy as jnp
  >>> import modelstock_jax as ms
  >>> anchor, stack = {'w': jnp.zeros(1)}, {'w': jnp.array([[0.0], [2.0]])}
  >>> for step in range(1, 5):
  ...   stack = {'w': stack['w'] + 1.0}  # a training step
  ...   stack = ms.merge_every(2, step, anchor, stack)
  ...   print(step, stack['w'][:, 0].tolist())
  1 [1.0, 3.0]
  2 [3.0, 3.0]
  3 [4.0, 4.0]
  4 [5.0, 5.0]
  """
  every, step = _check_numbers(every, step)
  options = options_lib.StockOptions(unit, average, clip)

  def merged(stack):
    result = stock.merge(
      anchor, stack, options, stacked=True, layers=layers, strength=strength
    )
    return _spread(result.params, stack)

  if not leaves_lib.is_tracer(step):
    if step > 0 and step % every == 0:
      return merged(stack)
    _check_trees(anchor, stack)
    return stack

  leaves, treedef = jax.tree.flatten(stack)
  floating = [
    i for i, leaf in enumerate(leaves) if leaves_lib.is_floating(leaf)
  ]

  def filled(values):
    return treedef.unflatten(trees.fill(leaves, floating, values))

  def merge(values):
    new = jax.tree.leaves(merged(filled(values)))
    return [new[i] for i in floating]

  values = jax.lax.cond(
    (step > 0) & (step % every == 0),
    merge,
    lambda values: values,
    [leaves_lib.as_jax(leaves[i]) for i in floating],
  )
  return filled(values)


def _check_numbers(every: Any, step: Any) -> tuple[int, Any]:
  """Return both as whole numbers; a traced step as it is."""
  period = _index(every)
  count: Any = _index(step)
  if leaves_lib.is_tracer(step) and not step.shape:
    count = step if jnp.issubdtype(step.dtype, jnp.integer) else None
  problems = []
  if period is None or period < 1:
    problems.append(
      'every: must be a whole number of steps >= 1, the same in every call, '
      f'got {every!r}.'
    )
  if count is None:
    problems.append(
      f'step: must be a whole number, the steps taken so far, got {step!r}.'
    )
  if period is None or problems:
    raise ValueError('\n'.join(problems))
  return period, count


def _index(number: Any) -> int | None:
  """Return a whole number that is known as a Python int, else None."""
  try:
    known = leaves_lib.is_array(number) and not leaves_lib.is_tracer(number)
    return operator.index(jax.device_get(number) if known else number)
  except TypeError:  # jax's error for a traced number is one, too
    return None


def _check_trees(anchor: PyTree, stack: PyTree) -> None:
  """Raise on the first step, not at the first merge; costs microseconds."""
  expected = [_form(leaf, lead=0) for leaf in jax.tree.leaves(anchor)]
  if expected != [_form(leaf, lead=1) for leaf in jax.tree.leaves(stack)]:
    trees.align(anchor, stack, stacked=True)


def _form(leaf: Any, lead: int) -> Any:
  return (leaf.shape[lead:], leaf.dtype) if leaves_lib.is_array(leaf) else None


def _spread(merged: PyTree, stack: PyTree) -> PyTree:
  """Return the stack with every model `merged`, in the stack's container."""
  by_path = dict(jax.tree_util.tree_leaves_with_path(merged))
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      _repeat(by_path[path], leaf)
      if leaves_lib.is_floating(leaf)
      else leaves_lib.copy(leaf)
    ),
    stack,
  )


def _repeat(leaf: jax.Array, like: Any) -> jax.Array:
  """Repeat `[...]` as `[N, ...]`, on the devices where the models are."""
  placed = leaves_lib.devices(like) is not None
  place = like.sharding.with_memory_kind('device') if placed else None
  # Born sharded: no device ever holds all of it.
  repeat = jax.jit(jnp.broadcast_to, static_argnums=1, out_shardings=place)
  return repeat(leaf[None], like.shape)
