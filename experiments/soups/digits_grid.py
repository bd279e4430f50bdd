"""Sixteen models on digits with hyper-parameters of their own, for soups.

Command: `python -m experiments.soups
--config=experiments/soups/digits_grid.py --workdir=...`

As `configs/digits.py`, but for what is drawn: learning rates from a quarter of
the demo's to twice it, half to one and a half times its epochs, and weight
decay, label smoothing and mixup as Model Soups (arXiv:2203.05482) drew them.
The bounds were fixed before any of these models was trained.
"""

import members

from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of the grid."""
  config = digits.get_config()
  with config.unlocked():
    config.grid = config_lib.section(**members.SECTION)
  config.grid.num_models = 16
  config.grid.epochs = (15, 45)
  config.grid.learning_rate = (5e-4, 4e-3)
  config.grid.randaugment_count = 0  # images of 8 pixels, kept in memory
  config.checkpoint.every_merges = 45  # epochs, which are four steps
  return config
