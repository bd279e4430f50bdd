"""A linear probe on ImageNet with CLIP ViT-B/16.

Command: `modelstock train --config=experiments/baselines/clip_vit_b16_lp.py
--workdir=... --config.data.data_dir=...`, then `modelstock evaluate
--workdir=...` (with the same `--config` for a task of its own).

The head alone is trained, from the logistic regression on frozen embeddings
that `anchor.head='linear_probe'` fits.

Expected are the paper's numbers: top-1 accuracy in per cent on ImageNet (IN),
on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  LP             79.7     48.1     71.5   52.4   27.8    40.5

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made.

Hardware and hours: not yet run.
"""

import linear_probe

from modelstock_jax.configs import clip_vit_b16
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """The config of one run."""
  return linear_probe.configure(clip_vit_b16.get_config())


get_task = linear_probe.task
get_optimizer = linear_probe.optimizer
