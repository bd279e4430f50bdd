"""A linear probe on handwritten digits: the head alone is trained.

Command: `modelstock train --config=experiments/baselines/digits_linear_probe.py
--workdir=...`

It starts from the logistic regression on frozen embeddings that
`anchor.head='linear_probe'` fits; gradient descent goes on from there with the
tower frozen. Everything else is that of `configs/digits.py`.
"""

import linear_probe

from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import task as task_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = digits.get_config()
  config.anchor.head = 'linear_probe'
  config.merge.num_models = 1
  config.merge.every = 'end'
  return config


def get_task(config: config_lib.ConfigDict) -> task_lib.Task:
  """Return the task of a run."""
  return linear_probe.task(config)


def get_optimizer(config: config_lib.ConfigDict) -> task_lib.Optimizer:
  """Return the optimizer of a run."""
  return linear_probe.optimizer(config)
