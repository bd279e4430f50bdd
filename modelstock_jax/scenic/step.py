"""The device programs of a Scenic run: Scenic's own steps, mapped over models.

`classification_trainer.train_step` and `eval_step` are written for one device
of a pmap whose axis is 'batch'. Here they run unchanged under `jax.shard_map`
on a mesh ('stock', 'batch'), so that whatever a model does with that axis, and
every config key that the step reads, means what it means in Scenic.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import re
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
from scenic.train_lib import classification_trainer
from scenic.train_lib import train_utils

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
  """Where arrays live.

  Attributes:
    mesh: ('stock', 'batch'), for training.
    flat: ('batch',) over the same devices in the same order, for evaluation.
  """

  mesh: Mesh
  flat: Mesh

  @property
  def stack(self) -> NamedSharding:
    """Of leaves [N, ...]."""
    return NamedSharding(self.mesh, PartitionSpec(STOCK))

  @property
  def batch(self) -> NamedSharding:
    """Of training batches [N, B, ...]."""
    return NamedSharding(self.mesh, PartitionSpec(STOCK, BATCH))

  @property
  def whole(self) -> NamedSharding:
    """Of what every device holds."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def examples(self) -> NamedSharding:
    """Of evaluation batches [B, ...]."""
    return NamedSharding(self.flat, PartitionSpec(BATCH))


def lay_out(options: options_lib.Options, batch_size: int) -> Layout:
  """Lays all devices out for N models.

  Args:
    options: of these `num_models` and `mesh_stock`.
    batch_size: of each model, over all its devices.

  Raises:
    ValueError: the devices do not divide over the models, or the batch over
      devices; or there are several processes and each model has its own.
  """
  devices = sorted(
    jax.devices(),
    key=lambda d: (sharding.slice_index(d), d.process_index, d.id),
  )
  stock = options.mesh_stock
  if stock > 1 and jax.process_count() > 1:
    raise ValueError(
      f'config.model_stock.mesh_stock: is {stock} on {jax.process_count()} '
      'processes. Each of them reads its own part of the data, so a model '
      'with devices of its own would never see the rest: use mesh_stock=1.'
    )
  if len(devices) % stock:
    raise ValueError(
      f'config.model_stock.mesh_stock: {stock} models do not divide '
      f'{len(devices)} devices; use mesh_stock=1.'
    )
  if batch_size % len(devices):
    raise ValueError(
      f'config.batch_size: {batch_size} examples do not divide over '
      f'{len(devices)} devices.'
    )
  grid = np.asarray(devices).reshape(stock, -1)
  return Layout(
    Mesh(grid, (STOCK, BATCH), axis_types=(AxisType.Auto,) * 2),
    Mesh(grid.reshape(-1), (BATCH,), axis_types=(AxisType.Auto,)),
  )


class Programs(NamedTuple):
  """The compiled parts of a run."""

  # Fresh optimizers: params [N, ...] -> opt_state [N, ...].
  init: Callable[[Params], Any]
  # state, batch -> state, metrics [N], logs [N]; the state is donated.
  train: Callable[[TrainState, Batch], tuple[TrainState, Metrics, Any]]
  # anchor, params [N, ...] -> a `merging.Merged`.
  merge: Callable[[Params, Params], merging.Merged]
  # Leaves [N, ...] -> their mean over models; of integers the first.
  average: Callable[[Any], Any]
  # state, merged params -> state with all models there; the state is donated.
  restart: Callable[[TrainState, Params], TrainState]
  # merged state, batch -> metrics.
  evaluate: Callable[[TrainState, Batch], Metrics]


