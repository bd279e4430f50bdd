import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets

from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources

SPLITS = {'train': 800, 'validation': 400, 'test': 597}
# TFDS writes the shards of a split as NAME-SPLIT.array_record-I-of-N.
SHARD = 'digits/1.0.0/digits-train.array_record-00000-of-00001'


@pytest.fixture
def copied(tmp_path):
  shutil.copytree(sources.BUNDLED_DIR, tmp_path / 'data')
  return tmp_path / 'data'


def _read(split):
  records = list(sources.open_source('digits', split))
  images = [preprocessing.decode(record['image']) for record in records]
  indices = [int(record['index']) for record in records]
  labels = [record['label'] for record in records]
  return np.stack(images), np.array(labels), np.array(indices)


@pytest.mark.parametrize('split', SPLITS)
def test_digits_are_those_of_sklearn(split):
  images, labels, indices = _read(split)
  real = datasets.load_digits()
  assert images.shape == (SPLITS[split], 8, 8, 1)
  # 255 / 16 is no whole number, but its rounding can be undone.
  counts = np.round(images[..., 0] * (16 / 255))
  np.testing.assert_array_equal(counts, real.images[indices])
  np.testing.assert_array_equal(labels, real.target[indices])


def test_splits_are_disjoint_and_complete():
  indices = np.concatenate([_read(split)[2] for split in SPLITS])
  np.testing.assert_array_equal(np.sort(indices), np.arange(1797))
  assert sources.split_sizes('digits') == SPLITS


@pytest.mark.parametrize(
  ('split', 'per_class'),
  [('train', 80), ('validation', 40), ('train[:200]', 20), ('train[:50]', 5)],
)
def test_classes_are_balanced(split, per_class):
  source = sources.open_source('digits', split)
  counts = np.bincount([record['label'] for record in source], minlength=10)
  np.testing.assert_array_equal(counts, per_class)


def test_prefix_is_a_prefix():
  whole = sources.open_source('digits', 'train')
  prefix = sources.open_source('digits', 'train[:200]')
  assert len(prefix) == 200
  for index in (0, 57, 199):
    assert prefix[index] == whole[index]


def test_font_sets_are_whole_and_disjoint():
  glyphs = list(sources.open_source('glyphs', 'train'))
  held_out = list(sources.open_source('font_digits', 'test'))
  assert len(glyphs) == 36 * 16
  assert len(held_out) == 600
  fonts = [{record['font'] for record in part} for part in (glyphs, held_out)]
  assert [len(names) for names in fonts] == [16, 6]
  assert not fonts[0] & fonts[1]
  counts = np.bincount([record['label'] for record in held_out])
  np.testing.assert_array_equal(counts, 60)
  assert preprocessing.decode(glyphs[0]['image']).shape == (32, 32, 1)
  assert preprocessing.decode(held_out[0]['image']).shape == (8, 8, 1)


def test_source_knows_its_kind():
  source = sources.open_source('digits', 'test')
  assert source.channels == 1
  assert source.num_classes == 10
  assert source.name == 'digits/1.0.0/test'
  assert isinstance(source[0]['image'], bytes)
  for index in (-1, 597):
    with pytest.raises(IndexError, match='597 records'):
      source[index]


def test_newest_version_is_read(copied):
  newer = copied / 'digits' / '1.10.0'
  shutil.copytree(copied / 'digits' / '1.0.0', newer)
  shutil.copytree(newer, copied / 'digits' / '1.9.0')
  (copied / 'digits' / 'notes').mkdir()
  for version in ('1.10.0', '1.9.0'):
    info = copied / 'digits' / version / 'dataset_info.json'
    info.write_text(info.read_text().replace('1.0.0', version))
  source = sources.open_source('digits', 'test', data_dir=copied)
  assert source.name == 'digits/1.10.0/test'


def test_reading_imports_no_tensorflow():
  program = """
import sys
from modelstock_jax.data import benchmarks, pipeline, sources
source = sources.open_source('digits', 'train')
batches = pipeline.train_batches(source, num_models=2, batch_size=8, seed=0)
next(batches)
next(pipeline.eval_batches(benchmarks.BENCHMARKS['noise'], batch_size=8))
print('tensorflow' in sys.modules)
# Iterators stay open: leaving must not wait for their threads.
"""
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    timeout=60,
    cwd=pathlib.Path(__file__).parents[2],
    check=True,
  )
  assert done.stdout.strip() == 'False'
  assert 'group size' not in done.stderr


def test_missing_data_set(tmp_path, copied):
  with pytest.raises(FileNotFoundError) as caught:
    sources.open_source('digits', 'train', data_dir=tmp_path / 'nowhere')
  message = str(caught.value)
  assert str(tmp_path / 'nowhere') in message
  assert 'found: none' in message
  assert 'python -m modelstock_jax.data.prepare' in message

  with pytest.raises(FileNotFoundError) as caught:
    sources.open_source('imagenet2012', 'train', data_dir=copied)
  message = str(caught.value)
  assert 'found: digits, font_digits, glyphs' in message
  assert 'tfds build imagenet2012 --file_format=array_record' in message


@pytest.mark.parametrize(
  ('split', 'message'),
  [
    ('trian', "split='trian'.*test, train, validation"),
    ('train+trian', 'test, train, validation'),
    ('train[:2', re.escape("split='train[:2'")),
    ('train[:9999]', '9999.*800 examples'),
    ('train[5:5]', 'is empty'),
  ],
)
def test_bad_split(split, message):
  with pytest.raises(ValueError, match=message):
    sources.open_source('digits', split)


# 65,536 is the cruel one: array_record reads such a file as empty records.
@pytest.mark.parametrize('size', [0, 1000, 65536, 100000, 196607])
def test_truncated_file(copied, size):
  path = copied / SHARD
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(OSError, match=r'digits.*damaged or incomplete.*again'):
    sources.open_source('digits', 'train', data_dir=copied)


def test_corrupt_record_is_named(copied):
  path = copied / SHARD
  content = bytearray(path.read_bytes())
  content[60000:60100] = bytes(100)
  path.write_bytes(content)
  source = sources.open_source('digits', 'train', data_dir=copied)
  with pytest.raises(OSError, match=r'train\[\d+\] cannot be read'):
    list(source)


def test_missing_file(copied):
  (copied / SHARD).unlink()
  with pytest.raises(OSError, match=r'train\[0\].*No such file'):
    sources.open_source('digits', 'train', data_dir=copied)


def test_damaged_metadata(copied):
  (copied / 'digits' / '1.0.0' / 'dataset_info.json').write_text('{')
  with pytest.raises(OSError, match=r'is damaged.*Prepare it again with'):
    sources.open_source('digits', 'train', data_dir=copied)
