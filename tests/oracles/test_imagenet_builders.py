"""The genuine TFDS builders on tiny archives, read back by our readers."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from modelstock_jax.cli import main
from modelstock_jax.data import benchmarks
from modelstock_jax.data import sources

pytestmark = pytest.mark.oracle

NAMES = [
  'imagenet',
  'imagenet_v2',
  'imagenet_v2_threshold',
  'imagenet_v2_top',
  'imagenet_r',
  'imagenet_a',
  'imagenet_sketch',
  'imagenet_real',
]


@pytest.fixture(scope='module')
def built(run_script, tmp_path_factory):
  """Built in another process: TensorFlow warns, and warnings are errors."""
  folder = tmp_path_factory.mktemp('built')
  script = (
    'import pathlib, sys\n'
    'sys.path.insert(0, sys.argv[1])\n'
    'import make_imagenet\n'
    'make_imagenet.build(pathlib.Path(sys.argv[2]))\n'
  )
  here = pathlib.Path(__file__).parents[1] / 'data'
  run_script(script, here, folder)
  return folder


@pytest.fixture(scope='module')
def archives(make_imagenet, tmp_path_factory):
  """Return image and wnid by the file name that the builder keeps."""
  folder = tmp_path_factory.mktemp('archives')
  make_imagenet.write_folders(folder)
  wnids = make_imagenet.wnids()
  actual = {name: {} for name in NAMES}
  for name, variant in (
    ('imagenet_v2', 'matched-frequency'),
    ('imagenet_v2_threshold', 'threshold-0.7'),
    ('imagenet_v2_top', 'topimages'),
  ):
    top, _ = make_imagenet.V2[variant]
    for path in (folder / top).glob('*/*'):
      label = wnids[int(path.parent.name)]
      key = f'{path.parent.name}/{path.name}'
      actual[name][key] = (path.read_bytes(), label)
  for path in (folder / 'imagenet-r').glob('*/*'):
    key = f'{path.parent.name}/{path.name}'
    actual['imagenet_r'][key] = (path.read_bytes(), path.parent.name)
  for path in (folder / 'imagenet-a').glob('*/*'):
    actual['imagenet_a'][path.name] = (path.read_bytes(), path.parent.name)
  return actual


@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('imagenet_v2', 3),
    ('imagenet_v2_threshold', 2),
    ('imagenet_v2_top', 1),
    ('imagenet_r', 200),
    ('imagenet_a', 200),
  ],
)
def test_folders_come_back_as_they_went_in(name, count, built, archives):
  source = benchmarks.open_benchmark(benchmarks.find_benchmark(name), built)
  assert len(source) == count
  actual = {
    record['file_name'].decode(): (
      record['image'],
      source.class_names[record['label']],
    )
    for record in source
  }
  assert actual == archives[name]


def test_training_images_come_back(built, make_imagenet):
  source = sources.open_source('imagenet2012', 'train', data_dir=built)
  wnids = make_imagenet.wnids()
  expected = {
    f'{wnids[label]}_{i}.JPEG': (
      make_imagenet.picture(10 * label + i, (18 + i, 14)),
      label,
    )
    for label in make_imagenet.TRAIN_CLASSES
    for i in range(make_imagenet.PER_CLASS)
  }
  actual = {r['file_name'].decode(): (r['image'], r['label']) for r in source}
  assert actual == expected


def test_validation_labels_are_those_of_the_list_that_tfds_has(
  built, make_imagenet
):
  import tensorflow_datasets as tfds

  path = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
  labels = path.read_text().split()
  files = make_imagenet.validation_files()
  expected = {
    name: (content, labels[i])
    for i, (name, content) in enumerate(sorted(files.items()))
  }
  source = sources.open_source('imagenet2012', 'validation', data_dir=built)
  actual = {
    record['file_name'].decode(): (
      record['image'],
      source.class_names[record['label']],
    )
    for record in source
  }
  assert actual == expected


def test_real_lists_come_back(built, make_imagenet):
  benchmark = benchmarks.find_benchmark('imagenet_real')
  source = benchmarks.open_benchmark(benchmark, built)
  names = sorted(make_imagenet.validation_files())
  expected = dict(zip(names, make_imagenet.REAL, strict=True))
  actual = {
    record['file_name'].decode(): record['label'][record['label'] >= 0].tolist()
    for record in source
  }
  assert actual == expected


def test_sketches_come_back(built, make_imagenet):
  benchmark = benchmarks.find_benchmark('imagenet_sketch')
  source = benchmarks.open_benchmark(benchmark, built)
  actual = sorted(
    (int(r['file_name'].decode()[-6]), r['label'], r['image'][:4])
    for r in source
  )
  assert [label for _, label, _ in actual] == list(make_imagenet.SKETCH)
  # What is named .JPEG need not be one.
  assert actual[1][2] == b'\x89PNG'
  assert actual[0][2][:2] == b'\xff\xd8'


def test_corrupted_images_are_of_224_pixels(built):
  source = sources.open_source(
    'imagenet2012_corrupted/contrast_1', 'validation', data_dir=built
  )
  assert source.image_shape == (224, 224)
  assert len(source) == 2


def test_committed_copy_equals_a_fresh_build(built, imagenet):
  count = 0
  for info in sorted(built.rglob('dataset_info.json')):
    version = info.parent.relative_to(built)
    dataset = str(version.parent)
    label = 'real_label' if 'real' in dataset else 'label'
    sizes = sources.split_sizes(dataset, data_dir=built)
    assert sources.split_sizes(dataset, data_dir=imagenet) == sizes
    assert (imagenet / version).is_dir()
    for split in sizes:
      pair = [
        list(sources.open_source(dataset, split, data_dir=where, label=label))
        for where in (built, imagenet)
      ]
      for one, other in zip(*pair, strict=True):
        assert one.keys() == other.keys()
        for name in one:
          np.testing.assert_array_equal(one[name], other[name])
        count += 1
  assert count == 15 + 11 + 11 + 200 + 200 + 6 + 3 + 2


def _run(*argv):
  """`modelstock`, in a process of its own for TensorFlow's warnings."""
  return subprocess.run(
    [sys.executable, '-m', 'modelstock_jax.cli.main', *map(str, argv)],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=pathlib.Path(__file__).parents[2],
    check=False,
  )


