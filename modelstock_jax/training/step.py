"""The device programs of a run: advance N models, merge them, start again."""

from collections.abc import Callable
import functools
import typing
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import optax

from modelstock_jax import merging
from modelstock_jax.merging import options
from modelstock_jax.merging import stock
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import task as task_lib

Params = Any
State = state_lib.State


class Recipe(NamedTuple):
  """The parts that the programs of a run are compiled from.

  Attributes:
    task: the network and its loss.
    optimizer: the update rule.
    schedule: step int32[], hyper -> learning rate float32[], or float32[N]
      where `hyper` has leaves [N].
    accumulate: parts that a batch is cut into, one after the other: less
      memory, the same result up to rounding.
    sum_once: True to sum gradients over devices once a step, not in every part:
      of a `task.MeanOfExamples` without variables, on several devices. Each
      device holds a whole gradient of its models meanwhile.
    models: 'vmap' advances all models at once, 'map' one after the other: less
      memory.
    num_models: N.
    options: how models are merged.
    strength: factor on every ratio of a merge.
  """

  task: task_lib.Task
  optimizer: task_lib.Optimizer
  schedule: Callable[[jax.Array, Any], jax.typing.ArrayLike]
  accumulate: int = 1
  sum_once: bool = False
  models: str = 'vmap'
  num_models: int = 2
  options: merging.StockOptions = merging.StockOptions()
  strength: float = 1.0


def train_step(
  recipe: Recipe,
  placement: sharding.Placement,
  state: State,
  batch: task_lib.Batch,
  anchor: Params,
  consts: Any,
  hyper: dict[str, jax.Array],
) -> tuple[State, dict[str, jax.Array]]:
  """Advance every model by one step on its own batch.

  The step of one model is mapped over the stack: no model sees another.

  Args:
    recipe: task and optimizer.
    placement: where everything lives.
    state: N models.
    batch: leaves [N, B, ...].
    anchor: the params that training started from, leaves [...].
    consts: of the task.
    hyper: hyper-parameters with leaves [N]; {} where all models have the same.

  Returns:
    The state after the step; and metrics of the batch before it, float32[N]:
    'loss', those of the task, 'grad_norm' (before clipping), and
    'learning_rate' float32[], or float32[N] with `hyper`.
  """
  learning_rate = jnp.asarray(recipe.schedule(state.step, hyper))

  def one(params, variables, opt_state, key, batch, hyper, rate):
    key = jax.random.fold_in(key, state.step)
    batch = recipe.task.draw(batch, key, consts, hyper)
    (loss, metrics, grads), variables = _gradient(
      recipe, placement, params, variables, batch, key, anchor, consts
    )
    params, opt_state = recipe.optimizer.step(
      params,
      grads,
      opt_state,
      learning_rate if rate is None else rate,
      anchor,
      hyper,
    )
    metrics = {'loss': loss, **metrics, 'grad_norm': optax.tree.norm(grads)}
    return params, variables, opt_state, metrics

  stack = (state.params, state.variables, state.opt_state, state.key)
  stack += (batch, hyper, learning_rate if learning_rate.ndim else None)
  params, variables, opt_state, metrics = over_stack(recipe.models, one, stack)
  metrics['learning_rate'] = learning_rate
  # Each model's metrics stay with it: nothing crosses models in a step.
  metrics = {
    name: placement.pin(x, placement.stack if x.ndim else placement.replicated)
    for name, x in metrics.items()
  }
  state = State(state.step + 1, params, variables, opt_state, state.key)
  return state, metrics


def over_stack(
  models: str, one: Callable[..., Any], stack: tuple[Any, ...]
) -> Any:
  """Map a function of one model over leaves `[N, ...]`, by 'vmap' or 'map'."""
  if models == 'map':
    return jax.lax.map(lambda x: one(*x), stack)
  return jax.vmap(one, spmd_axis_name=sharding.STOCK)(*stack)


