import json
import shutil

import numpy as np
import pytest

from modelstock_jax.data import benchmarks
from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources

DIGITS = ('digits', *benchmarks.SHIFTS)
IMAGENET = [name for name in benchmarks.BENCHMARKS if name not in DIGITS]


@pytest.fixture
def copied(imagenet, tmp_path):
  """A copy of a data set of the tiny ImageNet, to damage."""

  def copy(name):
    shutil.copytree(imagenet / name, tmp_path / name)
    return tmp_path

  return copy


def _opened(name, data_dir):
  benchmark = benchmarks.find_benchmark(name)
  return benchmark, benchmarks.open_benchmark(benchmark, data_dir)


def test_names_are_those_of_the_results():
  assert benchmarks.SHIFTS == (
    'noise',
    'blur',
    'rotate_ccw',
    'rotate_cw',
    'contrast',
    'occlusion',
    'shift',
    'fonts',
  )
  # In the order of the paper's columns.
  assert benchmarks.IMAGENET_SHIFTS == (
    'imagenet_v2',
    'imagenet_r',
    'imagenet_sketch',
    'objectnet_uncropped',
    'imagenet_a',
  )
  assert list(benchmarks.BENCHMARKS) == [
    *DIGITS,
    'imagenet',
    *benchmarks.IMAGENET_SHIFTS,
    'objectnet',
    'imagenet_v2_threshold',
    'imagenet_v2_top',
    'imagenet_real',
    'imagenet_c',
  ]


@pytest.mark.parametrize('name', DIGITS)
def test_benchmark_reads_in_the_label_space_of_the_digits(name):
  benchmark = benchmarks.BENCHMARKS[name]
  assert benchmark.name == name
  assert sources.class_names(benchmark.dataset) == tuple('0123456789')
  source = benchmarks.open_benchmark(benchmark)
  read = benchmarks.benchmark_reader(benchmark, source)
  assert len(source) == sources.split_sizes(benchmark.dataset)['test']
  assert read(source[0], 0)['image'].shape == (8, 8, 1)
  assert {record['label'] for record in source} == set(range(10))


# What make_imagenet.py put there, which the genuine builders have prepared.
@pytest.mark.parametrize(
  ('name', 'labels'),
  [
    ('imagenet_v2', [0, 10, 999]),
    ('imagenet_v2_threshold', [3, 5]),
    ('imagenet_v2_top', [7]),
    ('imagenet_sketch', [2, 2, 998]),
    ('imagenet_r', range(1, 1000, 5)),
    ('imagenet_a', range(4, 1000, 5)),
  ],
)
def test_labels_are_those_of_the_archives(name, labels, imagenet):
  _, source = _opened(name, imagenet)
  assert sorted(record['label'] for record in source) == list(labels)
  assert source.class_names == sources.imagenet_wnids()
  assert source.channels == 3


def test_validation_labels_follow_the_names_of_the_files(
  imagenet, make_imagenet
):
  _, source = _opened('imagenet', imagenet)
  actual = {record['file_name']: record for record in source}
  files = make_imagenet.validation_files()
  assert {name.decode() for name in actual} == files.keys()
  for name, content in files.items():
    assert actual[name.encode()]['image'] == content
  # The first images of the validation set: a sea snake, an alp, ...
  wnids = [
    sources.imagenet_wnids()[actual[name.encode()]['label']]
    for name in sorted(files)
  ]
  assert wnids[:3] == ['n01751748', 'n09193705', 'n02105855']


def test_real_has_lists_of_labels(imagenet, make_imagenet):
  _, source = _opened('imagenet_real', imagenet)
  actual = {record['file_name'].decode(): record['label'] for record in source}
  for name, expected in zip(sorted(actual), make_imagenet.REAL, strict=True):
    label = actual[name]
    assert label.dtype == np.int32
    assert label.tolist() == expected + [-1] * (10 - len(expected))


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('imagenet_r', range(1, 1000, 5)), ('imagenet_a', range(4, 1000, 5))],
)
def test_classes_that_are_present_are_the_choices(name, expected, imagenet):
  table = benchmarks.answers(*_opened(name, imagenet))
  assert table.dtype == np.int32
  assert table.shape == (1000,)
  np.testing.assert_array_equal(np.flatnonzero(table >= 0), expected)
  np.testing.assert_array_equal(table[expected], expected)


