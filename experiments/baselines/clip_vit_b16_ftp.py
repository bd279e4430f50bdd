"""FTP on ImageNet with CLIP ViT-B/16.

Command: `modelstock train --config=experiments/baselines/clip_vit_b16_ftp.py
--workdir=... --config.data.data_dir=...`, then `modelstock evaluate
--workdir=...` (with the same `--config` for a task of its own).

Each layer is held in a ball round the pretrained weights, the radius of which
learns from the gradients of training; the head is free (Tian et al.,
arXiv:2310.19182). As the authors' example, it is without weight decay; the rest
is that of `configs/clip_vit_b16.py`, which may not be what the row below took.

Expected are the paper's numbers: top-1 accuracy in per cent on ImageNet (IN),
on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  FTP            84.2     49.7     74.6   47.2   26.5    50.2

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made.

Hardware and hours: not yet run.
"""

import ftp

from modelstock_jax.configs import clip_vit_b16
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = clip_vit_b16.get_config()
  with config.unlocked():
    config.ftp = config_lib.section(strength=1.0, exclude=('head',))
  config.train.weight_decay = 0.0
  config.merge.num_models = 1
  config.merge.every = 'end'
  return config


get_optimizer = ftp.from_config
