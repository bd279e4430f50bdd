"""TPGM on handwritten digits: each layer back onto a ball, after training.

Command: `modelstock train --config=experiments/baselines/digits_tpgm.py
--workdir=...`

The radii are learnt on the validation digits (Tian et al., arXiv:2303.10720):
accuracy on these says too much. The head is free. Everything else is that of
`configs/digits.py`, its two models and their merge included: TPGM itself is one
of them, `--config.merge.num_models=1`.
"""

import tpgm

from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = digits.get_config()
  with config.unlocked():
    config.tpgm = config_lib.section(exclude=('head',))
  config.merge.every = 'end'
  return config


get_finish = tpgm.finish
