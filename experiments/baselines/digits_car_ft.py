"""CAR-FT on handwritten digits: what is said of contexts is to stay.

Command: `modelstock train --config=experiments/baselines/digits_car_ft.py
--workdir=...`

Cross-entropy and the divergence, over the templates of the prompts, between
what the pretrained and the fine-tuned tower say (Mao et al., arXiv:2211.16175).
The weight of 1 is that of a third party's program, not checked against the
paper; none was tried beside it. Everything else is that of `configs/digits.py`,
its two models and their merge included: CAR-FT itself is one of them,
`--config.merge.num_models=1`.
"""

import car_ft

from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = digits.get_config()
  with config.unlocked():
    config.car_ft = config_lib.section(weight=1.0)
  config.merge.every = 'end'
  return config


get_task = car_ft.task
