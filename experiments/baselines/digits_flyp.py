"""FLYP on handwritten digits: both towers, on images and their captions.

Command: `modelstock train --config=experiments/baselines/digits_flyp.py
--workdir=...`

The loss is CLIP's of pairs, each image with its class in a template drawn at
random (Goyal et al., arXiv:2212.00638); the head is the zero-shot one of the
fine-tuned text tower. Everything else is that of `configs/digits.py`, its two
models and their merge, of both towers, included: FLYP itself is one of them,
`--config.merge.num_models=1`. The learning rate is the demo's; none was tried
beside it.
"""

import flyp

from modelstock_jax.configs import digits
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = digits.get_config()
  config.merge.every = 'end'
  return config


get_task = flyp.task
