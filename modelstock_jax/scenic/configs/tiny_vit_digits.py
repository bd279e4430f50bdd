r"""A tiny vision transformer on the handwritten digits of this package.

python -m modelstock_jax.scenic.main --workdir=runs/tiny_vit \
  --config=modelstock_jax/scenic/configs/tiny_vit_digits.py

A check of an installation, about a minute on two cores: the models start from
scratch, where Model Stock is of no use.
"""

import pathlib

import ml_collections

from modelstock_jax import data
from modelstock_jax.scenic import options


def get_config() -> ml_collections.ConfigDict:
  """The config."""
  config = ml_collections.ConfigDict()
  config.experiment_name = 'tiny_vit_digits'
  config.rng_seed = 0

  config.dataset_name = 'modelstock_tfds'
  config.data_dtype_str = 'float32'
  config.dataset_configs = ml_collections.ConfigDict()
  config.dataset_configs.tfds_name = 'digits'
  folder = pathlib.Path(data.__file__).parent / 'prepared'
  config.dataset_configs.data_dir = str(folder)
  config.dataset_configs.eval_split = 'validation'
  config.dataset_configs.image_size = 8
  config.dataset_configs.crop_area = (0.8, 1.0)
  config.dataset_configs.flip = False

  config.model_name = 'vit_classification'
  config.model = ml_collections.ConfigDict()
  config.model.patches = ml_collections.ConfigDict({'size': (2, 2)})
  config.model.hidden_size = 32
  config.model.num_heads = 2
  config.model.num_layers = 2
  config.model.mlp_dim = 64
  config.model.classifier = 'gap'
  config.model.representation_size = None
  config.model.dropout_rate = 0.0
  config.model.attention_dropout_rate = 0.0

  config.optimizer = 'adamw'
  config.optimizer_configs = ml_collections.ConfigDict({'weight_decay': 0.01})
  config.lr_configs = ml_collections.ConfigDict()
  config.lr_configs.learning_rate_schedule = 'compound'
  config.lr_configs.factors = 'constant*linear_warmup'
  config.lr_configs.base_learning_rate = 3e-3
  config.lr_configs.warmup_steps = 10
  config.batch_size = 64
  config.num_training_epochs = 4

  config.model_stock = options.defaults()
  config.model_stock.merge_every = 'end'

  config.checkpoint = True
  config.xprof = False
  config.debug_train = False
  config.debug_eval = False
  return config
