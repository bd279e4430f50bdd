import logging
import os
import shutil

import numpy as np
import pytest

from modelstock_jax.data import labels
from modelstock_jax.data import sources

R = tuple(range(1, 1000, 5))


@pytest.fixture
def data_dir(imagenet, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  skip = shutil.ignore_patterns('labels_*')
  shutil.copytree(imagenet / 'imagenet_r', tmp_path / 'imagenet_r', ignore=skip)
  return tmp_path


def _open(data_dir, split='test'):
  return sources.open_source('imagenet_r', split, data_dir=data_dir)


def _present(source):
  return tuple(np.unique(labels.read(source)))


def _kept(data_dir):
  return sorted(path.name for path in data_dir.rglob('labels_*'))


def test_read_once_and_kept_next_to_the_data(data_dir, caplog):
  caplog.set_level(logging.INFO)
  actual = labels.read(_open(data_dir))
  assert actual.dtype == np.int32
  assert actual.tolist() == [record['label'] for record in _open(data_dir)]
  assert _present(_open(data_dir)) == R
  assert len(_kept(data_dir)) == 1
  assert caplog.text.count('Reading imagenet_r/0.2.0/test') == 1


def test_another_split_has_its(data_dir):
  labels.read(_open(data_dir))
  part = _open(data_dir, 'test[:3]')
  assert labels.read(part).tolist() == [record['label'] for record in part]
  assert _present(_open(data_dir)) == R


@pytest.mark.parametrize('content', [b'', b'PK', np.zeros(199, np.int32)])
def test_a_damaged_file_is_not_believed(data_dir, content):
  labels.read(_open(data_dir))
  path = data_dir / 'imagenet_r/0.2.0' / _kept(data_dir)[0]
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    np.save(path, content)
  assert _present(_open(data_dir)) == R
  assert tuple(np.unique(np.load(path))) == R


def test_kept_in_the_cache_where_the_data_cannot_be_written(
  data_dir, monkeypatch
):
  # Permissions do not stop the superuser, so a file stands in the way.
  labels.read(_open(data_dir))
  path = data_dir / 'imagenet_r/0.2.0' / _kept(data_dir)[0]
  path.unlink()
  path.mkdir()
  source = _open(data_dir)
  assert _present(source) == R
  assert os.listdir(data_dir / 'cache/modelstock_jax') == [path.name]
  monkeypatch.setattr(sources.TfdsSource, '__getitem__', None)  # not read again
  assert _present(source) == R


def test_held_out_is_a_partition_by_class():
  actual = np.random.default_rng(0).integers(0, 12, 600)
  train, chosen = labels.held_out(actual, 26)
  assert sorted([*train, *chosen]) == list(range(600))
  np.testing.assert_array_equal(train, np.sort(train))
  np.testing.assert_array_equal(chosen, np.sort(chosen))
  np.testing.assert_array_equal(np.bincount(actual[chosen]), [26] * 12)
  np.testing.assert_array_equal(chosen, labels.held_out(actual, 26)[1])


def test_held_out_draws_uniformly():
  # 2000 classes of ten examples, of which three are drawn.
  _, chosen = labels.held_out(np.repeat(np.arange(2000), 10), 3)
  counts = np.bincount(chosen % 10)
  # Binomial(2000, 0.3): five deviations of 20.5.
  assert abs(counts - 600).max() < 103


@pytest.mark.parametrize(
  ('actual', 'per_class', 'message'),
  [
    ([0, 0, 1, 2, 2], 2, r'\{0: 2, 1: 1, 2: 2\}'),
    ([0, 0, 0, 1], 1, r'\{1: 1\}'),
    ([], 26, 'per_class=26'),
    ([0, 0], 0, 'per_class=0'),
  ],
)
def test_bad_held_out(actual, per_class, message):
  with pytest.raises(ValueError, match=message):
    labels.held_out(np.array(actual, int), per_class)