def compile_programs(
  *,
  model: Any,
  tx: Any,
  lr_fn: Callable[..., Any],
  config: Any,
  options: options_lib.Options,
  layout: Layout,
) -> Programs:
  """Jits the parts of a run with their shardings.

  Args:
    model: a Scenic model.
    tx: the optimizer of one model, of Scenic's or optax.
    lr_fn: the schedule, which is logged.
    config: of the run; read by Scenic's step.
    options: how models are merged.
    layout: where arrays live.
  """
  train, evaluate = _steps(model, lr_fn, config)

  def merge(anchor, stack):
    return stock_lib.merge(
      anchor,
      sharding.exchange(sharding.Placement(layout.mesh), stack),
      options.stock,
      layers=_qkv if options.layers == 'qkv' else None,
      strength=options.strength,
    )

  # As in pmap, each device's gradient is of its own loss: `train_step` takes
  # their mean. With check_vma JAX would sum them before that.
  on_devices = functools.partial(jax.shard_map, check_vma=False)
  return Programs(
    init=jax.jit(jax.vmap(tx.init), out_shardings=layout.stack),
    train=jax.jit(
      on_devices(
        train,
        mesh=layout.mesh,
        in_specs=(layout.stack.spec, layout.batch.spec),
        out_specs=layout.stack.spec,
      ),
      donate_argnums=0,
    ),
    merge=jax.jit(merge, out_shardings=layout.whole),
    average=jax.jit(state_lib.average, out_shardings=layout.whole),
    restart=jax.jit(
      functools.partial(_restart, options, tx),
      out_shardings=layout.stack,
      donate_argnums=0,
      keep_unused=True,  # what is not read is to be freed all the same
    ),
    evaluate=jax.jit(
      on_devices(
        evaluate,
        mesh=layout.flat,
        in_specs=(PartitionSpec(), layout.examples.spec),
        out_specs=PartitionSpec(),
      )
    ),
  )


def _steps(
  model: Any, lr_fn: Callable[..., Any], config: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Scenic's steps: of training, mapped over models, and of evaluation."""
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
    averaged = jax.tree.map(
      lambda x: jax.lax.pmean(x, BATCH), state.model_state
    )
    return state.replace(model_state=averaged), metrics, logs

  def evaluate(state, batch):
    metrics, _ = eval_step(state, batch)
    return metrics

  return train, evaluate


def _restart(
  options: options_lib.Options, tx: Any, state: TrainState, merged: Params
) -> TrainState:
  """All models at the merge; see `options` for what becomes of optimizers."""
  number = options.num_models
  params = state_lib.replicate(merged, number)
  moments = state.opt_state
  match options.opt_state:
    case 'average':
      moments = state_lib.replicate(state_lib.average(moments), number)
    case 'reset':
      moments = _reset(moments, jax.vmap(tx.init)(params))
  statistics = state_lib.replicate(state_lib.average(state.model_state), number)
  return state.replace(params=params, opt_state=moments, model_state=statistics)


def train_batch(batches: Sequence[Batch], layout: Layout) -> Batch:
  """Makes one batch of N models of N batches of a Scenic dataset.

  Args:
    batches: N trees with leaves [local devices, B / devices, ...].
    layout: where they go.

  Returns:
    Leaves [N, B, ...].
  """

  def join(*parts):
    return _put([_rows(part) for part in parts], layout.batch, stacked=True)

  return jax.tree.map(join, *batches)


def eval_batch(batch: Batch, layout: Layout) -> Batch:
  """Leaves [local devices, B / devices, ...] to [B, ...]."""
  return jax.tree.map(lambda x: _put([_rows(x)], layout.examples), batch)


def _rows(leaf: Any) -> Any:
  if not isinstance(leaf, jax.Array):
    leaf = np.asarray(leaf)
  return leaf.reshape(-1, *leaf.shape[2:])


def _put(rows: list[Any], where: NamedSharding, *, stacked=False) -> jax.Array:
  """Puts rows where they belong; of several, along a new first axis."""
  here = jax.process_count() == 1
  if here and all(isinstance(part, jax.Array) for part in rows):
    # Prefetched to the devices: they stay there.
    return jax.device_put(jnp.stack(rows) if stacked else rows[0], where)
  parts = [np.asarray(part) for part in rows]
  host = np.stack(parts) if stacked else parts[0]
  return jax.make_array_from_process_local_data(where, host)


def _reset(old: Any, new: Any) -> Any:
  """Fresh optimizers, but the schedule goes on."""

  def kept(state):
    return isinstance(state, optax.ScaleByScheduleState)

  return jax.tree.map(lambda x, y: x if kept(x) else y, old, new, is_leaf=kept)


def _qkv(path: str, leaf: Any) -> merging.Layer:
  """Query, key and value of one attention share a cosine."""
  del leaf
  shared = re.sub(r'(^|/)(query|key|value)/(kernel|bias)$', r'\1qkv/\3', path)
  return merging.Layer(group=shared if shared != path else None)


def check_collections(model_state: Any) -> None:
  """Check that Scenic's train_step keeps all variables of a model.

  Raises:
    ValueError: it drops some of them.
  """
  if others := sorted(set(model_state) - {'batch_stats'}):
    raise ValueError(
      f'The model has variables {others} beside params and batch_stats, which '
      "Scenic's classification train_step drops."
    )
