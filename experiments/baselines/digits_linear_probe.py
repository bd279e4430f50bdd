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


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  return linear_probe.configure(digits.get_config())


get_task = linear_probe.task
get_optimizer = linear_probe.optimizer
