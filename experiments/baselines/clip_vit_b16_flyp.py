"""FLYP on ImageNet with CLIP ViT-B/16.

Command: `modelstock train --config=experiments/baselines/clip_vit_b16_flyp.py
--workdir=... --config.data.data_dir=...`, then `modelstock evaluate
--workdir=...` (with the same `--config` for a task of its own).

Both towers are trained with CLIP's loss of pairs, each image with its class in
one of the 80 templates drawn at random; the head is the zero-shot one of the
fine-tuned text tower (Goyal et al., arXiv:2212.00638, whose recipe this is:
AdamW 1e-5, weight decay 0.1, batch 512, 10 epochs, 500 warm-up steps, cosine;
gradients are not clipped).

Expected are the paper's numbers: top-1 accuracy in per cent on ImageNet (IN),
on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  FLYP           82.6     60.5     73.0   71.4   48.1    49.6

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made.

Hardware and hours: not yet run.
"""

import flyp

from modelstock_jax.configs import clip_vit_b16
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  config = clip_vit_b16.get_config()
  config.train.learning_rate = 1e-5
  config.train.clip_norm = 0.0
  config.merge.num_models = 1
  config.merge.every = 'end'
  return config


get_task = flyp.task
