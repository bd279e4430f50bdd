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
  total_steps, steps_per_epoch = train_utils.get_num_training_steps(
    config, dataset.meta_data
  )
  every = options_lib.merge_interval(options, steps_per_epoch, total_steps)
  times = _times(config, dataset.meta_data, total_steps, steps_per_epoch)

  model = model_cls(config, dataset.meta_data)
  rng, init_rng = jax.random.split(rng)
  params, model_state, num_params, gflops = train_utils.initialize_model(
    model_def=model.flax_model,
    input_spec=[
      (
        dataset.meta_data['input_shape'],
        dataset.meta_data.get('input_dtype', jnp.float32),
      )
    ],
    config=config,
    rngs=init_rng,
  )
  params, model_state = anchors.load(
    options.anchor,
    params,
    flax.core.unfreeze(model_state),
    dataset.meta_data['input_shape'][-2],
  )
  step_lib.check_collections(model_state)
  lr_fn = lr_schedules.get_learning_rate_fn(config)
  tx = optimizers.get_optimizer(
    optimizers.get_optax_optimizer_config(config), lr_fn, params=params
  )
  programs = step_lib.compile_programs(
    model=model,
    tx=tx,
    lr_fn=lr_fn,
    config=config,
    options=options,
    layout=layout,
  )
  _, train_rng = jax.random.split(rng)
  anchor = jax.device_put(params, layout.whole)
  state = _start(
    anchor, model_state, tx, train_rng, options.num_models, programs, layout
  )
  chrono = train_utils.Chrono()
  state, start = _restore(
    state, chrono, config, workdir, options.num_models, layout
  )
  run = _Run(config, options, model, dataset, workdir, writer, layout, programs)
  _replay(run, times, start)
  if start == 0:
    scalars = {'num_trainable_params': num_params}
    if gflops:
      scalars['gflops'] = gflops
    writer.write_scalars(1, scalars)
  global_batch = config.batch_size * options.num_models
  chrono.inform(start, total_steps, global_batch, steps_per_epoch)
  return _loop(run, times, anchor, state, chrono, start, total_steps, every)


train_and_evaluate = train  # as some of Scenic's projects call it


class _Run(NamedTuple):
  """What does not change during training."""

  config: Any
  options: options_lib.Options
  model: Any
  dataset: Any
  workdir: str
  writer: Any
  layout: step_lib.Layout
  programs: step_lib.Programs


class _Times(NamedTuple):
  """Steps between what is done now and then, and batches of an evaluation."""

  evaluate: int
  checkpoint: int
  summary: int
  eval_batches: int
  eval_batches_of_all: int  # in one pass over the data


def _loop(
  run: _Run,
  times: _Times,
  anchor: Any,
  state: TrainState,
  chrono: Any,
  start: int,
  total_steps: int,
  every: int,
) -> tuple[TrainState, Summary | None, Summary]:
  """Trains, merges, evaluates, saves; at the steps of Scenic's trainer."""
  config, writer, programs = run.config, run.writer, run.programs
  lead = jax.process_index() == 0

  def note(text):
    if lead:
      platform.work_unit().set_notes(text)

  progress, hooks = _reporters(run, times, total_steps)
  train_summary, eval_summary = None, None
  metrics, logs = [], []
  merged = None
  note(f'First step compilations...\n{chrono.note}')
  for step in range(start + 1, total_steps + 1):
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      batch = _next_batch(run)
      state, step_metrics, step_logs = programs.train(state, batch)
      metrics.append(step_metrics)
      logs.append(step_logs)
      merged = None  # of weights that are gone
    for hook in hooks:
      hook(step)
    last = step == total_steps
    if step % every == 0 or last:
      chrono.pause(wait_for=state.params)
      merged = _merge(run, step, anchor, state)
      if not last:
        state = programs.restart(state, merged)
      chrono.resume()
    if step % times.summary == 1 or last or (lead and chrono.warmup):
      chrono.pause(wait_for=metrics)
      if lead:
        chrono.tick(step, writer, note)
      train_summary = train_utils.log_train_summary(
        step=step,
        train_metrics=jax.device_get(metrics),
        extra_training_logs=jax.device_get(logs),
        writer=writer,
      )
      metrics, logs = [], []
      chrono.resume()
    if step % times.evaluate == 1 or last:
      chrono.pause(wait_for=state.params)
      if merged is None:
        merged = programs.merge(anchor, state.params).params
      with progress.timed('eval'):
        eval_summary = _evaluate(run, times, step, state, merged)
      writer.flush()
      chrono.resume()
    save = (step % times.checkpoint == 1 and step > 1) or last
    if save and config.get('checkpoint', False):
      chrono.pause(wait_for=(state.params, state.opt_state))
      if merged is None:
        merged = programs.merge(anchor, state.params).params
      with progress.timed('checkpoint'):
        _save(run, state, merged, {'chrono': chrono.save()})
      chrono.resume()
  if eval_summary is None:  # all was trained before
    merged = programs.merge(anchor, state.params).params
    eval_summary = _evaluate(run, times, total_steps, state, merged)
  return _replicated(run, state, merged), train_summary, eval_summary


def _replicated(run: _Run, state: TrainState, merged: Any) -> TrainState:
  """Return the merge as Scenic returns a model: on every device."""
  train_utils.barrier_across_hosts()
  final = export.merged_state(state, merged, run.programs)
  # By way of the host, for these are arrays of all processes.
  return jax_utils.replicate(jax.device_get(final))


