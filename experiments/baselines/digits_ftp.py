"""FTP on handwritten digits: each layer in a ball round the anchor.

Command: `modelstock train --config=experiments/baselines/digits_ftp.py
--workdir=...`

The radii learn from the gradients of training (Tian et al., arXiv:2310.19182);
the head is free. The authors train without weight decay, as this does.
Everything else is that of `configs/digits.py`, its two models and their merge
included: FTP itself is one of them, `--config.merge.num_models=1`.
"""

import ftp

from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = digits.get_config()
  with config.unlocked():
    config.ftp = config_lib.section(strength=1.0, exclude=('head',))
  config.train.weight_decay = 0.0
  config.merge.every = 'end'
  return config


get_optimizer = ftp.from_config
