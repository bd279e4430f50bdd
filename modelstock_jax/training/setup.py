"""The parts of a run: compiled programs, data, and placement of arrays."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import logging
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.training import auto
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import step as step_lib
from modelstock_jax.training import task as task_lib

_log = logging.getLogger(__name__)

Params = Any
Checkpoint = checkpoints_lib.Checkpoint

# Settings of jax that decide the numbers of a run.
_JAX = (
  'jax_default_matmul_precision',
  'jax_default_prng_impl',
  'jax_enable_x64',
  'jax_threefry_partitionable',
)


class Sources(NamedTuple):
  """The examples of a run, and how they are read.

  Attributes:
    train: the training examples.
    validation: the examples that merges are evaluated on.
    read: record, numpy Generator -> training example of the shapes of
      `Task.example`; or one such function for each model. None takes records as
      they are. It raises `data.BadExample` to have the record replaced.
    read_validation: record, index -> validation example; None likewise.
  """

  train: data.Source
  validation: data.Source
  read: data.TrainRead | Sequence[data.TrainRead] | None = None
  read_validation: data.EvalRead | None = None


class Setup(NamedTuple):
  """Programs, data and anchor that runs of one config share.

  Attributes:
    task: the network and its loss.
    sources: the examples.
    placement: of the arrays.
    programs: compiled for this task and placement.
    evaluate: evaluator of models.
    anchor: the params that training starts from, float32, as
      `placement.params`.
    variables: of the task, replicated.
    consts: likewise.
    steps_per_epoch: optimizer steps.
    finish: state -> state, done to the models after the last step, before
      their merge; None does nothing.
    inputs: what decides the numbers of a run and is not in its config, as JSON
      values; recorded in checkpoints, and the same whenever the run resumes.
  """

  task: task_lib.Task
  sources: Sources
  placement: sharding.Placement
  programs: step_lib.Programs
  evaluate: evaluation.Evaluator
  anchor: Params
  variables: Any
  consts: Any
  steps_per_epoch: int
  finish: Callable[[state_lib.State], state_lib.State] | None = None
  inputs: Mapping[str, Any] = {}


def prepare(
  config: config_lib.Config,
  task: task_lib.Task,
  optimizer: task_lib.Optimizer,
  sources: Sources,
) -> Setup:
  """Compile and load everything that a run needs.

  Args:
    config: of the run. Runs that differ in `seed`, `merge.every` and
      `merge.opt_state` alone may share the result, and compile once.
    task: what is trained.
    optimizer: how.
    sources: the examples.

  Returns:
    A `Setup`.

  Raises:
    FileNotFoundError: weights or data are missing.
    ValueError: mesh, batch and data do not go together, or the task's params
      are not all floating.
  """
  config = auto.resolve(config)
  placement = place(config)
  # An unknown benchmark is an error now, not after the first epoch.
  for name in config.evaluate.benchmarks:
    data.find_benchmark(name)
  steps_per_epoch = data.steps_per_epoch(sources.train, config.train.batch_size)
  programs = compile_programs(
    config, task, optimizer, placement, steps_per_epoch
  )
  params, variables, consts = start(task, placement, config.seed)
  return Setup(
    task,
    sources,
    placement,
    programs,
    evaluator(config, task, placement, consts),
    params,
    variables,
    consts,
    steps_per_epoch,
    inputs=inputs(task, sources),
  )


def inputs(task: task_lib.Task, sources: Sources) -> dict[str, Any]:
  """Return what decides the numbers of a run and is not in its config.

  Returns:
    The names and sizes of the data, the shapes and dtypes of an example, and
    settings of jax, as JSON values.
  """
  train, validation = sources.train, sources.validation
  return {
    'train': f'{train.name}: {len(train)} examples',
    'validation': f'{validation.name}: {len(validation)} examples',
    'example': jax.tree.map(
      lambda leaf: f'{leaf.dtype}{list(leaf.shape)}', dict(task.example)
    ),
    **{name: getattr(jax.config, name) for name in _JAX},
  }


def evaluator(
  config: config_lib.Config,
  task: task_lib.Task,
  placement: sharding.Placement,
  consts: Any = (),
) -> evaluation.Evaluator:
  """Return what evaluates the models of a run on benchmarks."""
  return evaluation.Evaluator(
    task,
    placement,
    consts=consts,
    batch_size=config.evaluate.batch_size,
    data_dir=config.data.data_dir,
    image_size=config.model.image.image_size,
  )


def start(
  task: task_lib.Task, placement: sharding.Placement, seed: int
) -> tuple[Params, Any, Any]:
  """Read or make what training starts from, on the devices.

  Args:
    task: the task.
    placement: where arrays go.
    seed: of `Task.init`, where nothing is loaded.

  Returns:
    Params as `placement.params`; variables and consts, replicated.
  """
  if task.load is None:
    params, variables = task.init(jax.random.key(seed))
    consts = task.consts
  else:
    params, variables, consts = task.load(placement)
  variables, consts = jax.device_put((variables, consts), placement.replicated)
  return jax.device_put(params, placement.params(params)), variables, consts


def place(
  config: config_lib.Config, devices: Sequence[jax.Device] | None = None
) -> sharding.Placement:
  """Return the placement of the arrays of a run: see `sharding.place`.

  What is 'auto' here, as `auto.resolve` was not called, is off.
  """
  mesh = config.mesh.settle(stock=1, fsdp_min_size=0)
  return sharding.place(
    stock=mesh.stock,
    batch_size=config.train.batch_size,
    fsdp_min_size=mesh.fsdp_min_size,
    accumulate=config.train.accumulate,
    devices=devices,
  )


def compile_programs(
  config: config_lib.Config,
  task: task_lib.Task,
  optimizer: task_lib.Optimizer,
  placement: sharding.Placement,
  steps_per_epoch: int,
  *,
  schedule: Callable[[jax.Array, Any], jax.typing.ArrayLike] | None = None,
  num_keys: int | None = None,
) -> step_lib.Programs:
  """Make the programs of a run. Nothing is compiled yet, and no data are read.

  Args:
    config: of the run; `train` and `merge` matter.
    task: what is trained.
    optimizer: how.
    placement: on whichever devices, present or not.
    steps_per_epoch: decides the schedule.
    schedule: see `step.Recipe`; None is the warm-up and cosine of the config.
    num_keys: see `step.compile_programs`.

  Returns:
    The parts of training.

  Raises:
    ValueError: if the warm-up is longer than the run.
  """
  train, merge = config.train, config.merge
  if schedule is None:
    total_steps = steps_per_epoch * train.epochs
    cosine = optimizer_lib.warmup_cosine(
      train.learning_rate,
      warmup_steps=optimizer_lib.warmup_steps(
        train.warmup_steps, train.warmup_share, total_steps
      ),
      total_steps=total_steps,
      from_zero=train.warmup_from_zero,
    )
  recipe = step_lib.Recipe(
    task,
    optimizer,
    schedule or (lambda step, hyper: cosine(step)),
    train.accumulate,
    train.sum_gradients == 'once',
    train.models,
    merge.num_models,
    merging.StockOptions(merge.unit, merge.average, merge.clip),
    merge.strength,
  )
  return step_lib.compile_programs(recipe, placement, num_keys=num_keys)


def read_batches(
  config: config_lib.Config,
  sources: Sources,
  placement: sharding.Placement,
  models: Sequence[int],
  *,
  num_models: int | None = None,
  start: int = 0,
) -> data.Batches:
  """Read training batches from a step on: models and rows of this process.

  Args:
    config: of the run; `seed`, `data` and `train.batch_size` matter.
    sources: the examples.
    placement: of the run.
    models: indices of N models, each with its order of the data.
    num_models: of all models, of which N are trained at a time; None is N.
    start: the step whose batch comes first.

  Returns:
    An iterator of {name: [n, b, ...]}.
  """
  shape = (len(models), config.train.batch_size)
  local, rows = sharding.local_block(placement.batch, shape)
  return data.train_batches(
    sources.train,
    num_models=num_models or len(models),
    batch_size=config.train.batch_size,
    seed=config.seed,
    start=start,
    read=sources.read,
    cache=config.data.cache,
    models=[models[place] for place in local],
    rows=slice(rows.start, rows.stop),
    max_bad_examples=config.data.max_bad_examples,
  )


def resume(
  setup: Setup,
  checkpoints: checkpoints_lib.Checkpoints,
  models: np.ndarray,
  seed: int,
  merges: bool = True,
  moving_base: bool = False,
) -> Checkpoint:
  """Return the latest checkpoint, or models at the anchor if there is none.

  Args:
    setup: of the run.
    checkpoints: of the run.
    models: int32[N], the indices of these models.
    seed: of the run.
    merges: False where models are never merged.
    moving_base: True if merges are relative to the merge before.
  """
  placement, programs = setup.placement, setup.programs
  key = jax.device_put(np.uint32(seed), placement.replicated)
  models = jax.device_put(models, placement.replicated)
  start = (setup.anchor, setup.variables, key, models)
  # Shapes, and the shardings that the programs were compiled with.
  like = Checkpoint(jax.eval_shape(programs.create, *start))
  if merges:
    merged = jax.eval_shape(programs.merge, setup.anchor, like.state.params)
    anchor = state_lib.abstract(setup.anchor) if moving_base else None
    like = Checkpoint(like.state, merged, anchor)
  restored = checkpoints.restore(like)
  if restored is None:
    return Checkpoint(programs.create(*start))
  _log.info('Resuming from step %d.', int(restored.state.step))
  return restored
