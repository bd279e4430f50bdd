r"""CLIP ViT-B/32 on ImageNet: two models, merged after every epoch.

python -m modelstock_jax.scenic.main --workdir=runs/clip_b32 \
  --config=configs/scenic_clip_vit_b32.py \
  --config.model_stock.anchor.path=openai/clip-vit-base-patch32 \
  --config.model_stock.anchor.prompts=imagenet.json

ImageNet is prepared in `data`, as docs/imagenet.md says. `imagenet.json` has
the 'names' of the 1000 classes, in the order of the labels, and 'templates'.
Batch, epochs, weight decay, clipping and the steps of the warm-up are those of
WiSE-FT's README (arXiv:2109.01903). The learning rate of 1e-5, the warm-up from
0, crops of 0.5 to 1 and flips are our choice; `configs/clip_vit_b32.py` has the
recipe of WiSE-FT. Not run at full size: no accuracy is claimed.
"""

import ml_collections

from modelstock_jax.scenic import datasets
from modelstock_jax.scenic import options

TRAIN_IMAGES = 1_281_167


def get_config() -> ml_collections.ConfigDict:
  """Return the config of one run."""
  batch_size, epochs = 512, 10  # of each model
  images = datasets.DatasetConfigs(dataset='imagenet2012', data_dir='data')
  block = options.defaults()
  block.layers = 'qkv'  # as in the paper's PyTorch models
  block.anchor.head = 'zero_shot'
  return ml_collections.ConfigDict(
    dict(
      experiment_name='clip_vit_b32_imagenet',
      rng_seed=0,
      dataset_name='modelstock_tfds',
      data_dtype_str='float32',
      dataset_configs=images.model_dump(),
      model_name='clip_classification',
      model=dict(variant='vit_b32'),
      batch_size=batch_size,
      eval_batch_size=512,
      num_training_epochs=epochs,
      optimizer='adamw',
      optimizer_configs=dict(weight_decay=0.1),
      max_grad_norm=1.0,
      lr_configs=dict(
        learning_rate_schedule='compound',
        factors='constant*cosine_decay*linear_warmup',
        base_learning_rate=1e-5,
        steps_per_cycle=TRAIN_IMAGES // batch_size * epochs,
        warmup_steps=500,
      ),
      model_stock=block,
      checkpoint=True,
      xprof=False,
    )
  )
