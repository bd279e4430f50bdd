"""Any TFDS image classification data for Scenic, normalised as for CLIP.

Importing this module registers the dataset 'modelstock_tfds'.
"""

from collections.abc import Iterator
import functools
from typing import Any

from jax import numpy as jnp
import numpy as np
import pydantic
from scenic.dataset_lib import dataset_utils
from scenic.dataset_lib import datasets
import tensorflow_datasets as tfds

from modelstock_jax.clip import saving
from modelstock_jax.scenic import options as options_lib
from modelstock_jax.training import config_keys

NAME = 'modelstock_tfds'


class DatasetConfigs(config_keys.Section):
  """The block `config.dataset_configs`.

  Attributes:
    tfds_name: such as 'imagenet2012:5.*.*'.
    data_dir: '' is TFDS's own.
    train_split: of training.
    eval_split: of validation.
    image_size: sides of the images, in pixels.
    crop_area: of a training image, the least and the greatest share;
      (1, 1) is the whole image.
    flip: half of the training images.
    shuffle_buffer: images, encoded.
    cache: keep encoded images in memory.
    onehot_labels: as Scenic's mixup takes them.
  """

  tfds_name: str = pydantic.Field(min_length=1)
  data_dir: str = ''
  train_split: str = 'train'
  eval_split: str = 'validation'
  image_size: int = pydantic.Field(224, ge=1)
  crop_area: tuple[float, float] = pydantic.Field((0.5, 1.0), strict=False)
  flip: bool = True
  shuffle_buffer: int = pydantic.Field(16384, ge=1)
  cache: bool = False
  onehot_labels: bool = False

  @pydantic.field_validator('crop_area')
  @classmethod
  def _check_area(cls, area: tuple[float, float]) -> tuple[float, float]:
    if not 0 < area[0] <= area[1] <= 1:
      raise ValueError('must be 0 < least <= greatest <= 1')
    return area


@datasets.add_dataset(NAME)
def get_dataset(
  *,
  batch_size: int,
  eval_batch_size: int,
  num_shards: int,
  dtype_str: str = 'float32',
  shuffle_seed: int | None = 0,
  rng: Any = None,
  prefetch_buffer_size: int = 2,
  dataset_configs: Any = None,
  dataset_service_address: str | None = None,
) -> dataset_utils.Dataset:
  """Build training and validation data.

  Training images are cropped at random, resized and flipped; validation
  images are resized (bicubic, antialiased) by their shorter side and cropped
  in the middle, as in CLIP's own transform. Both are normalised by CLIP's
  mean and standard deviation. With a `shuffle_seed` order, crops and flips
  are the same in each run.

  Args:
    batch_size: of training, on this process.
    eval_batch_size: of validation, likewise.
    num_shards: devices of this process: batches are [num_shards, B, ...].
    dtype_str: 'float32' or 'bfloat16', of the images.
    shuffle_seed: of the order and the crops; None draws another each run.
    rng: not used.
    prefetch_buffer_size: batches made ahead.
    dataset_configs: see `DatasetConfigs`.
    dataset_service_address: not supported.

  Returns:
    A Scenic `Dataset` whose batches hold 'inputs' [..., S, S, 3], 'label'
    and 'batch_mask', the last 0 where a batch is filled up.

  Raises:
    ValueError: for an unknown key or value, or data that is not of labelled
      images.
  """
  import tensorflow as tf

  del rng
  options = options_lib.parse(
    DatasetConfigs, dataset_configs or {}, 'dataset_configs'
  )
  if dtype_str not in ('float32', 'bfloat16') or dataset_service_address:
    raise ValueError(
      f"data_dtype_str: must be 'float32' or 'bfloat16', got {dtype_str!r}. "
      'dataset_service_address: must not be set, got '
      f'{dataset_service_address!r}.'
    )
  builder = tfds.builder(options.tfds_name, data_dir=options.data_dir or None)
  builder.download_and_prepare()
  classes = _num_classes(builder)
  if shuffle_seed is None:
    shuffle_seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
  one_hot = classes if options.onehot_labels else 0
  finish = functools.partial(_finish, one_hot, getattr(tf, dtype_str))
  size = options.image_size

  def augment(index, example):
    seed = tf.stack([tf.constant(shuffle_seed, tf.int64), index])
    image = _random_crop(_colour(example), options.crop_area, size, seed)
    if options.flip:
      image = tf.image.stateless_random_flip_left_right(
        image, seed + tf.constant([1, 0], tf.int64)
      )
    return finish(image, example)

  training = _read(builder, options.train_split)
  validation = _read(builder, options.eval_split)
  if options.cache:
    training, validation = training.cache(), validation.cache()
  training = training.shuffle(
    options.shuffle_buffer, seed=shuffle_seed, reshuffle_each_iteration=True
  )
  training = training.repeat().enumerate().map(augment, tf.data.AUTOTUNE)
  training = training.batch(batch_size, drop_remainder=True)
  validation = validation.map(
    lambda example: finish(_middle(_colour(example), size), example),
    tf.data.AUTOTUNE,
  )
  validation = validation.batch(eval_batch_size).repeat()
  batches = functools.partial(_batches, prefetch_buffer_size, num_shards)
  splits = builder.info.splits
  return dataset_utils.Dataset(
    train_iter=batches(training, batch_size, train=True),
    valid_iter=batches(validation, eval_batch_size, train=False),
    meta_data={
      'num_classes': classes,
      'input_shape': (-1, size, size, 3),
      'num_train_examples': splits[options.train_split].num_examples,
      'num_eval_examples': splits[options.eval_split].num_examples,
      'input_dtype': getattr(jnp, dtype_str),
      'target_is_onehot': options.onehot_labels,
    },
  )


