"""Checkpoints: the merged model for Scenic, and all models to resume with."""

import os
from typing import Any

from flax.training import checkpoints
import jax
from scenic.train_lib import train_utils

from modelstock_jax.formats import text
from modelstock_jax.scenic import step as step_lib

TrainState = train_utils.TrainState

# A folder next to the merged checkpoints, so that Scenic finds only these.
MODELS = 'models'


def merged_state(
  state: TrainState, params: Any, programs: step_lib.Programs
) -> TrainState:
  """Return the merged model as a state of Scenic's own trainers.

  Args:
    state: N models, leaves [N, ...].
    params: their merge.
    programs: of the run.

  Returns:
    The state, leaves [...]: optimizer moments and running statistics are
    means over models, the random key is that of the first.
  """
  opt_state, model_state = programs.average(
    (state.opt_state, state.model_state)
  )
  return state.replace(
    params=params,
    opt_state=opt_state,
    model_state=model_state,
    global_step=state.global_step[0],
    rng=state.rng[0],
  )


def save(
  workdir: text.PathLike, state: TrainState, merged: TrainState, *, keep: int
) -> None:
  """Write `workdir/checkpoint_<step>` and `workdir/models/checkpoint_<step>`.

  The first holds the merged model: `train_utils.restore_checkpoint` and what
  builds on it read it as any of Scenic's. The second holds all models.

  Args:
    workdir: of the run.
    state: N models, leaves [N, ...].
    merged: see `merged_state`.
    keep: checkpoints to keep.
  """
  if jax.process_index():
    return
  # The models first: interrupted between the two, the run resumes from them
  # and writes the merge another time.
  checkpoints.save_checkpoint(
    os.path.join(workdir, MODELS),
    jax.device_get(state),
    int(merged.global_step),
    overwrite=True,
    keep=keep,
  )
  train_utils.save_checkpoint(
    os.fspath(workdir), merged, max_to_keep=keep, overwrite=True
  )


def restore(
  workdir: text.PathLike, state: TrainState, chrono: Any
) -> TrainState:
  """Return the models of the last checkpoint of a workdir.

  Args:
    workdir: of the run.
    state: N models, leaves [N, ...]; returned if there is no checkpoint.
    chrono: the clock of the run, set to that of the checkpoint.

  Raises:
    ValueError: the workdir holds another trainer's checkpoints, or another
      number of models.
  """
  models = os.path.join(workdir, MODELS)
  last = checkpoints.latest_checkpoint(models)
  if last is None:
    if other := checkpoints.latest_checkpoint(os.fspath(workdir)):
      raise ValueError(
        f'{other} is a checkpoint without the models that were merged '
        f'({models}), so training cannot be resumed from it. Start from it '
        'with config.model_stock.anchor.path, in another workdir.'
      )
    return state
  like = state.replace(metadata={'chrono': chrono.save()})
  with text.explained(
    f'{last} is of another model or optimizer: ',
    '. Use another workdir.',
    (ValueError, KeyError),
  ):
    stored = checkpoints.restore_checkpoint(last, like)
  number, wanted = stored.rng.shape[0], state.rng.shape[0]
  if number != wanted:
    raise ValueError(
      f'{last} holds {number} models, config.model_stock.num_models is '
      f'{wanted}: set it to {number}, or use another workdir.'
    )
  chrono.load(stored.metadata['chrono'])
  return stored.replace(metadata={})