def _reporters(
  run: _Run, times: _Times, total_steps: int
) -> tuple[Any, list[Callable[[int], None]]]:
  """Make what reports progress, and what is called after every step."""
  config, lead = run.config, jax.process_index() == 0
  progress = periodic_actions.ReportProgress(
    num_train_steps=total_steps,
    writer=run.writer,
    every_secs=None,
    every_steps=config.get('report_progress_step', times.summary),
  )
  hooks: list[Callable[[int], None]] = [progress] if lead else []
  if config.get('xprof', True) and lead:
    hooks.append(
      periodic_actions.Profile(num_profile_steps=5, logdir=run.workdir)
    )
  return progress, hooks


def _save(
  run: _Run, state: TrainState, merged: Any, metadata: dict[str, Any]
) -> None:
  """Write a checkpoint of the models, and one of their merge."""
  export.save(
    run.workdir,
    state.replace(metadata=metadata),
    export.merged_state(state, merged, run.programs, metadata),
    keep=run.config.get('max_checkpoint_keep', 3),
  )


def _start(
  anchor: Any,
  model_state: Any,
  tx: Any,
  rng: jax.Array,
  num_models: int,
  programs: step_lib.Programs,
  layout: step_lib.Layout,
) -> TrainState:
  """N models at the anchor, leaves [N, ...]."""

  def stack(tree):
    return jax.tree.map(
      lambda x: jnp.broadcast_to(x, (num_models, *jnp.shape(x))), tree
    )

  params = jax.jit(stack, out_shardings=layout.stack)(anchor)
  return TrainState(
    tx=tx,
    params=params,
    opt_state=programs.init(params),
    model_state=jax.device_put(stack(model_state), layout.stack),
    global_step=jax.device_put(jnp.zeros(num_models, jnp.int32), layout.stack),
    rng=jax.device_put(jax.random.split(rng, num_models), layout.stack),
    metadata={},
  )


def _restore(
  state: TrainState,
  chrono: Any,
  config: Any,
  workdir: str,
  num_models: int,
  layout: step_lib.Layout,
) -> tuple[TrainState, int]:
  """The last checkpoint, or the state as it is; and the steps it has taken."""
  if not config.get('checkpoint', False):
    return state, 0
  like = state.replace(metadata={'chrono': chrono.save()})
  found = export.restore(workdir, like, num_models)
  if found is None:
    return state, 0
  chrono.load(found.metadata['chrono'])
  start = int(found.global_step[0])
  found = found.replace(metadata={})
  return jax.device_put(found, layout.stack), start


def _replay(run: _Run, times: _Times, start: int) -> None:
  """Reads over what was trained and evaluated on before an interruption."""
  if not start or not run.options.replay_data:
    return
  number = start * run.options.num_models
  logging.info('Reading over %d batches of a run that goes on.', number)
  for _ in range(number):
    next(run.dataset.train_iter)
  seen = len([s for s in range(1, start + 1) if s % times.evaluate == 1])
  # Scenic's evaluation data begins again after a pass.
  for _ in range(seen * times.eval_batches % times.eval_batches_of_all):
    next(run.dataset.valid_iter)


def _next_batch(run: _Run) -> step_lib.Batch:
  batches = [
    next(run.dataset.train_iter) for _ in range(run.options.num_models)
  ]
  return step_lib.train_batch(batches, run.layout)


def _merge(run: _Run, step: int, anchor: Any, state: TrainState) -> Any:
  """Merges the models, writes cosines and ratios, returns the weights."""
  merged = run.programs.merge(anchor, state.params)
  broken = merging.not_finite(merged)
  if broken:
    raise train_utils.TrainingDivergedError(
      f'The merge at step {step} is not finite in {broken}.'
    )
  cosines = merging.by_path(merged.cosine)
  ratios = merging.by_path(merged.ratio)
  mean = math.fsum(ratios.values()) / len(ratios)
  scalars = {f'cosine/{path}': value for path, value in cosines.items()}
  scalars |= {f'ratio/{path}': value for path, value in ratios.items()}
  scalars['merge_cosine'] = math.fsum(cosines.values()) / len(cosines)
  scalars['merge_ratio'] = mean
  run.writer.write_scalars(step, scalars)
  logging.info('Merged at step %d: mean ratio %.3f.', step, mean)
  return merged.params


def _evaluate(
  run: _Run, times: _Times, step: int, state: TrainState, merged: Any
) -> Summary:
  """The model's own metrics of the merge on the validation data."""
  model_state = run.programs.average(state.model_state)
  # The devices are the same, so nothing moves.
  where = run.layout.examples.update(spec=jax.sharding.PartitionSpec())
  found = jax.device_put(
    TrainState(params=merged, model_state=model_state), where
  )
  metrics = []
  for _ in range(times.eval_batches):
    batch = step_lib.eval_batch(next(run.dataset.valid_iter), run.layout)
    metrics.append(jax.device_get(run.programs.evaluate(found, batch)))
  return train_utils.log_eval_summary(
    step=step, eval_metrics=metrics, writer=run.writer
  )


def _times(
  config: Any,
  meta_data: dict[str, Any],
  total_steps: int,
  steps_per_epoch: int | None,
) -> _Times:
  evaluate = config.get('log_eval_steps') or steps_per_epoch
  if not evaluate:
    raise ValueError(
      'config.log_eval_steps: must be set where the dataset does not say '
      "meta_data['num_train_examples']."
    )
  size = config.get('eval_batch_size', config.batch_size)
  batches = math.ceil(meta_data['num_eval_examples'] / size)
  return _Times(
    evaluate=evaluate,
    checkpoint=config.get('checkpoint_steps') or evaluate,
    summary=config.get('log_summary_steps') or evaluate,
    eval_batches=config.get('steps_per_eval') or batches,
    eval_batches_of_all=batches,
  )
