"""The loss and the gradient of one model on its batch, or on parts of it."""

from typing import TYPE_CHECKING
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax.training import sharding
from modelstock_jax.training import task as task_lib

if TYPE_CHECKING:
  from modelstock_jax.training import step

Params = Any


def of_model(
  recipe: 'step.Recipe',
  placement: sharding.Placement,
  params: Params,
  variables: Any,
  batch: task_lib.Batch,
  key: jax.Array,
  anchor: Params,
  consts: Any,
) -> tuple[tuple[jax.Array, dict[str, jax.Array], Params], Any]:
  """Loss, metrics and gradient of one model on its batch; and its variables."""

  def loss(params, variables, part, key):
    # Pinned, or the partitioner may share the work out over other axes.
    part = jax.tree.map(
      lambda x: placement.pin(x, placement.rows) if jnp.ndim(x) else x, part
    )
    value, (metrics, new) = recipe.task.loss(
      gather(placement, params),
      variables,
      part,
      key,
      gather(placement, anchor),
      consts,
    )
    task_lib.check_loss(value, metrics, new, variables)
    return value, (metrics, new)

  def gradient(variables, part, key):
    (value, (metrics, variables)), grads = jax.value_and_grad(
      loss, has_aux=True
    )(params, variables, part, key)
    grads = placement.pin(grads, placement.params(grads))
    return (value, metrics, grads), variables

  if recipe.accumulate == 1:
    return gradient(variables, batch, key)
  if recipe.sum_once and _can_sum_once(recipe, placement, variables):
    sums = _sum_once(
      recipe, placement, params, variables, batch, key, anchor, consts
    )
    return sums, variables

  number = recipe.accumulate
  parts = jax.tree.map(
    lambda x: _cut(placement, number, x) if x.ndim else None, batch
  )

  def of_part(variables, part, index):
    # Scalars are the same in each part.
    part = jax.tree.map(lambda x, cut: x if cut is None else cut, batch, part)
    return gradient(variables, part, jax.random.fold_in(key, index))

  def add(carry, part):
    total, variables = carry
    sums, variables = of_part(variables, *part)
    return (jax.tree.map(jnp.add, total, sums), variables), None

  first = jax.tree.map(lambda x: x[0], parts)
  sums, _ = jax.eval_shape(of_part, variables, first, 0)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
  (total, variables), _ = jax.lax.scan(
    add, (zeros, variables), (parts, jnp.arange(number))
  )
  return jax.tree.map(lambda x: x / number, total), variables


def _can_sum_once(
  recipe: 'step.Recipe', placement: sharding.Placement, variables: Any
) -> bool:
  return (
    isinstance(recipe.task.loss, task_lib.MeanOfExamples)
    and not jax.tree.leaves(variables)
    and placement.mesh.shape[sharding.DATA] > 1
  )


def _sum_once(
  recipe: 'step.Recipe',
  placement: sharding.Placement,
  params: Params,
  variables: Any,
  batch: task_lib.Batch,
  key: jax.Array,
  anchor: Params,
  consts: Any,
) -> tuple[jax.Array, dict[str, jax.Array], Params]:
  """Loss, metrics and gradient; each device adds up those of its own rows."""
  number, devices = recipe.accumulate, placement.mesh.shape[sharding.DATA]

  def loss(params, part, key):
    whole_anchor = placement.pin(anchor, placement.replicated)
    value, (metrics, new) = recipe.task.loss(
      params, variables, part, key, whole_anchor, consts
    )
    task_lib.check_loss(value, metrics, new, variables)
    return value, metrics

  def of_device(cut, key):
    whole = placement.pin(params, placement.replicated)
    part = jax.tree.map(lambda x, cut: x if cut is None else cut, batch, cut)
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
      whole, part, key
    )
    return value, metrics, grads

  def each(part):
    cut, index = part
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      key, index * devices + jnp.arange(devices)
    )
    sums = jax.vmap(of_device, spmd_axis_name=sharding.DATA)(cut, keys)
    return placement.pin(sums, placement.rows)

  parts = jax.tree.map(
    lambda x: _cut(placement, number, x, apart=True) if x.ndim else None, batch
  )
  parts = (parts, jnp.arange(number))
  sums = jax.eval_shape(each, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
  total, _ = jax.lax.scan(
    lambda total, part: (jax.tree.map(jnp.add, total, each(part)), None),
    placement.pin(zeros, placement.rows),
    parts,
  )
  total = jax.tree.map(lambda x: x / (number * devices), total)
  return sharding.sum_over_data(placement, total)


def _cut(
  placement: sharding.Placement,
  number: int,
  array: jax.Array,
  apart: bool = False,
) -> jax.Array:
  """[B, ...] to [number, B / number, ...], rows staying where they are.

  Or to [number, devices, rows of a device, ...] with `apart`.
  """
  devices = placement.mesh.shape[sharding.DATA]
  rest = array.shape[1:]
  array = array.reshape(devices, number, -1, *rest).swapaxes(0, 1)
  return array if apart else array.reshape(number, -1, *rest)


def gather(placement: sharding.Placement, params: Params) -> Params:
  """Gather what is split over `data`; its gradient is split again."""

  def one(leaf, where):
    if where.is_fully_replicated:
      return leaf

    @jax.custom_vjp
    def identity(x):
      return placement.pin(x, placement.replicated)

    def backward(_, gradient):
      # Summed straight into parts: a reduce-scatter, not an all-reduce.
      return (placement.pin(gradient, where),)

    identity.defvjp(lambda x: (identity(x), None), backward)
    return identity(leaf)

  return jax.tree.map(one, params, placement.params(params))
