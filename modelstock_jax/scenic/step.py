"""The device programs of a Scenic run: Scenic's own steps, mapped over models.

`classification_trainer.train_step` and `eval_step` are written for one device
of a pmap whose axis is 'batch'. Here they run unchanged under `jax.shard_map`
on a mesh ('stock', 'batch'), so that whatever a model does with that axis, and
every config key that the step reads, means what it means in Scenic.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
from scenic.train_lib import classification_trainer
from scenic.train_lib import train_utils

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.merging import stock as stock_lib
from modelstock_jax.scenic import options as options_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib

Params = Any
Batch = dict[str, Any]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
TrainState = train_utils.TrainState

STOCK = sharding.STOCK
BATCH = 'batch'  # the name that Scenic's steps and metrics sum over


class Layout(NamedTuple):
  """Shardings on a mesh ('stock', 'batch') of all devices.

  Attributes:
    stack: of leaves [N, ...].
    batch: of training batches [N, B, ...].
    examples: of evaluation batches [B, ...], on a mesh ('batch',) of the same
      devices in the same order.
    replicated: of what every device holds, on that mesh.
  """

  stack: NamedSharding
  batch: NamedSharding
  examples: NamedSharding
  replicated: NamedSharding


def lay_out(options: options_lib.Options, batch_size: int) -> Layout:
  """Lay all devices out for N models.

  Args:
    options: of these `num_models` and `mesh_stock`.
    batch_size: of each model, over all its devices.

  Raises:
    ValueError: the devices do not divide over the models, or the batch over
      devices; or there are several processes and each model has its own.
  """
  stock, devices = options.mesh_stock, jax.device_count()
  if stock > 1 and jax.process_count() > 1:
    raise ValueError(
      f'config.model_stock.mesh_stock: is {stock} on {jax.process_count()} '
      'processes. Each of them reads its own part of the data, so a model '
      'with devices of its own would never see the rest: use mesh_stock=1.'
    )
  number = options.num_models
  if stock not in (1, number) or devices % stock or batch_size % devices:
    raise ValueError(
      f'config.batch_size: {batch_size}, with config.model_stock.mesh_stock='
      f'{stock}: {number} models do not divide {devices} devices. Use '
      'mesh_stock=1 (or num_models) and a multiple of the devices.'
    )
  grid = sharding.place(stock=stock).mesh.devices
  mesh = Mesh(grid, (STOCK, BATCH), axis_types=(AxisType.Auto,) * 2)
  flat = Mesh(grid.reshape(-1), (BATCH,), axis_types=(AxisType.Auto,))
  return Layout(
    stack=NamedSharding(mesh, PartitionSpec(STOCK)),
    batch=NamedSharding(mesh, PartitionSpec(STOCK, BATCH)),
    replicated=NamedSharding(flat, PartitionSpec()),
    examples=NamedSharding(flat, PartitionSpec(BATCH)),
  )


class Programs(NamedTuple):
  """The compiled parts of a run."""

  # anchor, model_state, key -> N models there, with fresh optimizers.
  create: Callable[[Params, Any, jax.Array], TrainState]
  # state, batch -> state, metrics [N], logs [N]; the state is donated.
  train: Callable[[TrainState, Batch], tuple[TrainState, Metrics, Any]]
  # anchor, params [N, ...] -> a `merging.Merged`.
  merge: Callable[[Params, Params], merging.Merged]
  # Leaves [N, ...] -> their mean over models; of integers the first.
  average: Callable[[Any], Any]
  # state, merged params -> state with all models there, and their optimizers as
  # `options` say; the state is donated.
  restart: Callable[[TrainState, Params], TrainState]
  # merged state, batch -> metrics.
  evaluate: Callable[[TrainState, Batch], Metrics]


def compile_programs(
  model: Any,
  tx: Any,
  lr_fn: Callable[..., Any],
  config: Any,
  options: options_lib.Options,
  layout: Layout,
) -> Programs:
  """Jit the parts of a run with their shardings.

  Args:
    model: a Scenic model.
    tx: the optimizer of one model, of Scenic's or optax.
    lr_fn: the schedule, which is logged.
    config: of the run; read by Scenic's step.
    options: how models are merged.
    layout: where arrays live.
  """
  train, evaluate = _steps(model, lr_fn, config)
  mesh: Any = layout.stack.mesh
  placement, number = sharding.Placement(mesh), options.num_models

  def create(anchor, model_state, key):
    params = state_lib.replicate(anchor, number)
    return TrainState(
      tx=tx,
      params=params,
      opt_state=jax.vmap(tx.init)(params),
      model_state=state_lib.replicate(model_state, number),
      global_step=jnp.zeros(number, jnp.int32),
      rng=jax.random.split(key, number),
      metadata={},
    )

  def merge(anchor, stack):
    return stock_lib.merge(
      anchor,
      sharding.exchange(placement, stack),
      options.stock,
      layers=clip.clip_layers if options.layers == 'qkv' else None,
      strength=options.strength,
    )

  def restart(state, merged):
    params = state_lib.replicate(merged, number)
    moments = state_lib.restart_optimizer(
      state.opt_state, options.opt_state, tx.init, params
    )
    averaged = state_lib.average(state.model_state)
    model_state = state_lib.replicate(averaged, number)
    return state.replace(
      params=params, opt_state=moments, model_state=model_state
    )

  def on_devices(function, state, batch):
    # As in pmap, each device's gradient is of its own loss: `train_step` takes
    # their mean. With check_vma JAX would sum them before that.
    return jax.shard_map(
      function,
      mesh=batch.mesh,
      in_specs=(state.spec, batch.spec),
      out_specs=state.spec,
      check_vma=False,
    )

  train = on_devices(train, layout.stack, layout.batch)
  evaluate = on_devices(evaluate, layout.replicated, layout.examples)
  return Programs(
    create=jax.jit(create, out_shardings=layout.stack),
    train=jax.jit(train, donate_argnums=0),
    merge=jax.jit(merge, out_shardings=layout.replicated),
    average=jax.jit(state_lib.average, out_shardings=layout.replicated),
    # What is not read is to be freed all the same.
    restart=jax.jit(
      restart, out_shardings=layout.stack, donate_argnums=0, keep_unused=True
    ),
    evaluate=jax.jit(evaluate),
  )


def _steps(
  model: Any, lr_fn: Callable[..., Any], config: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Return Scenic's steps: of training, mapped over models; of evaluation."""
  train_step = functools.partial(
    classification_trainer.train_step,
    flax_model=model.flax_model,
    loss_fn=model.loss_function,
    lr_fn=lr_fn,
    metrics_fn=model.get_metrics_fn('train'),
    config=config,
    debug=config.get('debug_train', False),
  )
  eval_step = functools.partial(
    classification_trainer.eval_step,
    flax_model=model.flax_model,
    metrics_fn=model.get_metrics_fn('validation'),
    debug=config.get('debug_eval', False),
  )

  def train(state, batch):
    state, metrics, logs = jax.vmap(train_step)(state, batch)
    # Scenic averages running statistics over devices when it evaluates. They
    # are linear in those of the batches: averaged each step they come out
    # the same, and no device holds its own.
    averaged = jax.lax.pmean(state.model_state, BATCH)
    return state.replace(model_state=averaged), metrics, logs

  return train, lambda state, batch: eval_step(state, batch)[0]


def train_batch(batches: Sequence[Batch], layout: Layout) -> Batch:
  """Make one batch of N models of N batches of a Scenic dataset.

  Args:
    batches: N trees with leaves [local devices, B / devices, ...].
    layout: where they go.

  Returns:
    Leaves [N, B, ...].
  """
  lead = (len(batches), -1)
  return jax.tree.map(lambda *parts: _put(parts, lead, layout.batch), *batches)


def eval_batch(batch: Batch, layout: Layout) -> Batch:
  """Make leaves [B, ...] of [local devices, B / devices, ...]."""
  return jax.tree.map(lambda x: _put([x], (-1,), layout.examples), batch)


def _put(
  parts: Sequence[Any], lead: tuple[int, ...], where: NamedSharding
) -> jax.Array:
  """Put parts [devices, rows, ...] together, as an array [*lead, ...]."""
  # What is prefetched to the devices stays there.
  there = jax.process_count() == 1 and all(
    isinstance(part, jax.Array) for part in parts
  )
  array = (jnp if there else np).stack(parts)
  array = array.reshape(*lead, *array.shape[3:])
  if there:
    return jax.device_put(array, where)
  return jax.make_array_from_process_local_data(where, array)
