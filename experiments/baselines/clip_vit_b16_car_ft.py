"""CAR-FT on ImageNet with CLIP ViT-B/16.

Command: `modelstock train --config=experiments/baselines/clip_vit_b16_car_ft.py
--workdir=... --config.data.data_dir=...`, then `modelstock evaluate
--workdir=...` (with the same `--config` for a task of its own).

Cross-entropy and the divergence, over the 80 templates, between what the
pretrained and the fine-tuned tower say (Mao et al., arXiv:2211.16175). The
weight of 1 is that of a third party's program, not checked against the paper;
the rest is that of `configs/clip_vit_b16.py`.

Expected are the paper's numbers: top-1 accuracy in per cent on ImageNet (IN),
on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  CAR-FT         83.2     59.4     73.0   71.3   43.7    49.5

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made.

Hardware and hours: not yet run.
"""

import car_ft

from modelstock_jax.configs import clip_vit_b16
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = clip_vit_b16.get_config()
  with config.unlocked():
    config.car_ft = config_lib.section(weight=1.0)
  config.merge.num_models = 1
  config.merge.every = 'end'
  return config


get_task = car_ft.task
