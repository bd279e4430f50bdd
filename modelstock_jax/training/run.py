"""The public function that trains any task."""

import functools
import pathlib

from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import task as task_lib


def train(
  task: task_lib.Task,
  optimizer: task_lib.Optimizer,
  sources: setup_lib.Sources,
  config: config_lib.Config | config_lib.ConfigDict,
  workdir: str | pathlib.Path,
) -> loop.Result:
  """Train N models of a task on all devices and merge them.

  Args:
    task: what is trained.
    optimizer: how one model makes a step.
    sources: the examples.
    config: from `defaults()`. `anchor`, `augment`, `model` and the names of
      data sets are not used, and neither are the optimizer's weight decay and
      clipping: they belong to the task of a config file.
    workdir: takes checkpoints, metrics and events. Rerun the same program to
      resume an interrupted run; it ends bit for bit where it would have.

  Returns:
    The models, leaves [N, ...]; their merge; and the mean of their variables.

  Raises:
    ValueError: the config is not valid, the workdir belongs to a run with
      another config, or the task breaks its contract.
    FloatingPointError: a loss or weight is not finite.
    Interrupted: SIGINT or SIGTERM came; everything is saved.
  """
  config = config_lib.validate(config)
  setup = functools.partial(setup_lib.prepare, config, task, optimizer, sources)
  return loop.train(config, workdir, setup=setup)
