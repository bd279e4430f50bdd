"""The data sets of this library for Scenic's trainers.

Importing this module registers the dataset 'modelstock_tfds'.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
from scenic.dataset_lib import dataset_utils
from scenic.dataset_lib import datasets

from modelstock_jax import data
from modelstock_jax.training import clip_task
from modelstock_jax.training import config_keys
from modelstock_jax.training import validation as validation_lib


class DatasetConfigs(config_keys.Data):
  """The block `config.dataset_configs`: `config_keys.Data` and three keys.

  Attributes:
    image_size: side of an image, pixels
    onehot_labels: labels as Scenic's mixup takes them
    augment: see `config_keys.Augment`
  """

  image_size: config_keys.Pixels = 224
  onehot_labels: bool = False
  augment: config_keys.Augment = config_keys.Augment(
    crop_scale=(0.5, 1.0), flip=0.5
  )


@datasets.add_dataset('modelstock_tfds')
def get_dataset(
  *,
  batch_size: int,
  eval_batch_size: int,
  num_shards: int,
  dtype_str: str = 'float32',
  shuffle_seed: int | None = None,
  rng: jax.Array | None = None,
  dataset_configs: Any = None,
  dataset_service_address: str | None = None,
) -> dataset_utils.Dataset:
  """Build training and validation data of prepared image classification sets.

  Order and augmentation of the training images are functions of the seed:
  batches are the same in each run. Validation images have CLIP's transform:
  their shorter side is resized (bicubic, antialiased) and the middle cropped.

  Args:
    batch_size: of training, on this process.
    eval_batch_size: of validation, on this process.
    num_shards: devices of this process: batches are [num_shards, B, ...].
    dtype_str: dtype of the images, such as 'float32' or 'bfloat16'.
    shuffle_seed: of the order and the augmentation; None draws it from `rng`.
    rng: key, equal on all processes; None is a seed of 0.
    dataset_configs: see `DatasetConfigs`.
    dataset_service_address: not used.

  Returns:
    A Scenic `Dataset` whose batches hold 'inputs' [..., S, S, C], normalised,
    'label' and 'batch_mask', which is 0 where a batch is padded.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: a key or value is not valid.
  """
  del dataset_service_address
  options = validation_lib.parse(
    DatasetConfigs, dataset_configs or {}, 'dataset_configs.'
  )
  sources = clip_task.sources(options, options.augment, options.image_size)
  classes, dtype = len(sources.train.class_names), jnp.dtype(dtype_str)
  if shuffle_seed is None and rng is not None:
    shuffle_seed = int(jax.random.bits(rng, dtype=jnp.uint32))
  index, processes = jax.process_index(), jax.process_count()
  mean, std = (np.array(x, np.float32) for x in options.pixels)

  def scenic_batch(batch: Mapping[str, np.ndarray]) -> Any:
    label = batch['label'].reshape(-1)  # without the axis of models
    image = batch['image'].reshape(len(label), *batch['image'].shape[-3:])
    if options.onehot_labels:
      label = np.eye(classes, dtype=np.float32)[label]
    arrays = {
      # Grey images get the channels of the mean.
      'inputs': ((np.float32(image) / 255 - mean) / std).astype(dtype),
      'label': label,
      'batch_mask': np.float32(batch.get('mask', np.ones(len(label)))),
    }
    return dataset_utils.shard(arrays, n_devices=num_shards)

  def validation() -> Iterator[Any]:
    while True:
      batches = data.eval_batches(
        sources.validation,
        batch_size=eval_batch_size * processes,
        read=sources.read_validation,
        rows=slice(index * eval_batch_size, (index + 1) * eval_batch_size),
      )
      yield from map(scenic_batch, batches)

  training = data.train_batches(
    sources.train,
    num_models=1,
    batch_size=batch_size * processes,
    seed=shuffle_seed or 0,
    read=sources.read,
    cache=options.cache,
    rows=slice(index * batch_size, (index + 1) * batch_size),
    max_bad_examples=options.max_bad_examples,
  )
  return dataset_utils.Dataset(
    train_iter=map(scenic_batch, training),
    valid_iter=validation(),
    meta_data={
      'num_classes': classes,
      'input_shape': (-1, *[options.image_size] * 2, len(mean)),
      'num_train_examples': len(sources.train),
      'num_eval_examples': len(sources.validation),
      'input_dtype': dtype,
      'target_is_onehot': options.onehot_labels,
    },
  )
