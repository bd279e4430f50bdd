"""The data sets of this library for Scenic's trainers.

Importing this module registers the dataset 'modelstock_tfds'.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import pydantic
from scenic.dataset_lib import dataset_utils
from scenic.dataset_lib import datasets

from modelstock_jax import data
from modelstock_jax.scenic import options as options_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config_keys

NAME = 'modelstock_tfds'


class DatasetConfigs(config_keys.Data):
  """The block `config.dataset_configs`: `config_keys.Data` and three keys.

  Attributes:
    image_size: side of an image, pixels
    onehot_labels: labels as Scenic's mixup takes them
    augment: see `config_keys.Augment`
  """

  image_size: int = pydantic.Field(224, ge=1)
  onehot_labels: bool = False
  augment: config_keys.Augment = config_keys.Augment(
    crop_scale=(0.5, 1.0), flip=0.5
  )


@datasets.add_dataset(NAME)
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
    dtype_str: dtype of the images, 'float32' or 'bfloat16'.
    shuffle_seed: of the order and the augmentation; None draws it from `rng`.
    rng: key, equal on all processes; None is a seed of 0.
    dataset_configs: see `DatasetConfigs`.
    dataset_service_address: not supported.

  Returns:
    A Scenic `Dataset` whose batches hold 'inputs' [..., S, S, C], normalised,
    'label' and 'batch_mask', which is 0 where a batch is padded.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: a key or value is not valid.
  """
  if dtype_str not in ('float32', 'bfloat16') or dataset_service_address:
    raise ValueError(
      f"data_dtype_str: must be 'float32' or 'bfloat16', got {dtype_str!r}. "
      'dataset_service_address: must not be set, got '
      f'{dataset_service_address!r}.'
    )
  options = options_lib.parse(
    DatasetConfigs, dataset_configs or {}, 'dataset_configs'
  )
  sources = clip_task.sources(options, options.augment, options.image_size)
  meta_data = {
    'num_classes': len(sources.train.class_names),
    'input_shape': (-1, *[options.image_size] * 2, len(options.mean)),
    'num_train_examples': len(sources.train),
    'num_eval_examples': len(sources.validation),
    'input_dtype': jnp.dtype(dtype_str),
    'target_is_onehot': options.onehot_labels,
  }
  if shuffle_seed is None and rng is not None:
    shuffle_seed = int(jax.random.bits(rng, dtype=jnp.uint32))
  index, processes = jax.process_index(), jax.process_count()
  batches = functools.partial(_batches, options, meta_data, num_shards)

  def validation() -> Iterator[data.pipeline.Batch]:
    while True:
      yield from data.eval_batches(
        sources.validation,
        batch_size=eval_batch_size * processes,
        read=sources.read_validation,
        rows=slice(index * eval_batch_size, (index + 1) * eval_batch_size),
      )

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
    train_iter=batches(training),
    valid_iter=batches(validation()),
    meta_data=meta_data,
  )


def _batches(
  options: DatasetConfigs,
  meta_data: dict[str, Any],
  num_shards: int,
  batches: Iterator[data.pipeline.Batch],
) -> Iterator[Any]:
  """Yield batches as Scenic has them: normalised, and split over devices."""
  mean, std = (np.array(x, np.float32) for x in (options.mean, options.std))
  for batch in batches:
    label = batch['label'].reshape(-1)  # without the axis of models
    # Grey images get the channels of the mean.
    image = batch['image'].reshape(len(label), *batch['image'].shape[-3:])
    image = (np.float32(image) / 255 - mean) / std
    if options.onehot_labels:
      label = np.eye(meta_data['num_classes'], dtype=np.float32)[label]
    arrays = {
      'inputs': image.astype(meta_data['input_dtype']),
      'label': label,
      'batch_mask': np.float32(batch.get('mask', np.ones(len(label)))),
    }
    yield dataset_utils.shard(arrays, n_devices=num_shards)
