"""A run, from its task and config to the merged model."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import pathlib
import signal
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from modelstock_jax import merging
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import clock as clock_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import memory
from modelstock_jax.training import metrics as metrics_lib
from modelstock_jax.training import preemption
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import workdir as workdir_lib

Params = Any
Checkpoint = checkpoints_lib.Checkpoint


class Interrupted(Exception):  # noqa: N818
  """A run was asked to stop, and saved what it had.

  Attributes:
    signal: what asked: SIGINT or SIGTERM.
  """

  def __init__(self, number: int, step: int, workdir: pathlib.Path):
    self.signal = signal.Signals(number)
    super().__init__(
      f'{self.signal.name} at step {step}: saved in {workdir}. The same '
      'command goes on from there.'
    )


class Result(NamedTuple):
  """The result of a finished run.

  Attributes:
    models: the stack at the last step, before its merge; leaves [N, ...].
    merged: their merge.
    variables: of the merge: the mean over models.
    step: optimizer steps taken.
  """

  models: Params
  merged: merging.Merged
  variables: Any
  step: int


def train(
  config: config_lib.Config,
  workdir: str | pathlib.Path,
  *,
  setup: setup_lib.Setup | Callable[[], setup_lib.Setup],
  title: str = 'train',
) -> Result:
  """Train N models, merging them as the config says; resume if possible.

  Args:
    config: a valid config.
    workdir: takes checkpoints, metrics and events. A run that was
      interrupted there is resumed, and ends bit for bit where it would have.
    setup: what `prepare` gave for this config, or a function that calls it,
      where a lack of memory is then explained as well.
    title: of the progress line.

  Returns:
    The models and their merge after the last epoch.

  Raises:
    ValueError: if the workdir belongs to another config.
    FloatingPointError: if a model's loss or gradient is not finite; names
      the step and the model.
    Interrupted: after SIGINT or SIGTERM, when everything is saved; on all
      processes of a run, whichever got the signal.
    MemoryError: if the devices have too little; says what needs less.

  A linear model of one's own, two of which are merged every epoch:

  >>> import tempfile
  >>> from jax import numpy as jnp
  >>> import optax
  >>> from modelstock_jax import data
  >>> from modelstock_jax.training import optimizer
  >>> from modelstock_jax.training import task
  >>> def error(params, batch):
  ...   return batch['x'] @ params['w'] - batch['y']
  >>> linear = task.Task(
  ...   init=lambda key: ({'w': jnp.zeros(2)}, {}),
  ...   loss=lambda params, variables, batch, key, anchor, consts: (
  ...     jnp.mean(error(params, batch) ** 2), ({}, variables)
  ...   ),
  ...   score=lambda params, variables, batch: {
  ...     'fit': -(error(params, batch) ** 2)
  ...   },
  ...   example=jax.eval_shape(lambda: {'x': jnp.zeros(2), 'y': jnp.zeros(())}),
  ...   select='fit',
  ... )
  >>> x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
  >>> y = x @ np.array([1, -2], np.float32)
  >>> source = data.ArraySource('line', {'x': x, 'y': y})
  >>> sources = setup_lib.Sources(source, source)
  >>> sgd = optimizer.from_optax(optax.sgd(1.0))
  >>> config = config_lib.defaults()
  >>> config.train.update(
  ...   epochs=20, batch_size=16, learning_rate=0.1, warmup_steps=1
  ... )
  >>> prepared = setup_lib.prepare(config, linear, sgd, sources)
  >>> with tempfile.TemporaryDirectory() as workdir:
  ...   result = train(config_lib.validate(config), workdir, setup=prepared)
  >>> print(result.merged.params['w'].round(2))
  [ 1. -2.]
  """
  stop = preemption.StopRequest()
  num_models = config.merge.num_models
  with memory.explained(config.train, config.mesh, num_models):
    # First what may fail, so that a config that cannot run claims no workdir.
    setup = setup if isinstance(setup, setup_lib.Setup) else setup()
    workdir = workdir_lib.claim(workdir, config.to_json())
    clock = clock_lib.Clock(
      setup.steps_per_epoch,
      setup.total_steps,
      merge_every=config.merge.every,
      evaluate_epochs=config.evaluate.every_epochs,
      save_merges=config.checkpoint.every_merges,
      save_steps=config.checkpoint.every_steps,
    )
    end = advance(
      config,
      setup,
      clock,
      workdir,
      stop,
      models=np.arange(num_models, dtype=np.int32),
      num_models=num_models,
      hyper={},
      title=title,
    )
    if stop.signal:  # so that what comes after this run stops as well
      raise Interrupted(stop.signal, clock.total_steps, workdir)
    variables = setup.programs.average(end.state.variables)
    assert end.merged is not None
    return Result(end.state.params, end.merged, variables, clock.total_steps)


def advance(
  config: config_lib.Config,
  setup: setup_lib.Setup,
  clock: clock_lib.Clock,
  folder: pathlib.Path,
  stop: preemption.StopRequest,
  *,
  models: np.ndarray,
  num_models: int,
  hyper: dict[str, jax.Array],
  title: str,
) -> Checkpoint:
  """Train one stack of models to its end, resuming from a folder.

  Args:
    config: of the run.
    setup: of the run.
    clock: when things happen.
    folder: takes checkpoints, metrics and events.
    stop: the request to stop this run.
    models: int32[N], the indices of these models.
    num_models: of all models, of which these are trained together.
    hyper: see `step.train_step`.
    title: of the progress line.

  Returns:
    The checkpoint of the last step.

  Raises:
    FloatingPointError: as `train`.
    Interrupted: likewise.
  """
  with (
    stop.listen(),
    checkpoints_lib.Checkpoints(
      folder / workdir_lib.CHECKPOINTS, config=config.to_dict()
    ) as checkpoints,
  ):
    moving = config.merge.anchor == 'last_merge'
    start = setup_lib.resume(
      setup, checkpoints, models, config.seed, clock.merges, moving
    )
    first = int(start.state.step)
    if first == clock.total_steps:
      return start
    # Every random number follows from seed, model and step: starting at any
    # step gives what an uninterrupted run would see there.
    reader = setup_lib.read_batches(
      setup.sources,
      setup.placement,
      config.data,
      batch_size=config.train.batch_size,
      seed=config.seed,
      models=models.tolist(),
      num_models=num_models,
      start=first,
    )
    with (
      contextlib.closing(reader),
      metrics_lib.Writer(folder, start=first) as writer,
      metrics_lib.progress(clock.total_steps, start=first, title=title) as bar,
    ):
      log = metrics_lib.StepLog(
        writer,
        bar,
        start=first,
        every=config.log.every_steps,
        num_models=len(models),
        batch_size=config.train.batch_size,
        stop=clock.merges,
      )
      on_devices = (
        sharding.to_global(batch, setup.placement.batch) for batch in reader
      )
      stops = stop.after_step
      parts = Parts(
        setup, clock, log, writer, checkpoints, stops, moving, folder
      )
      return fit(parts, start, on_devices, hyper)


class Parts(NamedTuple):
  """The parts that the loop works with.

  Attributes:
    setup: compiled programs, anchor and validation data.
    clock: when things happen.
    log: takes metrics.
    writer: takes the scores of evaluations.
    checkpoints: takes checkpoints.
    stop: called after each step; the signal to stop with, or None.
    moving_base: True if merges are relative to the merge before, and not to
      the anchor.
    folder: of the run.
  """

  setup: setup_lib.Setup
  clock: clock_lib.Clock
  log: metrics_lib.StepLog
  writer: metrics_lib.Writer
  checkpoints: checkpoints_lib.Checkpoints
  stop: Callable[[], int | None]
  moving_base: bool
  folder: pathlib.Path


def fit(
  parts: Parts, start: Checkpoint, batches: Iterator[Any], hyper: Any
) -> Checkpoint:
  """Train to the last step: the one loop of all runs.

  Args:
    parts: see `Parts`.
    start: the checkpoint to begin with.
    batches: on the devices, from the next step on.
    hyper: see `step.train_step`.

  Returns:
    The checkpoint of the last step.

  Raises:
    FloatingPointError: a model or its loss is not finite.
    Interrupted: a signal came; everything is saved.
  """
  setup, clock, log = parts.setup, parts.clock, parts.log
  programs = setup.programs
  state, base = start.state, start.anchor
  merged: Any = start.merged  # None until there is one
  base = setup.anchor if base is None else base
  batch = next(batches)
  for step in range(int(state.step) + 1, clock.total_steps + 1):
    with jax.transfer_guard('disallow'):
      state, metrics = programs.train(
        state, batch, setup.anchor, setup.consts, hyper
      )
    due = clock.due(step)
    if not due.last:  # travels to the devices while they do this step
      batch = next(batches)
    stop = parts.stop()
    log.add(step, metrics)
    if not (due.merge or due.evaluate or due.save or stop):
      continue
    # Nothing below may see, or keep, weights that are not finite.
    log.check()
    if due.last and setup.finish:
      state = setup.finish(state)
    if clock.merges:
      merged = programs.merge(base, state.params)
      metrics_lib.check_finite(step, base, state.params, merged)
    if due.merge or due.evaluate:
      # Before the models start again, which frees these.
      log.merge(
        step,
        merged,
        programs.norms(base, state.params),
        epoch=due.epoch,
        merges=due.merge,
        restarts=due.merge and not due.last,
      )
    scores = {}
    if due.evaluate:
      scores = _evaluate(parts, step, due.epoch, merged, state)
    # After the last epoch the models are kept as they are: soups and angles
    # need them.
    if due.merge and not due.last:
      state = programs.restart(state, merged.params)
      base = merged.params if parts.moving_base else base
    if due.save or stop:
      parts.writer.flush()
      # An undisturbed run would not have the checkpoint of a stop to choose.
      score = scores.get(setup.task.select) if due.save else None
      kept = Checkpoint(state, merged, base if parts.moving_base else None)
      parts.checkpoints.save(step, kept, accuracy=score)
    if stop and not due.last:
      parts.checkpoints.wait()
      raise Interrupted(stop, step, parts.folder)
  parts.checkpoints.wait()
  return Checkpoint(state, merged, base if parts.moving_base else None)


def _evaluate(
  parts: Parts,
  step: int,
  epoch: int,
  merged: merging.Merged,
  state: state_lib.State,
) -> dict[str, float]:
  """Scores of the merge on the validation data, written and returned."""
  setup = parts.setup
  variables = setup.programs.average(state.variables)
  scores = setup.evaluate.validate(
    merged.params,
    variables,
    setup.sources.validation,
    setup.sources.read_validation,
  )
  if setup.task.select not in scores:
    raise ValueError(
      f'Task.select: {setup.task.select!r} is none of the scores '
      f'{sorted(scores)} of Task.score.'
    )
  parts.writer.write(step, 'validation', **scores, epoch=epoch)
  return scores