def _gradient(
  recipe: Recipe,
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

  def of_device(part, key):
    # As if there were no others: all that is split is gathered here.
    alone = sharding.place(devices=list(placement.mesh.devices.flat)[:1])
    here = placement.pin((params, anchor), placement.replicated)
    single = recipe._replace(accumulate=1)
    return _gradient(
      single, alone, here[0], variables, part, key, here[1], consts
    )[0]

  return _add_up(recipe, placement, gradient, of_device, variables, batch, key)


def _add_up(
  recipe: Recipe,
  placement: sharding.Placement,
  gradient: Callable[..., Any],
  of_device: Callable[..., Any],
  variables: Any,
  batch: task_lib.Batch,
  key: jax.Array,
) -> Any:
  """Return what `_gradient` does, from parts of the batch in turn.

  `gradient` is of a part, `of_device` of the rows that one device has.
  """
  number, devices = recipe.accumulate, placement.mesh.shape[sharding.DATA]
  once = (
    recipe.sum_once
    and devices > 1
    and isinstance(recipe.task.loss, task_lib.MeanOfExamples)
    and not jax.tree.leaves(variables)
  )
  parts = jax.tree.map(
    lambda x: _cut(devices, number, once, x) if x.ndim else None, batch
  )

  def whole(part):  # scalars are the same in each
    return jax.tree.map(lambda x, cut: x if cut is None else cut, batch, part)

  def of_part(variables, part, index):
    return gradient(variables, whole(part), jax.random.fold_in(key, index))

  def of_devices(variables, part, index):
    def one(part, index):
      return of_device(whole(part), jax.random.fold_in(key, index))

    indices = index * devices + jnp.arange(devices)
    sums = jax.vmap(one, spmd_axis_name=sharding.DATA)(part, indices)
    return placement.pin(sums, placement.rows), variables

  of_each = of_devices if once else of_part

  def add(carry, part):
    total, variables = carry
    sums, variables = of_each(variables, *part)
    return (jax.tree.map(jnp.add, total, sums), variables), None

  first = jax.tree.map(lambda x: x[0], parts)
  sums, _ = jax.eval_shape(of_each, variables, first, 0)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
  (total, variables), _ = jax.lax.scan(
    add, (zeros, variables), (parts, jnp.arange(number))
  )
  if once:
    total = sharding.sum_over_data(placement, total)
    number *= devices
  return jax.tree.map(lambda x: x / number, total), variables


def _cut(devices: int, number: int, once: bool, array: jax.Array) -> jax.Array:
  """[B, ...] to [number, B / number, ...], rows staying where they are.

  To [number, devices, rows of a device, ...] if gradients are summed once.
  """
  rest = array.shape[1:]
  array = array.reshape(devices, number, -1, *rest).swapaxes(0, 1)
  return array if once else array.reshape(number, -1, *rest)


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


def restart(
  recipe: Recipe, opt_state: str, state: State, merged: Params
) -> State:
  """Put every model back on the merged weights, with averaged variables.

  Args:
    recipe: of the run. Its schedule continues: it follows `state.step`.
    opt_state: see `state.restart_optimizer`.
    state: N models, N different weights.
    merged: the weights from which all models continue.

  Returns:
    The state with equal params and variables in all models.
  """
  number = state.key.shape[0]
  params = state_lib.replicate(merged, number)
  return state._replace(
    params=params,
    variables=state_lib.replicate(state_lib.average(state.variables), number),
    opt_state=state_lib.restart_optimizer(
      state.opt_state, opt_state, recipe.optimizer.init, params
    ),
  )


def norms(anchor: Params, stack: Params) -> Params:
  """Return the mean norm of the models' displacements, float32[] by leaf."""

  def of_leaf(w0: jax.Array, models: jax.Array) -> jax.Array:
    steps = models - w0[None]
    squares = jnp.sum(steps * steps, axis=tuple(range(1, steps.ndim)))
    return jnp.mean(jnp.sqrt(squares))

  return jax.tree.map(of_leaf, anchor, stack)


class Programs(NamedTuple):
  """The compiled parts of a run; each is compiled once.

  Attributes:
    create: anchor, variables, seed uint32[], models int32[N] -> `State`, born
      sharded; see `state.create`.
    train: state, batch, anchor, consts, hyper -> state, metrics; see
      `train_step`. Donates the state.
    merge: base, params [N, ...] -> `merging.Merged`.
    norms: base, params [N, ...] -> float32[] by leaf; see `norms`.
    restart: by what becomes of the optimizers: state, merged params -> state;
      see `restart`. Donates the state.
    average: variables [N, ...] -> their mean over models, replicated.
  """

  create: Callable[..., State]
  train: Callable[..., tuple[State, dict[str, jax.Array]]]
  merge: Callable[[Params, Params], merging.Merged]
  norms: Callable[[Params, Params], Params]
  restart: dict[str, Callable[[State, Params], State]]
  average: Callable[[Any], Any]


def compile_programs(
  recipe: Recipe,
  placement: sharding.Placement,
  *,
  num_keys: int | None = None,
) -> Programs:
  """Jit the parts of a run with their shardings.

  Args:
    recipe: what is compiled.
    placement: where everything lives.
    num_keys: random streams of all models, of which N are trained at a time;
      None is N.

  Returns:
    Programs that take and return sharded arrays. `train` and `restart`
    donate the state; the anchor is never donated.

  Raises:
    ValueError: a leaf of the task's params is not floating.
  """
  task, num_models = recipe.task, recipe.num_models
  shapes, variables = jax.eval_shape(task.init, jax.random.key(0))
  task_lib.check_params(shapes)
  create = functools.partial(
    state_lib.create,
    optimizer=recipe.optimizer,
    num_keys=num_keys or num_models,
  )
  models = jax.ShapeDtypeStruct((num_models,), jnp.int32)
  state: Any = placement.state(
    jax.eval_shape(create, shapes, variables, 0, models)
  )
  params: Any = placement.params(shapes)
  full: Any = placement.replicated
  measure = functools.partial(
    stock.merge,
    options=recipe.options,
    layers=task.layers,
    strength=recipe.strength,
  )

  def merge(anchor, stack):
    models = sharding.exchange(placement, stack)
    if num_models > 1:
      return measure(anchor, models)
    # Of one model the merge is itself: of its pair the cosine is 1, or not
    # finite where the model is not, or 0 where it has not moved.
    cosine = measure(anchor, models * 2).cosine
    ratio = jax.tree.map(jnp.ones_like, cosine)
    return merging.Merged(models[0], cosine, ratio)

  return Programs(
    create=jax.jit(create, out_shardings=state),
    train=jax.jit(
      functools.partial(train_step, recipe, placement),
      in_shardings=(state, placement.batch, params, full, placement.stack),
      out_shardings=(state, None),
      donate_argnums=0,
    ),
    merge=jax.jit(
      merge,
      in_shardings=(params, state.params),
      out_shardings=merging.Merged(params, full, full),
    ),
    norms=jax.jit(
      norms, in_shardings=(params, state.params), out_shardings=full
    ),
    restart={
      opt_state: jax.jit(
        functools.partial(restart, recipe, opt_state),
        in_shardings=(state, params),
        out_shardings=state,
        donate_argnums=0,
        keep_unused=True,  # what is not read is to be freed all the same
      )
      for opt_state in typing.get_args(options.OptState)
    },
    average=jax.jit(state_lib.average, out_shardings=full),
  )
