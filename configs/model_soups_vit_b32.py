"""Model Stock on ImageNet with CLIP ViT-B/32, by the recipe of Model Soups.

Command: `modelstock train --config=configs/model_soups_vit_b32.py
--workdir=... --config.data.data_dir=...`, then `modelstock evaluate
--workdir=...`. With `--config=configs/model_soups_vit_b32.py:timm_aug` images
are augmented as its `--timm-aug` does.

The network, the data and the benchmarks are those of `configs/clip_vit_b32.py`.
What differs is from `finetune.py` of Model Soups (arXiv:2203.05482): AdamW
2e-5, batch 256, 8 epochs, CLIP's own transform; its weight decay, warm-up and
clipping are WiSE-FT's too. `timm_aug`: the defaults of timm's
`transforms_imagenet_train`, crops of 0.08 to 1 of the area, flips, and
brightness, contrast and saturation by 0.6 to 1.4; timm draws bilinear or
bicubic interpolation for each image, here it is bicubic.

RandAugment is not among these defaults. The released models that have it (see
`experiments/soups/random_search.py`) are of another program, which is not
public: `--config.augment.randaugment=m12-n1 --config.augment.color_jitter=0.0`,
as timm jitters no colours then.

Which recipe the paper used is not published. Hardware and hours: not yet run.
"""

from modelstock_jax.configs import clip_vit_b32
from modelstock_jax.training import config as config_lib


def get_config(augmentation: str = 'none') -> config_lib.ConfigDict:
  """Return the config of one run.

  Args:
    augmentation: 'none' or 'timm_aug'.

  Raises:
    ValueError: it is neither.
  """
  if augmentation not in ('none', 'timm_aug'):
    raise ValueError(f"{augmentation!r}: must be 'none' or 'timm_aug'.")
  config = clip_vit_b32.get_config()
  config.augment.crop_scale = (1.0, 1.0)
  if augmentation == 'timm_aug':
    config.augment.update(crop_scale=(0.08, 1.0), flip=0.5, color_jitter=0.4)
  config.train.epochs = 8
  config.train.batch_size = 256
  config.train.learning_rate = 2e-5
  return config
