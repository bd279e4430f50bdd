r"""A tiny vision transformer on the handwritten digits of this package.

python -m modelstock_jax.scenic.main --workdir=runs/tiny_vit \
  --config=configs/scenic_tiny_vit_digits.py

A check of an installation, about a minute on two cores: the models start from
scratch, where Model Stock is of no use.
"""

import ml_collections

from modelstock_jax.scenic import datasets
from modelstock_jax.scenic import options


def get_config() -> ml_collections.ConfigDict:
  """Return the config of one run."""
  images = datasets.DatasetConfigs(dataset='digits', image_size=8)
  block = options.defaults()
  block.merge_every = 'end'
  return ml_collections.ConfigDict(
    dict(
      experiment_name='tiny_vit_digits',
      rng_seed=0,
      dataset_name='modelstock_tfds',
      data_dtype_str='float32',
      dataset_configs=images.model_dump(),
      model_name='vit_classification',
      model=dict(
        patches={'size': (2, 2)},
        hidden_size=32,
        num_heads=2,
        num_layers=2,
        mlp_dim=64,
        classifier='gap',
        representation_size=None,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
      ),
      optimizer='adamw',
      optimizer_configs=dict(weight_decay=0.01),
      lr_configs=dict(
        learning_rate_schedule='compound',
        factors='constant*linear_warmup',
        base_learning_rate=3e-3,
        warmup_steps=10,
      ),
      batch_size=64,
      num_training_epochs=4,
      model_stock=block,
      checkpoint=True,
      xprof=False,
    )
  )
