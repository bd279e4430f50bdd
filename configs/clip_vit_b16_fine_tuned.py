"""Plain fine-tuning on ImageNet with CLIP ViT-B/16.

Command: `modelstock train --config=configs/clip_vit_b16_fine_tuned.py
--workdir=... --config.data.data_dir=...`, then `modelstock evaluate
--workdir=...`.

One model, with the recipe of `configs/clip_vit_b16.py`.

Expected are the paper's numbers: top-1 accuracy in per cent on ImageNet (IN),
on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  fine-tuned     82.8     57.7     72.9   66.4   43.7    48.0

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made.

Hardware and hours: not yet run.
"""

from modelstock_jax.configs import clip_vit_b16
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """Return the config of one run."""
  config = clip_vit_b16.get_config()
  config.merge.num_models = 1
  config.merge.every = 'end'
  return config