@pytest.mark.parametrize(
  ('dataset', 'label'),
  [('imagenet2012/5.1.0', 'label'), ('imagenet2012_real/1.0.0', 'real_label')],
)
def test_converted_records_are_those_of_tfrecord(
  dataset, label, tfrecord, tmp_path
):
  import tensorflow_datasets as tfds

  name, _, version = dataset.partition('/')
  with pytest.raises(ValueError, match='data convert'):
    sources.open_source(name, 'validation', data_dir=tfrecord, label=label)
  done = _run('data', 'convert', tfrecord / dataset, tmp_path)
  assert done.returncode == 0, done.stderr
  assert f'Wrote {tmp_path / dataset}' in done.stdout
  assert sorted(path.name for path in (tmp_path / name).iterdir()) == [version]

  builder = tfds.builder_from_directory(tfrecord / dataset)
  sizes = {
    split: info.num_examples for split, info in builder.info.splits.items()
  }
  assert sources.split_sizes(name, data_dir=tmp_path) == sizes
  for split in sizes:
    shards = list(
      (tmp_path / dataset).glob(f'*-{split}.array_record-*-of-00003')
    )
    assert len(shards) == 3
    skip = {'image': tfds.decode.SkipDecoding()}
    theirs = list(tfds.as_numpy(builder.as_dataset(split=split, decoders=skip)))
    ours = list(
      sources.open_source(name, split, data_dir=tmp_path, label=label)
    )
    for one, other in zip(ours, theirs, strict=True):
      if label == 'real_label':
        one['label'] = one['label'][one['label'] >= 0]
        other['label'] = other['real_label']
      assert one.keys() == other.keys()
      for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_damaged_tfrecord_is_named(tfrecord, tmp_path):
  copy = tmp_path / 'imagenet2012' / '5.1.0'
  copy.mkdir(parents=True)
  for path in (tfrecord / 'imagenet2012' / '5.1.0').iterdir():
    content = bytearray(path.read_bytes())
    if 'train' in path.name and '00001-of' in path.name:
      content[200:210] = bytes(10)
    (copy / path.name).write_bytes(content)
  done = _run('data', 'convert', copy, tmp_path / 'new')
  assert done.returncode == 1
  assert 'train.tfrecord-00001-of-00003 cannot be read' in done.stderr
  assert not list((tmp_path / 'new').rglob('5.1.0'))


def test_prepare_runs_the_builder(make_imagenet, tmp_path):
  make_imagenet.write_manual(tmp_path / 'manual')
  done = _run(
    *('data', 'prepare', 'imagenet', f'--data_dir={tmp_path}/data'),
    f'--manual_dir={tmp_path}/manual',
  )
  assert done.returncode == 0, done.stderr
  assert 'version 5.1.0, array_record, splits: train 15, validation 11' in (
    done.stdout
  )
  # Again: what is there is kept.
  assert (
    main.main(['data', 'check', 'imagenet', f'--data_dir={tmp_path}/data']) == 0
  )


def test_unknown_data_set_is_named(tmp_path):
  done = _run('data', 'prepare', 'imagenot', f'--data_dir={tmp_path}')
  assert done.returncode == 1
  assert "TFDS does not know 'imagenot'" in done.stderr


def test_missing_archives_are_named(tmp_path):
  done = _run('data', 'prepare', 'imagenet', f'--data_dir={tmp_path}')
  assert done.returncode == 1
  assert 'ILSVRC2012_img_train.tar' in done.stderr
  assert 'https://image-net.org/download-images' in done.stderr
  assert str(tmp_path / 'downloads' / 'manual') in done.stderr
