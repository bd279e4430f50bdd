"""The training loop, from a config to the merged model."""

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
from modelstock_jax.training import auto
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import clock as clock_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import hosts
from modelstock_jax.training import memory
from modelstock_jax.training import metrics as metrics_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import workdir as workdir_lib

Params = Any
Checkpoint = checkpoints_lib.Checkpoint


class Interrupted(Exception):  # noqa: N818
  """A run was stopped by a signal, after it was saved.

  Attributes:
    signal: SIGINT or SIGTERM.
  """

  def __init__(self, number: int, step: int, workdir: pathlib.Path):
    self.signal = signal.Signals(number)
    super().__init__(
      f'{self.signal.name} at step {step}: the run is saved in {workdir}. '
      'Rerun the same command to resume.'
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
  mirror: metrics_lib.Mirror | None = None,
) -> Result:
  """Train N models and merge them by a config; resume if possible.

  Args:
    config: a valid config, which the workdir records without 'auto'.
    workdir: takes checkpoints, metrics and events. A run that was
      interrupted there is resumed, and ends bit for bit as without the
      interruption.
    setup: the result of `setup.prepare` for this config, or a function that
      calls it, whose lack of memory is then explained as well.
    title: of the progress line.
    mirror: is given all that TensorBoard is, such as for another tracker.

  Returns:
    The models and their merge after the last epoch.

  Raises:
    ValueError: the workdir belongs to another config, or its data, its anchor
      or settings of jax have changed.
    BlockingIOError: another process trains in the workdir.
    FloatingPointError: a model's loss or gradient is not finite; names the
      step and the model.
    Interrupted: after SIGINT or SIGTERM, when everything is saved; on all
      processes of a run, whichever received the signal.
    MemoryError: the devices have too little; lists flags that need less.

  Train two linear models and merge them every epoch:

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
  config = auto.resolve(config)
  stop = hosts.StopRequest()
  num_models = config.merge.num_models
  with memory.explained(config):
    # First, so that a config that cannot run claims no workdir.
    setup = setup if isinstance(setup, setup_lib.Setup) else setup()
    with workdir_lib.claim(workdir, config.to_json()) as folder:
      clock = clock_lib.of_config(config, setup.steps_per_epoch)
      end = advance(
        config,
        setup,
        clock,
        folder,
        stop,
        models=np.arange(num_models, dtype=np.int32),
        num_models=num_models,
        hyper={},
        title=title,
        mirror=mirror,
      )
    if stop.signal:  # so that the caller stops as well
      raise Interrupted(stop.signal, clock.total_steps, folder)
    variables = setup.programs.average(end.state.variables)
    assert end.merged is not None
    return Result(end.state.params, end.merged, variables, clock.total_steps)


def advance(
  config: config_lib.Config,
  setup: setup_lib.Setup,
  clock: clock_lib.Clock,
  workdir: pathlib.Path,
  stop: hosts.StopRequest,
  *,
  models: np.ndarray,
  num_models: int,
  hyper: dict[str, jax.Array],
  title: str,
  mirror: metrics_lib.Mirror | None = None,
) -> Checkpoint:
  """Train one stack of models to its end, resuming from a folder.

  Args:
    config: of the run.
    setup: of the run.
    clock: when things happen.
    workdir: takes checkpoints, metrics and events.
    stop: the request to stop this run.
    models: int32[N], the indices of these models.
    num_models: number of all models, of which these are trained together.
    hyper: see `step.train_step`.
    title: of the progress line.
    mirror: see `train`.

  Returns:
    The checkpoint of the last step.

  Raises:
    FloatingPointError: as `train`.
    Interrupted: likewise.
  """
  with (
    stop.listen(),
    checkpoints_lib.Checkpoints(
      workdir / workdir_lib.CHECKPOINTS,
      config={**config.to_dict(), 'inputs': setup.inputs},
    ) as checkpoints,
  ):
    moving_base = clock.merges and config.merge.anchor == 'last_merge'
    start = setup_lib.resume(
      setup, checkpoints, models, config.seed, clock.merges, moving_base
    )
    first = int(start.state.step)
    if first == clock.total_steps:
      return start
    # Every random number follows from seed, model and step: starting at any
    # step gives what an uninterrupted run would see there.
    reader = setup_lib.read_batches(
      config,
      setup.sources,
      setup.placement,
      models.tolist(),
      num_models=num_models,
      start=first,
    )
    log = metrics_lib.StepLog(
      workdir,
      start=first,
      total=clock.total_steps,
      title=title,
      # Short runs have a line every epoch, or 20 lines.
      every=min(
        config.log.every_steps,
        max(clock.steps_per_epoch, clock.total_steps // 20),
      ),
      num_models=len(models),
      batch_size=config.train.batch_size,
      stop=clock.merges,
      mirror=mirror,
    )
    with contextlib.closing(reader), log:
      batches = (
        sharding.to_global(batch, setup.placement.batch) for batch in reader
      )
      return fit(
        setup,
        clock,
        log,
        checkpoints,
        stop,
        start,
        batches,
        hyper,
        moving_base,
        config.merge.opt_state,
      )


def fit(
  setup: setup_lib.Setup,
  clock: clock_lib.Clock,
  log: metrics_lib.StepLog,
  checkpoints: checkpoints_lib.Checkpoints,
  stop: hosts.StopRequest,
  start: Checkpoint,
  batches: Iterator[Any],
  hyper: dict[str, jax.Array],
  moving_base: bool,
  opt_state: str,
) -> Checkpoint:
  """Train to the last step: the one loop of all runs.

  Args:
    setup: compiled programs, anchor and validation data.
    clock: when things happen.
    log: takes metrics and scores.
    checkpoints: takes checkpoints.
    stop: is asked after each step.
    start: the checkpoint to begin with.
    batches: on the devices, from the next step on.
    hyper: see `step.train_step`.
    moving_base: True if merges are relative to the merge before, and not to
      the anchor.
    opt_state: of the optimizers after a merge, see `state.restart_optimizer`.

  Returns:
    The checkpoint of the last step.

  Raises:
    FloatingPointError: a model or its loss is not finite.
    Interrupted: a signal came; everything is saved.
  """
  programs = setup.programs
  checkpoint, state, base = start, start.state, start.anchor
  merged: Any = start.merged  # None until there is one
  base = setup.anchor if base is None else base
  batch = next(batches)
  for step in range(int(state.step) + 1, clock.total_steps + 1):
    with jax.transfer_guard('disallow'):
      state, metrics = programs.train(
        state, batch, setup.anchor, setup.consts, hyper
      )
    due = clock.due(step)
    if not due.last:  # transferred while the devices compute this step
      batch = next(batches)
    signal_number = stop.after_step()
    log.add(step, metrics)
    if not (due.merge or due.evaluate or due.save or signal_number):
      continue
    # Weights that are not finite must not be merged or saved.
    log.check(due)
    if due.last and setup.finish:
      state = setup.finish(state)
    if clock.merges:
      merged = programs.merge(base, state.params)
      metrics_lib.check_finite(step, base, state.params, merged)
    if due.merge or due.evaluate:
      # Before the models start again, which frees these.
      norms = programs.norms(base, state.params) if due.by_layer else {}
      log.merge(step, merged, norms, due)
    scores = {}
    if due.evaluate:
      scores = _evaluate(setup, merged.params, state.variables)
      log.validation(step, scores, due.epoch)
    # After the last epoch the models stay apart: soups and angles need them.
    if due.merge and not due.last:
      state = programs.restart[opt_state](state, merged.params)
      base = merged.params if moving_base else base
    checkpoint = Checkpoint(state, merged, base if moving_base else None)
    if due.save or signal_number:
      log.flush()
      # Without the interruption this checkpoint would not be a candidate.
      score = scores.get(setup.task.select) if due.save else None
      checkpoints.save(step, checkpoint, accuracy=score)
    if signal_number and not due.last:
      checkpoints.wait()
      raise Interrupted(signal_number, step, checkpoints.directory.parent)
  checkpoints.wait()
  return checkpoint


def _evaluate(
  setup: setup_lib.Setup, params: Params, variables: Any
) -> dict[str, float]:
  """Return the scores of the merge on the validation data."""
  scores = setup.evaluate.validate(
    params,
    setup.programs.average(variables),
    setup.sources.validation,
    setup.sources.read_validation,
  )
  if setup.task.select not in scores:
    raise ValueError(
      f'Task.select: {setup.task.select!r} is none of the scores '
      f'{sorted(scores)} of Task.score.'
    )
  return scores
