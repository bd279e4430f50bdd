"""A run, from its config to the merged model."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import functools
import logging
import os
import pathlib
import signal
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import baselines
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import hosts
from modelstock_jax.training import memory
from modelstock_jax.training import metrics as metrics_lib
from modelstock_jax.training import optimizer
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import step as step_lib
from modelstock_jax.training import tpgm
from modelstock_jax.training import watch as watch_lib

_log = logging.getLogger(__name__)

# Above this mean ratio the merge has become a plain average.
PLAIN_AVERAGE = 0.99

CHECKPOINTS = 'checkpoints'  # in the workdir

Params = Any


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


class Setup(NamedTuple):
  """What runs of one config share: compiled programs, data and the anchor."""

  source: data.TfdsSource
  placement: sharding.Placement
  programs: step_lib.Programs
  evaluate: evaluation.Evaluator
  anchor: Params  # float32, as `placement.params`
  steps_per_epoch: int
  total_steps: int
  # What `programs.train` takes after state and batch: a `Reference` or nothing.
  beside: tuple[step_lib.Reference, ...] = ()
  # What is done to the models after the last step, before their merge.
  finish: Callable[[state_lib.StockState], state_lib.StockState] | None = None


class Result(NamedTuple):
  """What a finished run leaves."""

  models: Params  # the stack at the last step, before its merge; [N, ...]
  merged: merging.Merged
  step: int


def prepare(config: config_lib.ConfigDict) -> Setup:
  """Compiles and loads everything that a run needs.

  Args:
    config: of the run. Runs that differ in `seed` and `merge.every` alone
      may share the result, and compile once.

  Returns:
    A `Setup`.

  Raises:
    FileNotFoundError: if weights or data are missing.
    ValueError: if mesh, batch and data do not go together.
  """
  data_dir = config.data.data_dir or None
  placement = place(config)
  source = data.open_source(
    config.data.dataset, config.data.train, data_dir=data_dir
  )
  # Now, not after the first epoch: what is missing is an error.
  for name in config.evaluate.benchmarks:
    data.find_benchmark(name)
  data.open_source(
    config.data.dataset, config.data.validation, data_dir=data_dir
  )
  steps_per_epoch = data.steps_per_epoch(source, config.train.batch_size)
  programs, evaluate = build(
    config,
    placement,
    num_classes=len(source.class_names),
    steps_per_epoch=steps_per_epoch,
  )
  anchor = anchor_lib.load(config, placement)
  anchor = jax.device_put(anchor, placement.params(anchor))
  reference = baselines.reference(config, placement, anchor)
  finish = None
  if config.train.projection == 'tpgm':
    recipe = make_recipe(
      config,
      num_classes=len(source.class_names),
      steps_per_epoch=steps_per_epoch,
    )
    finish = tpgm.after_training(config, recipe, placement, anchor)
  return Setup(
    source,
    placement,
    programs,
    evaluate,
    anchor,
    steps_per_epoch,
    steps_per_epoch * config.train.epochs,
    () if reference is None else (reference,),
    finish,
  )


def place(
  config: config_lib.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> sharding.Placement:
  """Where the arrays of a run are: see `sharding.place`."""
  return sharding.place(
    stock=config.mesh.stock,
    num_models=config.merge.num_models,
    batch_size=config.train.batch_size,
    fsdp_min_size=config.mesh.fsdp_min_size,
    accumulate=config.train.accumulate,
    devices=devices,
  )


def build(
  config: config_lib.ConfigDict,
  placement: sharding.Placement,
  *,
  num_classes: int,
  steps_per_epoch: int,
) -> tuple[step_lib.Programs, evaluation.Evaluator]:
  """The programs of a run. Nothing is compiled yet, and no data are read.

  Args:
    config: of the run.
    placement: on whichever devices, present or not.
    num_classes: of the data set.
    steps_per_epoch: decides the schedule.

  Returns:
    The parts of training, and the evaluation.

  Raises:
    ValueError: if the warm-up is longer than the run.
  """
  merge = config.merge
  recipe = make_recipe(
    config, num_classes=num_classes, steps_per_epoch=steps_per_epoch
  )
  programs = step_lib.compile_programs(
    recipe,
    placement,
    num_models=merge.num_models,
    layers=clip.clip_layers,
    opt_state=merge.opt_state,
    options=merging.StockOptions(merge.unit, merge.average, merge.clip),
    strength=merge.strength,
  )
  evaluate = evaluation.evaluator(
    recipe.model,
    recipe.preprocess,
    placement,
    batch_size=config.evaluate.batch_size,
    data_dir=config.data.data_dir or None,
    image_size=config.model.image.image_size,
    as_classifier=baselines.as_classifier(config, placement),
  )
  return programs, evaluate


def make_recipe(
  config: config_lib.ConfigDict, *, num_classes: int, steps_per_epoch: int
) -> step_lib.Recipe:
  """Network, optimizer and loss of a run; see `build`."""
  train = config.train
  return step_lib.Recipe(
    model=baselines.network(config, num_classes),
    tx=baselines.optimizer(config),
    schedule=optimizer.warmup_cosine(
      train.learning_rate,
      warmup_steps=train.warmup_steps,
      total_steps=steps_per_epoch * train.epochs,
    ),
    preprocess=functools.partial(
      data.normalize, mean=config.data.mean, std=config.data.std
    ),
    label_smoothing=train.label_smoothing,
    mixup=train.mixup,
    accumulate=train.accumulate,
    in_turn=train.models == 'in_turn',
    contrastive=train.loss == 'contrastive',
    context_weight=train.context_weight,
    projection=train.projection_strength if train.projection == 'ftp' else None,
  )


def train(
  config: config_lib.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  setup: Setup | None = None,
  title: str = 'train',
) -> Result:
  """Trains N models, merging them as the config says; resumes if it can.

  Args:
    config: a valid config.
    workdir: takes checkpoints, metrics and events. A run that was
      interrupted there goes on, and ends bit for bit where it would have.
    setup: what `prepare(config)` gave, to share it between runs.
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
  """
  with contextlib.ExitStack() as stack:
    watch = watch_lib.Watch(
      config.log.heartbeat_seconds, together=(Interrupted,)
    )
    stack.enter_context(watch)
    if hosts.several():
      # A notice that comes while they compile is kept for their first step:
      # one process that just ended would end the others in a crash.
      stack.enter_context(watch_lib.Signals(watch))
    try:
      return _train(config, pathlib.Path(workdir), setup, title, watch)
    except jax.errors.JaxRuntimeError as error:
      advice = memory.explain(error, config, jax.device_count())
      if advice is None:
        raise
      raise MemoryError(advice) from error


def _train(
  config: config_lib.ConfigDict,
  workdir: pathlib.Path,
  setup: Setup | None,
  title: str,
  watch: watch_lib.Watch,
) -> Result:
  # First what may fail, so that a config that cannot run claims no workdir.
  setup = setup or prepare(config)
  workdir = claim(workdir, config)
  watch.checkpoints = workdir / CHECKPOINTS
  run = _Run(config, setup)
  with (
    watch_lib.Signals(watch),
    checkpoints_lib.Checkpoints(
      workdir / CHECKPOINTS, config=config_lib.to_dict(config)
    ) as checkpoints,
  ):
    state, merged, anchor = run.restore(checkpoints)
    start = int(state.step)
    if start == setup.total_steps:
      return Result(state.params, merged, start)
    # Every random number follows from seed, model and step: starting at any
    # step gives what an uninterrupted run would see there.
    batches = read_batches(config, setup, start)
    with (
      metrics_lib.Writer(workdir, start=start) as writer,
      metrics_lib.progress(setup.total_steps, start=start, title=title) as bar,
    ):
      log = metrics_lib.StepLog(
        writer,
        bar,
        start=start,
        every=config.log.every_steps,
        images=config.merge.num_models * config.train.batch_size,
      )
      try:
        where = setup.placement.batch
        batch = sharding.to_global(next(batches), where)
        for step in range(start + 1, setup.total_steps + 1):
          last = step == setup.total_steps
          state, metrics = setup.programs.train(state, batch, *setup.beside)
          if not last:  # travels to the devices while they do this step
            batch = sharding.to_global(next(batches), where)
          stop = watch.reached(step)
          log.add(step, metrics)

          epoch, rest = divmod(step, setup.steps_per_epoch)
          merging_now = not rest and (last or run.merges_after(epoch))
          evaluating = not rest and (last or run.evaluates_after(epoch))
          measure = merging_now or evaluating
          save = run.saves_at(step, epoch, merging_now, last)
          if not (measure or save or stop):
            continue

          # Nothing below may see, or keep, weights that are not finite.
          log.check()
          if last and setup.finish:
            state = setup.finish(state)
          merged = setup.programs.merge(anchor, state.params)
          cosine = merging.by_path(merged.cosine)
          _check_finite(step, anchor, state.params, cosine)
          accuracy = None
          if measure:
            norm = merging.by_path(setup.programs.norms(anchor, state.params))
            run.log_merge(writer, step, merged, cosine, norm, merging_now)
          if evaluating:
            [score] = setup.evaluate([merged.params], run.validation)
            accuracy = score.accuracy
            writer.write(
              step, 'validation', accuracy=accuracy, n=score.n, epoch=epoch
            )
          # After the last epoch the models are kept as they are: soups and
          # angles need them.
          if merging_now and not last:
            state = setup.programs.restart(state, merged.params)
            if run.moving_anchor:
              anchor = merged.params
          if save or stop:
            checkpoint = checkpoints_lib.Checkpoint(
              state, merged, anchor if run.moving_anchor else None
            )
            writer.flush()
            # An undisturbed run would not have this checkpoint to choose.
            accuracy = accuracy if save else None
            checkpoints.save(step, checkpoint, accuracy=accuracy)
          if stop and not last:
            checkpoints.wait()
            raise Interrupted(stop, step, workdir)
      finally:
        batches.close()
    checkpoints.wait()
    if watch.asked:  # so that what comes after this run stops as well
      raise Interrupted(watch.asked, setup.total_steps, workdir)
  return Result(state.params, merged, setup.total_steps)


def read_batches(
  config: config_lib.ConfigDict, setup: Setup, start: int
) -> data.Batches:
  """The batches from a step on: those models and rows that are for here."""
  num_models, batch_size = config.merge.num_models, config.train.batch_size
  models, rows = sharding.local_models_and_rows(
    setup.placement, num_models, batch_size
  )
  transform = data.Augment(
    config.model.image.image_size,
    setup.source.channels,
    **dict(config.augment.items()),
  )
  return data.train_batches(
    setup.source,
    num_models=num_models,
    batch_size=batch_size,
    seed=config.seed,
    start=start,
    read=data.image_reader(transform),
    cache=config.data.cache,
    models=models,
    rows=rows,
    max_bad_examples=config.data.max_bad_images,
  )


def restore(
  config: config_lib.ConfigDict, workdir: str | pathlib.Path, setup: Setup
) -> checkpoints_lib.Checkpoint:
  """The latest checkpoint of a run, finished or not.

  Args:
    config: of the run.
    workdir: of the run.
    setup: `prepare(config)`.

  Returns:
    The checkpoint, on the mesh of the setup.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is of another config, naming what differs.
  """
  folder = pathlib.Path(workdir).expanduser().absolute() / CHECKPOINTS
  state, merged, anchor = _Run(config, setup).restore(
    checkpoints_lib.Reader(folder, config=config_lib.to_dict(config))
  )
  if merged is not None:
    return checkpoints_lib.Checkpoint(state, merged, anchor)
  raise FileNotFoundError(
    f'{folder}: there is no checkpoint; train first, with the same --workdir.'
  )


def claim(
  workdir: str | pathlib.Path, config: config_lib.ConfigDict
) -> pathlib.Path:
  """Makes a workdir this config's, or checks that it is.

  Args:
    workdir: a folder, created if need be; one that all processes see.
    config: of the run.

  Returns:
    The folder's absolute path.

  Raises:
    ValueError: if a config of another run has made it; shows every
      difference. Settings that only say how a run is carried out may change,
      see `config.changes`: the folder's config.json is then the latest.
    OSError: if it cannot be written, or the hosts do not share it.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  hosts.first('the workdir', lambda: _claim(workdir, config))
  hosts.check_shared(workdir)
  return workdir


