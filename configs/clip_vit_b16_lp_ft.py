"""LP-FT on ImageNet with CLIP ViT-B/16.

Command: `modelstock train --config=configs/clip_vit_b16_lp_ft.py --workdir=...
--config.data.data_dir=...`, then `modelstock evaluate --workdir=...`.

Fine-tuning of one model from a linear probe (Kumar et al., arXiv:2202.10054),
with the recipe of `configs/clip_vit_b16.py`.

Expected are the paper's numbers: top-1 accuracy in per cent on ImageNet (IN),
on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  LP-FT          81.7     60.5     71.6   72.9   49.1    48.4

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made.

Hardware and hours: not yet run.
"""

from modelstock_jax.configs import clip_vit_b16_fine_tuned
from modelstock_jax.training import config as config_lib


def get_config() -> config_lib.ConfigDict:
  """Return the config of one run."""
  config = clip_vit_b16_fine_tuned.get_config()
  config.anchor.head = 'linear_probe'
  return config
