import io
import json
import shutil

import numpy as np
from PIL import Image
import pytest

from modelstock_jax.data import benchmarks
from modelstock_jax.data import objectnet
from modelstock_jax.data import preprocessing


@pytest.fixture
def copied(imagenet, tmp_path):
  shutil.copytree(imagenet / 'objectnet-1.0', tmp_path / 'objectnet-1.0')
  return tmp_path / 'objectnet-1.0'


def test_folders_of_the_mapping_are_kept(imagenet, make_imagenet):
  source = objectnet.ObjectNet(imagenet / 'objectnet-1.0')
  assert source.folders == tuple(sorted(make_imagenet.OBJECTNET))
  assert len(source) == 114  # one each, and one more in the third
  labels = [record['label'] for record in source]
  assert labels == sorted([*range(113), 2])
  for record in source:
    folder, _, name = record['file_name'].partition('/')
    assert folder == source.folders[record['label']]
    path = imagenet / 'objectnet-1.0' / 'images' / folder / name
    assert record['image'] == path.read_bytes()


def test_classes_of_imagenet_stand_for_those_of_objectnet(
  imagenet, make_imagenet
):
  benchmark = benchmarks.find_benchmark('objectnet')
  source = benchmarks.open_benchmark(benchmark, imagenet)
  table = benchmarks.answers(benchmark, source)
  expected = np.full(1000, -1)
  for position, indices in enumerate(make_imagenet.OBJECTNET.values()):
    expected[indices] = position
  np.testing.assert_array_equal(table, expected)
  assert (table >= 0).sum() == 125


def test_one_maximum_is_the_maximum_over_classes(imagenet, make_imagenet):
  # As published: a class has the largest of its ImageNet logits.
  source = objectnet.ObjectNet(imagenet / 'objectnet-1.0')
  logits = np.random.default_rng(0).normal(size=(500, 1000))
  by_class = np.stack(
    [logits[:, ids].max(axis=1) for ids in make_imagenet.OBJECTNET.values()], 1
  )
  choices = np.where(source.answers >= 0, logits, -np.inf)
  actual = source.answers[choices.argmax(axis=1)]
  np.testing.assert_array_equal(actual, by_class.argmax(axis=1))
  assert len(set(actual)) > 90


@pytest.mark.parametrize(
  ('name', 'crop'), [('objectnet', 2), ('objectnet_uncropped', 0)]
)
def test_crop_takes_the_border_away(name, crop, imagenet):
  benchmark = benchmarks.find_benchmark(name)
  source = benchmarks.open_benchmark(benchmark, imagenet)
  encoded = source[5]['image']
  # 16 x 14 pixels. Without the border the inner 12 x 10 are the picture; at
  # size 10 nothing is resized and the middle 10 columns are left.
  pixels = np.asarray(Image.open(io.BytesIO(encoded)))
  height, width, _ = pixels.shape
  inner = pixels[crop : height - crop, crop : width - crop]
  size = len(inner)
  read = benchmarks.benchmark_reader(benchmark, source, size)
  left = (inner.shape[1] - size) // 2
  np.testing.assert_array_equal(
    read(source[5], 5)['image'], inner[:, left : left + size]
  )
  red = (pixels == (255, 0, 0)).all(-1)
  assert red[0].all()
  assert red[:, -1].all()


def test_crop_leaves_something():
  file = io.BytesIO()
  Image.new('RGB', (9, 4)).save(file, 'PNG')
  with pytest.raises(ValueError, match='9 x 4 pixels has no inside of 2'):
    preprocessing.clip_image(file.getvalue(), 8, border=2)


@pytest.mark.parametrize(
  'name',
  [
    'folder_to_objectnet_label.json',
    'objectnet_to_imagenet_1k.json',
    'imagenet_to_label_2012_v2',
    'pytorch_to_imagenet_2012_id.json',
  ],
)
def test_missing_mapping_is_named(copied, name):
  (copied / 'mappings' / name).unlink()
  with pytest.raises(FileNotFoundError, match=f'has no {name}.*objectnet.dev'):
    objectnet.ObjectNet(copied)


def test_missing_images_are_named(copied):
  shutil.rmtree(copied / 'images' / 'thing_040')
  (copied / 'images' / 'thing_077').rename(copied / 'images' / 'elsewhere')
  with pytest.raises(FileNotFoundError, match=r"2 of 113 folders.*'thing_040'"):
    objectnet.ObjectNet(copied)


def _edit(copied, name, change):
  path = copied / 'mappings' / name
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def test_fewer_classes_are_an_error(copied):
  _edit(copied, 'objectnet_to_imagenet_1k.json', lambda x: x.popitem())
  benchmark = benchmarks.find_benchmark('objectnet')
  source = benchmarks.open_benchmark(benchmark, copied.parent)
  with pytest.raises(ValueError, match=r'has 112 classes, objectnet takes 113'):
    benchmarks.answers(benchmark, source)


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    (
      'objectnet_to_imagenet_1k.json',
      lambda x: x.update({'Thing / 003': 'object 5000, thing'}),
      'fit together',
    ),
    (
      'objectnet_to_imagenet_1k.json',
      lambda x: x.update({'Nothing': 'object 1, thing'}),
      "'Nothing'",
    ),
    ('pytorch_to_imagenet_2012_id.json', lambda x: x.clear(), 'fit together'),
  ],
)
def test_mappings_that_do_not_fit(copied, name, change, message):
  _edit(copied, name, change)
  with pytest.raises(ValueError, match=message):
    objectnet.ObjectNet(copied)
