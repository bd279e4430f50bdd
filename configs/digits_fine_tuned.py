"""Plain fine-tuning of one model on handwritten digits.

Command: `modelstock train --config=configs/digits_fine_tuned.py
--workdir=...`. LP-FT (Kumar et al., arXiv:2202.10054), which starts from a
linear probe, is this with `--config.anchor.head=linear_probe`.

Everything else is that of `configs/digits.py`, the first of whose two models
this is up to rounding.
"""

from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """Return the config of one run."""
  config = digits.get_config()
  config.merge.num_models = 1
  config.merge.every = 'end'
  return config
