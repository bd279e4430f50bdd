import json
import logging
import os
import shutil

import pytest

from modelstock_jax.data import classes
from modelstock_jax.data import sources

R = tuple(range(1, 1000, 5))


@pytest.fixture
def data_dir(imagenet, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  skip = shutil.ignore_patterns('classes_*')
  shutil.copytree(imagenet / 'imagenet_r', tmp_path / 'imagenet_r', ignore=skip)
  return tmp_path


def _open(data_dir, split='test'):
  return sources.open_source('imagenet_r', split, data_dir=data_dir)


def _kept(data_dir):
  return sorted(path.name for path in data_dir.rglob('classes_*'))


def test_found_once_and_kept_beside_the_data(data_dir, caplog):
  caplog.set_level(logging.INFO)
  assert classes.present(_open(data_dir)) == R
  assert _kept(data_dir) == ['classes_test.json']
  assert 'Reading imagenet_r/0.2.0/test' in caplog.text
  caplog.clear()
  assert classes.present(_open(data_dir)) == R
  assert 'Reading' not in caplog.text


def test_another_split_has_its_own(data_dir):
  whole = classes.present(_open(data_dir))
  part = _open(data_dir, 'test[:3]')
  found = classes.present(part)
  assert found == tuple(sorted(record['label'] for record in part))
  assert len(found) == 3
  assert classes.present(_open(data_dir)) == whole


@pytest.mark.parametrize(
  'content',
  [
    '',
    '{}',
    '[]',
    '{"name": "imagenet_r/0.2.0/test", "records": 199, "classes": [1]}',
    '{"name": "imagenet_r/0.1.0/test", "records": 200, "classes": [1]}',
    '{"name": "imagenet_r/0.2.0/test", "records": 200}',
  ],
)
def test_what_is_kept_of_others_is_not_believed(data_dir, content):
  path = data_dir / 'imagenet_r/0.2.0/classes_test.json'
  path.write_text(content)
  assert classes.present(_open(data_dir)) == R
  assert tuple(json.loads(path.read_text())['classes']) == R


def test_kept_in_the_cache_where_the_data_cannot_be_written(
  data_dir, monkeypatch
):
  # Permissions do not stop the superuser, so a file stands in the way.
  folder = data_dir / 'imagenet_r/0.2.0'
  (folder / 'classes_test.json').mkdir()
  source = _open(data_dir)
  assert classes.present(source) == R
  (name,) = os.listdir(data_dir / 'cache/modelstock_jax')
  assert name.startswith('classes_test_')
  monkeypatch.setattr(sources.Source, '__iter__', None)  # it is not read again
  assert classes.present(source) == R