@pytest.mark.parametrize('name', ['imagenet', 'imagenet_v2', 'imagenet_real'])
def test_all_classes_are_choices_otherwise(name, imagenet):
  table = benchmarks.answers(*_opened(name, imagenet))
  np.testing.assert_array_equal(table, np.arange(1000))


def test_too_few_classes_are_an_error(imagenet):
  benchmark, _ = _opened('imagenet_r', imagenet)
  # 'test[:50]' is of 50 classes, one image each.
  part = benchmark._replace(split='test[:50]')
  with pytest.raises(ValueError, match=r'50\] has 50 classes, imagenet_r take'):
    benchmarks.answers(part, benchmarks.open_benchmark(part, imagenet))


def test_corruptions_are_all_kinds_and_severities(imagenet, make_imagenet):
  benchmark, source = _opened('imagenet_c', imagenet)
  assert benchmark.configs == [
    f'{kind}_{severity}'
    for kind in make_imagenet.KINDS
    for severity in (1, 2, 3, 4, 5)
  ]
  assert len(benchmark.configs) == 75
  assert len(source) == 75 * 2  # two images in each
  assert source.parts[0].image_shape == (224, 224)
  one = benchmark._replace(dataset='imagenet2012_corrupted/snow_3', configs=())
  part = benchmarks.open_benchmark(one, imagenet)
  place = 2 * benchmark.configs.index('snow_3')
  assert [source[place + i] for i in range(2)] == list(part)
  with pytest.raises(IndexError, match='150 records'):
    source[150]


def test_corruptions_of_unequal_size_are_an_error(copied):
  folder = copied('imagenet2012_corrupted')
  info = folder / 'imagenet2012_corrupted/fog_2/3.1.0/dataset_info.json'
  content = json.loads(info.read_text())
  content['splits'][0]['shardLengths'] = ['1']
  info.write_text(json.dumps(content))
  with pytest.raises(OSError, match=r'fog_2.* has 2 records, not 1'):
    _opened('imagenet_c', folder)


@pytest.mark.parametrize('name', IMAGENET)
def test_images_become_those_of_the_network(name, imagenet):
  benchmark, source = _opened(name, imagenet)
  read = benchmarks.benchmark_reader(benchmark, source, 32)
  for index in (0, len(source) - 1):
    image = read(source[index], index)['image']
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    if not benchmark.crop:
      expected = preprocessing.clip_image(source[index]['image'], 32)
      np.testing.assert_array_equal(image, expected)


def test_corrupted_images_are_taken_as_they_are(imagenet):
  benchmark, source = _opened('imagenet_c', imagenet)
  read = benchmarks.benchmark_reader(benchmark, source, 224)
  np.testing.assert_array_equal(
    read(source[0], 0)['image'], preprocessing.decode(source[0]['image'])
  )


def test_wrong_version(copied):
  folder = copied('imagenet_r')
  (folder / 'imagenet_r/0.2.0').rename(folder / 'imagenet_r/0.1.0')
  with pytest.raises(
    ValueError,
    match=r'version 0\.1\.0, wanted is 0\.2\.\*.*data prepare imagenet_r',
  ):
    _opened('imagenet_r', folder)


@pytest.mark.parametrize('name', IMAGENET)
def test_missing_data_set_names_the_command(name, tmp_path):
  advice = 'Get objectnet-1.0.zip' if 'objectnet' in name else 'data prepare'
  with pytest.raises(FileNotFoundError, match=advice):
    _opened(name, tmp_path)
  with pytest.raises(FileNotFoundError, match='--data_dir'):
    _opened(name, None)
