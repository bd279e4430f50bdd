"""Model Stock in the place of Scenic's `classification_trainer.train`."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

from absl import logging
from clu import periodic_actions
from clu import platform
import flax
from flax import jax_utils
import jax
from jax import numpy as jnp
from scenic.train_lib import lr_schedules
from scenic.train_lib import optimizers
from scenic.train_lib import train_utils

from modelstock_jax import merging
from modelstock_jax.scenic import anchors
from modelstock_jax.scenic import export
from modelstock_jax.scenic import options as options_lib
from modelstock_jax.scenic import step as step_lib

TrainState = train_utils.TrainState
Summary = dict[str, Any]


def train(
  *,
  rng: jax.Array,
  config: Any,
  model_cls: Callable[..., Any],
  dataset: Any,
  workdir: str,
  writer: Any,
) -> tuple[TrainState, Summary | None, Summary]:
  """Fine-tune N models side by side, merge them and evaluate the merge.

  Replaces `scenic.train_lib.classification_trainer.train`: same arguments,
  same config keys, and `config.model_stock` (see `options.defaults`).

  A step takes the next N batches of `dataset.train_iter`, one for each model.
  Over N passes of the data each model sees as many examples as in one epoch of
  Scenic's trainer, though not each example once.

  What is evaluated, and saved as `checkpoint_<step>`, is the merge; the models
  themselves are in `models/`.

  Args:
    rng: key of the initialisation and of the models' random streams.
    config: of the run.
    model_cls: a Scenic model: `model_cls(config, dataset.meta_data)`.
    dataset: a Scenic dataset; batches [local devices, B / devices, ...].
    workdir: of checkpoints and summaries.
    writer: a `clu` metric writer.

  Returns:
    The merged model as a replicated `TrainState`; the last training summary,
    of all models (None if no step was left); the last evaluation summary.

  Raises:
    ValueError: the config is invalid, or the workdir is of another run.
    TrainingDivergedError: a loss or a merged weight is not finite.
  """
  options = options_lib.read(config)
  layout = step_lib.lay_out(options, config.batch_size)
  times = _times(config, options, dataset.meta_data)
  model = model_cls(config, dataset.meta_data)
  rng, init_rng = jax.random.split(rng)
  input_shape = dataset.meta_data['input_shape']
  input_dtype = dataset.meta_data.get('input_dtype', jnp.float32)
  params, model_state, num_params, gflops = train_utils.initialize_model(
    model_def=model.flax_model,
    input_spec=[(input_shape, input_dtype)],
    config=config,
    rngs=init_rng,
  )
  params, model_state = anchors.load(
    options.anchor, params, flax.core.unfreeze(model_state), input_shape[-2]
  )
  if others := sorted(set(model_state) - {'batch_stats'}):
    raise ValueError(
      f'The model has the variables {others}, which are neither params nor '
      "batch_stats: Scenic's classification train_step drops them."
    )
  lr_fn = lr_schedules.get_learning_rate_fn(config)
  tx = optimizers.get_optimizer(
    optimizers.get_optax_optimizer_config(config), lr_fn, params=params
  )
  programs = step_lib.compile_programs(
    model, tx, lr_fn, config, options, layout
  )
  anchor, *rest = jax.device_put(
    (params, model_state, jax.random.split(rng)[1]), layout.replicated
  )
  state = programs.create(anchor, *rest)
  chrono = train_utils.Chrono()
  if config.get('checkpoint', False):
    state = export.restore(workdir, state, chrono)
    state = jax.device_put(state, layout.stack)
  start = int(state.global_step.addressable_data(0)[0])
  if start == 0:
    scalars = {'num_trainable_params': num_params}
    writer.write_scalars(1, scalars | ({'gflops': gflops} if gflops else {}))
  images = config.batch_size * options.num_models
  chrono.inform(start, times.total, images, times.epoch)
  run = _Run(config, options, dataset, workdir, writer, layout, programs, times)
  _replay(run, start)
  return _loop(run, anchor, state, chrono, start)


class _Times(NamedTuple):
  """Steps from one merge, evaluation, ... to the next; batches of one."""

  total: int  # steps of the run
  epoch: int | None  # where known
  merge: int
  evaluate: int
  checkpoint: int
  summary: int
  eval_batches: int
  eval_batches_of_all: int  # in one pass over the data


class _Run(NamedTuple):
  """The parts of a run that do not change during training."""

  config: Any
  options: options_lib.Options
  dataset: Any
  workdir: str
  writer: Any
  layout: step_lib.Layout
  programs: step_lib.Programs
  times: _Times


def _loop(
  run: _Run, anchor: Any, state: TrainState, chrono: Any, start: int
) -> tuple[TrainState, Summary | None, Summary]:
  """Train, merge, evaluate and save, at the steps of Scenic's trainer."""
  writer, programs, times = run.writer, run.programs, run.times
  lead = jax.process_index() == 0
  note = platform.work_unit().set_notes if lead else lambda text: None
  progress, hooks = _reporters(run)
  train_summary, eval_summary = None, None
  metrics, logs = [], []
  note(f'First step compilations...\n{chrono.note}')
  for step in range(start + 1, times.total + 1):
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      batches = [
        next(run.dataset.train_iter) for _ in range(run.options.num_models)
      ]
      state, step_metrics, step_logs = programs.train(
        state, step_lib.train_batch(batches, run.layout)
      )
      metrics.append(step_metrics)
      logs.append(step_logs)
    for hook in hooks:
      hook(step)
    last = step == times.total
    if step % times.summary == 1 or last or (lead and chrono.warmup):
      with chrono.paused(metrics):
        if lead:
          chrono.tick(step, writer, note)
        train_summary = train_utils.log_train_summary(
          step=step,
          train_metrics=jax.device_get(metrics),
          extra_training_logs=jax.device_get(logs),
          writer=writer,
        )
        metrics, logs = [], []
    merges = step % times.merge == 0 or last
    evaluates = step % times.evaluate == 1 or last
    saves = (step % times.checkpoint == 1 and step > 1) or last
    if not (merges or evaluates or saves):
      continue
    with chrono.paused(state.params):
      merged = programs.merge(anchor, state.params)
      if merges:
        _report(run, step, merged)
      if merges and not last:  # at the end the models stay apart
        state = programs.restart(state, merged.params)
      if evaluates:
        with progress.timed('eval'):
          eval_summary = _evaluate(run, step, state, merged.params)
      if saves and run.config.get('checkpoint', False):
        with progress.timed('checkpoint'):
          models = state.replace(metadata={'chrono': chrono.save()})
          final = export.merged_state(models, merged.params, programs)
          keep = run.config.get('max_checkpoint_keep', 3)
          export.save(run.workdir, models, final, keep=keep)
      del merged  # which makes room for the next step
  merged = programs.merge(anchor, state.params)
  if eval_summary is None:  # all was trained before
    eval_summary = _evaluate(run, times.total, state, merged.params)
  train_utils.barrier_across_hosts()
  final = export.merged_state(state, merged.params, programs)
  # By way of the host, for these are arrays of all processes.
  final = jax_utils.replicate(jax.device_get(final))
  return final, train_summary, eval_summary