def _claim(workdir: pathlib.Path, config: config_lib.ConfigDict) -> None:
  path = workdir / 'config.json'
  text = config_lib.to_json(config)
  try:
    if path.exists():
      old = path.read_text(encoding='utf-8')
      try:
        changes = changes_lib.changes_in_json(old, text)
      except ValueError as error:
        raise ValueError(
          f'{path}: is not the config of a run ({error}). Choose another '
          'workdir.'
        ) from error
      if changes.of_run:
        raise ValueError(
          f'--workdir={workdir} belongs to a run with another config:\n  '
          + '\n  '.join(changes.of_run)
          + '\nChoose another workdir, or the config it was made with.'
        )
      if not changes.of_execution:
        return
      _log.info('Going on with %s.', ', '.join(changes.of_execution))
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)
  except OSError as error:
    raise OSError(
      f'--workdir={workdir}: cannot be written: {error}. Choose a folder of '
      'your own.'
    ) from error


class _Run:
  """When things happen in a run, and what is said about them."""

  def __init__(self, config: config_lib.ConfigDict, setup: Setup):
    self._config = config
    self._setup = setup
    self._warned = hosts.index() > 0  # process 0 says it for all
    self.moving_anchor = config.merge.anchor == 'last_merge'
    self.validation = data.Benchmark(
      'validation', config.data.dataset, config.data.validation
    )

  def restore(
    self, checkpoints: checkpoints_lib.Reader
  ) -> tuple[state_lib.StockState, Any, Params]:
    """State, merge and anchor to go on from."""
    setup = self._setup
    create = functools.partial(
      setup.programs.create,
      setup.anchor,
      seed=jax.device_put(
        np.uint32(self._config.seed), setup.placement.replicated
      ),
    )
    shape = jax.eval_shape(create)
    placement = setup.placement
    like_merged = jax.eval_shape(
      setup.programs.merge, setup.anchor, shape.params
    )
    like = checkpoints_lib.Checkpoint(shape, like_merged, None)
    where = checkpoints_lib.Checkpoint(
      placement.state(shape), placement.merged(like_merged), None
    )
    if self.moving_anchor:
      like = like._replace(anchor=setup.anchor)
      where = where._replace(anchor=placement.params(setup.anchor))
    like = checkpoints_lib.abstract(like, where)
    found = checkpoints.restore(like)
    if found is None:
      return create(), None, setup.anchor
    _log.info('Going on from step %d.', int(found.state.step))
    anchor = found.anchor if self.moving_anchor else setup.anchor
    return found.state, found.merged, anchor

  def merges_after(self, epoch: int) -> bool:
    every = self._config.merge.every
    if every == 'end':
      return False
    return epoch % (1 if every == 'epoch' else every) == 0

  def evaluates_after(self, epoch: int) -> bool:
    return epoch % self._config.evaluate.every_epochs == 0

  def saves_at(
    self, step: int, epoch: int, merging_now: bool, last: bool
  ) -> bool:
    settings = self._config.checkpoint
    if last:
      return True
    if merging_now:
      every = self._config.merge.every
      merges = epoch if every == 'epoch' else epoch // every
      if merges % settings.every_merges == 0:
        return True
    return bool(settings.every_steps) and step % settings.every_steps == 0

  def log_merge(
    self,
    writer: metrics_lib.Writer,
    step: int,
    merged: merging.Merged,
    cosine: dict[str, float],
    norm: dict[str, float],
    merging_now: bool,
  ) -> None:
    """Writes what a merge found in every layer; warns of a plain average."""
    ratio = merging.by_path(merged.ratio)
    mean = float(np.mean(list(ratio.values())))
    several = self._config.merge.num_models > 1
    if several and merging_now and mean > PLAIN_AVERAGE and not self._warned:
      self._warned = True  # those that follow are in metrics.jsonl
      _log.warning(
        'Step %d: the mean ratio is %.3f: this merge has become a plain '
        'average, all models having moved the same way from the anchor.',
        step,
        mean,
      )
    writer.write(
      step,
      'merge',
      epoch=step // self._setup.steps_per_epoch,
      restarts=merging_now and step < self._setup.total_steps,
      mean_ratio=mean,
      cosine=cosine if several else {},  # one model has no angle
      ratio=ratio,
      norm=norm,  # of the displacements, a mean over models
    )


def _check_finite(
  step: int, anchor: Params, params: Params, cosine: dict[str, float]
) -> None:
  """Stops the run if a step with a finite loss has made weights that are not.

  A layer whose displacements are not finite has no cosine, which is known
  without looking at the weights again.
  """
  lost = [path for path, value in cosine.items() if not np.isfinite(value)]
  if not lost:
    return
  squares = [
    jnp.sum(jnp.square(stack - w0[None]), axis=tuple(range(1, stack.ndim)))
    for w0, stack in zip(
      jax.tree.leaves(anchor), jax.tree.leaves(params), strict=True
    )
  ]
  finite = np.isfinite(jax.device_get(squares)).all(axis=0)
  raise FloatingPointError(
    f'Step {step}, model {int(np.argmin(finite))}: its weights after the step '
    f'are not finite, or not near the anchor, in {lost}. The last checkpoint '
    'is from before; lower train.learning_rate.'
  )