def _num_classes(builder: Any) -> int:
  features = builder.info.features
  try:
    features['image']
    return features['label'].num_classes
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"dataset_configs.tfds_name: {builder.name} has no 'image' with a "
      f"'label' of classes: {features}."
    ) from error


def _read(builder: Any, split: str) -> Any:
  """Read this process's part of a split: {'image': uint8[H, W, C], 'label'}."""
  import tensorflow as tf

  part = tfds.split_for_jax_process(split)
  if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
    read = tfds.ReadConfig(try_autocache=False)
    return builder.as_dataset(split=part, read_config=read)
  # TFDS reads array_record by index alone.
  source = builder.as_data_source(split=part)
  channels = builder.info.features['image'].shape[-1]

  def look_up(index):
    example = source[int(index)]
    return example['image'], np.int64(example['label'])

  def example(index):
    image, label = tf.numpy_function(look_up, [index], [tf.uint8, tf.int64])
    image.set_shape([None, None, channels])
    label.set_shape([])
    return {'image': image, 'label': label}

  return tf.data.Dataset.range(len(source)).map(example)


def _batches(
  ahead: int, num_shards: int, data: Any, batch_size: int, *, train: bool
) -> Iterator[Any]:
  for batch in data.prefetch(ahead).as_numpy_iterator():
    padded = dataset_utils.maybe_pad_batch(
      dict(batch), train=train, batch_size=batch_size
    )
    yield dataset_utils.shard(padded, n_devices=num_shards)


def _colour(example: Any) -> Any:
  import tensorflow as tf

  image = example['image']
  return tf.image.grayscale_to_rgb(image) if image.shape[-1] == 1 else image


def _resize(image: Any, height: Any, width: Any) -> Any:
  """Bicubic and antialiased, to whole levels as Pillow gives them."""
  import tensorflow as tf

  image = tf.image.resize(
    image, tf.stack([height, width]), method='bicubic', antialias=True
  )
  return tf.clip_by_value(tf.round(image), 0, 255)


def _middle(image: Any, size: int) -> Any:
  """Resize the shorter side to `size`, and cut the square in the middle."""
  import tensorflow as tf

  height, width = tf.shape(image)[0], tf.shape(image)[1]
  short = tf.minimum(height, width)
  # Rounded down, as torchvision does it.
  image = _resize(image, size * height // short, size * width // short)
  top = tf.cast(tf.round((tf.shape(image)[0] - size) / 2), tf.int32)
  left = tf.cast(tf.round((tf.shape(image)[1] - size) / 2), tf.int32)
  return tf.ensure_shape(
    image[top : top + size, left : left + size], (size, size, 3)
  )


def _random_crop(image: Any, area: Any, size: int, seed: Any) -> Any:
  """Resize a random part of the image, its sides 3:4 to 4:3."""
  import tensorflow as tf

  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    tf.shape(image),
    tf.zeros([1, 0, 4], tf.float32),
    seed,
    min_object_covered=0.0,
    aspect_ratio_range=(3 / 4, 4 / 3),
    area_range=tuple(area),
    use_image_if_no_bounding_boxes=True,
  )
  part = tf.slice(image, begin, extent)
  part = tf.ensure_shape(part, (None, None, 3))
  return tf.ensure_shape(_resize(part, size, size), (size, size, 3))


def _finish(one_hot: int, dtype: Any, image: Any, example: Any) -> Any:
  """Normalise an image, and give the label `one_hot` classes if not 0."""
  import tensorflow as tf

  mean = tf.constant(saving.MEAN, tf.float32)
  std = tf.constant(saving.STD, tf.float32)
  label = example['label']
  return {
    'inputs': tf.cast((tf.cast(image, tf.float32) / 255 - mean) / std, dtype),
    'label': tf.one_hot(label, one_hot)
    if one_hot
    else tf.cast(label, tf.int32),
  }
