r"""CLIP ViT-B/32 on ImageNet: two models, merged after every epoch.

python -m modelstock_jax.scenic.main --workdir=runs/clip_b32 \
  --config=modelstock_jax/scenic/configs/clip_vit_b32_imagenet.py \
  --config.model_stock.anchor.path=openai/clip-vit-base-patch32 \
  --config.model_stock.anchor.prompts=imagenet.json

`imagenet.json` has the 'names' of the 1000 classes, in the order of the
labels, and 'templates'. Not run at full size: no accuracy is claimed.
"""

import ml_collections

from modelstock_jax.scenic import options

TRAIN_IMAGES = 1_281_167


def get_config() -> ml_collections.ConfigDict:
  """The config."""
  config = ml_collections.ConfigDict()
  config.experiment_name = 'clip_vit_b32_imagenet'
  config.rng_seed = 0

  config.dataset_name = 'modelstock_tfds'
  config.data_dtype_str = 'float32'
  config.dataset_configs = ml_collections.ConfigDict()
  config.dataset_configs.tfds_name = 'imagenet2012:5.*.*'
  config.dataset_configs.data_dir = ''
  config.dataset_configs.eval_split = 'validation'
  config.dataset_configs.image_size = 224
  config.dataset_configs.crop_area = (0.5, 1.0)

  config.model_name = 'clip_classification'
  config.model = ml_collections.ConfigDict({'variant': 'vit_b32'})

  config.batch_size = 512  # of each model
  config.eval_batch_size = 512
  config.num_training_epochs = 10
  steps = TRAIN_IMAGES // config.batch_size * config.num_training_epochs
  config.optimizer = 'adamw'
  config.optimizer_configs = ml_collections.ConfigDict({'weight_decay': 0.1})
  config.max_grad_norm = 1.0
  config.lr_configs = ml_collections.ConfigDict()
  config.lr_configs.learning_rate_schedule = 'compound'
  config.lr_configs.factors = 'constant*cosine_decay*linear_warmup'
  config.lr_configs.base_learning_rate = 1e-5
  config.lr_configs.steps_per_cycle = steps
  config.lr_configs.warmup_steps = 500

  config.model_stock = options.defaults()
  config.model_stock.layers = 'qkv'  # as in the paper's PyTorch models
  config.model_stock.anchor.head = 'zero_shot'

  config.checkpoint = True
  config.xprof = False
  config.debug_train = False
  config.debug_eval = False
  return config
