"""Checkpoints: the merged model for Scenic, and all models to go on with."""

import os
import pathlib
from typing import Any

import flax
from flax.training import checkpoints
import jax
from jax import numpy as jnp
from scenic.train_lib import train_utils

from modelstock_jax.scenic import step as step_lib

TrainState = train_utils.TrainState

# Beside the merged checkpoints, so that Scenic finds those alone.
MODELS = 'models'


def merged_state(
  state: TrainState,
  params: Any,
  programs: step_lib.Programs,
  metadata: dict[str, Any] | None = None,
) -> TrainState:
  """The merged model as a state of Scenic's own trainers.

  Args:
    state: N models, leaves [N, ...].
    params: their merge.
    programs: of the run.
    metadata: of the checkpoint.

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
    metadata=metadata or {},
  )


def save(
  workdir: str | os.PathLike[str],
  state: TrainState,
  merged: TrainState,
  *,
  keep: int,
) -> None:
  """Writes `workdir/checkpoint_<step>` and `workdir/models/checkpoint_<step>`.

  The first holds the merged model: `train_utils.restore_checkpoint` and what
  builds on it read it as any of Scenic's. The second holds all models.

  Args:
    workdir: of the run.
    state: N models, leaves [N, ...].
    merged: see `merged_state`.
    keep: checkpoints to keep.
  """
  path = os.fspath(workdir)
  if jax.process_index():
    return
  # The models first: broken off between the two, the run goes on from them
  # and writes the merge another time.
  checkpoints.save_checkpoint(
    os.path.join(path, MODELS),
    jax.device_get(state),
    int(merged.global_step),
    overwrite=True,
    keep=keep,
  )
  train_utils.save_checkpoint(path, merged, max_to_keep=keep, overwrite=True)


def restore(
  workdir: str | os.PathLike[str], state: TrainState, num_models: int
) -> TrainState | None:
  """The models of the last checkpoint of a workdir; None if there is none.

  Args:
    workdir: of the run.
    state: like the one that is to be read, leaves [N, ...].
    num_models: N.

  Raises:
    ValueError: the workdir holds another trainer's checkpoints, or another
      number of models.
  """
  path = os.fspath(workdir)
  last = checkpoints.latest_checkpoint(os.path.join(path, MODELS))
  if last is None:
    other = checkpoints.latest_checkpoint(path)
    if other is not None:
      raise ValueError(
        f'{other} is a checkpoint without the models that were merged '
        f'({os.path.join(path, MODELS)}), so training cannot go on from it. '
        'Start from it with config.model_stock.anchor.path, in another workdir.'
      )
    return None
  try:
    found = checkpoints.restore_checkpoint(last, state)
  except (ValueError, KeyError) as error:
    raise ValueError(
      f'{last} is of another model or optimizer: {error}. Use another workdir.'
    ) from error
  models = found.rng.shape[0]
  if models != num_models:
    raise ValueError(
      f'{last} holds {models} models, config.model_stock.num_models is '
      f'{num_models}: set it to {models}, or use another workdir.'
    )
  return found


def write(
  path: str | os.PathLike[str],
  params: Any,
  *,
  step: int = 0,
  model_state: Any = None,
) -> pathlib.Path:
  """Writes parameters, merged elsewhere, as a Scenic checkpoint.

  Args:
    path: a workdir, made if it is not there.
    params: of the model; nested dicts of arrays.
    step: training steps that it has behind it.
    model_state: its collections but for 'params', such as 'batch_stats'.

  Returns:
    The file. It has no optimizer: restore it into a `TrainState` whose
    `opt_state` is None.
  """
  state = TrainState(
    global_step=step,
    params=flax.core.freeze(params),
    model_state=model_state or {},
    rng=jnp.zeros(2, jnp.uint32),
    metadata={},
  )
  train_utils.save_checkpoint(os.fspath(path), state, overwrite=True)
  return pathlib.Path(path) / f'checkpoint_{step}'
