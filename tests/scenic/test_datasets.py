"""The registered dataset, on data that TFDS itself has written."""

import numpy as np
from PIL import Image
import pytest

pytestmark = [
  pytest.mark.oracle,
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
]

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
SHARDS = 2


def smooth(rng, height, width):
  """An image as photographs are: what is next to each other is alike."""
  small = rng.integers(0, 256, (6, 6, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((width, height)))


@pytest.fixture(scope='module')
def pictures(scenic):
  """A builder of 20 + 7 images of several sizes; and these by split."""
  import tensorflow_datasets as tfds

  rng = np.random.default_rng(0)
  sizes = [(40, 30), (30, 50), (64, 64)]
  images = [smooth(rng, *sizes[i % 3]) for i in range(27)]
  splits = {
    'train': [{'image': x, 'label': i % 4} for i, x in enumerate(images[:20])],
    'test': [{'image': x, 'label': i % 4} for i, x in enumerate(images[20:])],
  }

  class Pictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {
            'image': tfds.features.Image(encoding_format='png'),
            'label': tfds.features.ClassLabel(num_classes=4),
          }
        )
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {name: enumerate(rows) for name, rows in splits.items()}

    def _generate_examples(self):
      raise NotImplementedError

  return Pictures, splits


@pytest.fixture(scope='module')
def written(pictures, tmp_path_factory):
  """The folder of the data, and the 7 images of 'test'."""
  builder, splits = pictures
  folder = tmp_path_factory.mktemp('data')
  builder(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder, splits['test']


@pytest.fixture
def build(scenic, written):
  def make(shuffle_seed=0, dtype_str='float32', **configs):
    return scenic.datasets.get_dataset(
      batch_size=6,
      eval_batch_size=4,
      num_shards=SHARDS,
      dtype_str=dtype_str,
      shuffle_seed=shuffle_seed,
      dataset_configs={
        'dataset': 'pictures',
        'data_dir': str(written[0]),
        'validation': 'test',
        'image_size': 24,
        **configs,
      },
    )

  return make


def expected_pixels(image, size=24):
  """CLIP's transform as Pillow does it: short side, middle, normalised."""
  height, width = image.shape[:2]
  short = min(height, width)
  resized = Image.fromarray(image).resize(
    (size * width // short, size * height // short), Image.Resampling.BICUBIC
  )
  left = round((resized.width - size) / 2)
  top = round((resized.height - size) / 2)
  crop = resized.crop((left, top, left + size, top + size))
  return (np.asarray(crop) / 255 - MEAN) / STD


def test_validation_images(build, written):
  dataset = build()
  rows = []
  for _ in range(2):
    batch = next(dataset.valid_iter)
    assert batch['inputs'].shape == (SHARDS, 2, 24, 24, 3)
    assert batch['inputs'].dtype == np.float32
    flat = {k: v.reshape(4, *v.shape[2:]) for k, v in batch.items()}
    rows += [
      (flat['inputs'][i], flat['label'][i])
      for i in range(4)
      if flat['batch_mask'][i]
    ]
  assert len(rows) == 7  # the eighth fills the last batch up
  images = {image.tobytes() for image, _ in rows}
  assert len(images) == 7
  for image, label in rows:
    matches = [
      example
      for example in written[1]
      if np.allclose(expected_pixels(example['image']), image, atol=1e-5)
    ]
    assert len(matches) == 1
    assert matches[0]['label'] == label


def test_what_scenic_asks_for(build):
  meta = build(onehot_labels=True).meta_data
  assert meta['num_classes'] == 4
  assert meta['input_shape'] == (-1, 24, 24, 3)
  assert meta['num_train_examples'] == 20
  assert meta['num_eval_examples'] == 7
  assert meta['target_is_onehot']
  batch = next(build(onehot_labels=True, dtype_str='bfloat16').train_iter)
  assert batch['label'].shape == (SHARDS, 3, 4)
  assert batch['inputs'].dtype.name == 'bfloat16'


def test_training_images_by_seed(build):
  def inputs(batches=7, **keys):
    iterator = build(**keys).train_iter
    return np.stack([next(iterator)['inputs'] for _ in range(batches)])

  first = inputs()
  np.testing.assert_array_equal(first, inputs())
  assert not np.array_equal(first, inputs(shuffle_seed=1))
  flat = first.reshape(-1, 24, 24, 3)
  # Twice through the data, and no crop twice.
  assert len({image.tobytes() for image in flat}) == len(flat) == 42


def test_complete_images(build, written):
  # Without crops or flips the content is that of the examples.
  dataset = build(augment={}, train='test')
  batch = next(dataset.train_iter)
  square = [e for e in written[1] if e['image'].shape == (64, 64, 3)]
  wanted = [expected_pixels(example['image']) for example in square]
  flat = batch['inputs'].reshape(-1, 24, 24, 3)
  near = [min(np.abs(image - w).max() for w in wanted) for image in flat]
  assert min(near) < 1e-5


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'datset': 'x'}, 'nearest is dataset_configs.dataset'),
    ({'augment': {'crop_scale': (0.0, 1.0)}}, 'crop_scale'),
  ],
)
def test_options_that_cannot_be(build, keys, message):
  with pytest.raises(ValueError, match=message):
    build(**keys)