def _reporters(run: _Run) -> tuple[Any, list[Callable[[int], None]]]:
  """Make what reports progress, and what is called after every step."""
  config = run.config
  progress = periodic_actions.ReportProgress(
    num_train_steps=run.times.total,
    writer=run.writer,
    every_secs=None,
    every_steps=config.get('report_progress_step', run.times.summary),
  )
  hooks: list[Callable[[int], None]] = [progress]
  if config.get('xprof', True):
    hooks.append(
      periodic_actions.Profile(num_profile_steps=5, logdir=run.workdir)
    )
  return progress, [] if jax.process_index() else hooks


def _replay(run: _Run, start: int) -> None:
  """Skip the batches that were read before an interruption."""
  if not start or not run.options.replay_data:
    return
  number, times = start * run.options.num_models, run.times
  logging.info('Resuming: skipping %d training batches.', number)
  for _ in range(number):
    next(run.dataset.train_iter)
  seen = sum(step % times.evaluate == 1 for step in range(1, start + 1))
  # Scenic's evaluation data begins again after a pass.
  for _ in range(seen * times.eval_batches % times.eval_batches_of_all):
    next(run.dataset.valid_iter)


def _report(run: _Run, step: int, merged: merging.Merged) -> None:
  """Write cosines and ratios of a merge, if it is finite."""
  if broken := merging.not_finite(merged):
    raise train_utils.TrainingDivergedError(
      f'The merge at step {step} is not finite in {broken}.'
    )
  scalars = {}
  for name, tree in (('cosine', merged.cosine), ('ratio', merged.ratio)):
    values = merging.by_path(tree)
    scalars |= {f'{name}/{path}': value for path, value in values.items()}
    scalars[f'merge_{name}'] = math.fsum(values.values()) / len(values)
  run.writer.write_scalars(step, scalars)
  ratio = scalars['merge_ratio']
  logging.info('Merged at step %d: mean ratio %.3f.', step, ratio)


def _evaluate(run: _Run, step: int, state: TrainState, params: Any) -> Summary:
  """Return the model's own metrics of the merge on the validation data."""
  model_state = run.programs.average(state.model_state)
  merged = TrainState(params=params, model_state=model_state)
  metrics = []
  for _ in range(run.times.eval_batches):
    batch = step_lib.eval_batch(next(run.dataset.valid_iter), run.layout)
    metrics.append(jax.device_get(run.programs.evaluate(merged, batch)))
  summary = train_utils.log_eval_summary(
    step=step, eval_metrics=metrics, writer=run.writer
  )
  run.writer.flush()
  return summary


def _times(
  config: Any, options: options_lib.Options, meta_data: dict[str, Any]
) -> _Times:
  total, epoch = train_utils.get_num_training_steps(config, meta_data)
  evaluate = config.get('log_eval_steps') or epoch
  if not evaluate:
    raise ValueError(
      'config.log_eval_steps: must be set where the dataset does not say '
      "meta_data['num_train_examples']."
    )
  size = config.get('eval_batch_size', config.batch_size)
  batches = math.ceil(meta_data['num_eval_examples'] / size)
  return _Times(
    total=total,
    epoch=epoch,
    merge=options_lib.merge_interval(options, epoch, total),
    evaluate=evaluate,
    checkpoint=config.get('checkpoint_steps') or evaluate,
    summary=config.get('log_summary_steps') or evaluate,
    eval_batches=config.get('steps_per_eval') or batches,
    eval_batches_of_all=batches,
  )
