"""The recipes that the baselines start from."""

from modelstock_jax.configs import clip_vit_b16
from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib

FILES = {'digits': digits, 'clip_vit_b16': clip_vit_b16}


def get_config(name: str) -> config_lib.ConfigDict:
  """Return the config of two models on digits, or of one on ImageNet.

  Args:
    name: 'digits' or 'clip_vit_b16', of `configs/`.

  Raises:
    ValueError: it is neither.
  """
  if name not in FILES:
    raise ValueError(f'{name!r}: must be one of {", ".join(FILES)}.')
  config = FILES[name].get_config()
  config.merge.every = 'end'
  if name == 'clip_vit_b16':
    config.merge.num_models = 1
  return config
