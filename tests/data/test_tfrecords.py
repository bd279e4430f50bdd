import importlib.util

import pytest

from modelstock_jax.data import tfrecords


def test_folder_without_a_version_names_one(imagenet, tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r'no version of a data set.*imagenet_r/0\.2\.0'
  ):
    tfrecords.convert(imagenet / 'imagenet_r', tmp_path)
  with pytest.raises(FileNotFoundError, match=r'such as imagenet2012/5\.1\.0'):
    tfrecords.convert(tmp_path / 'nowhere', tmp_path)


def test_array_record_needs_no_copy(imagenet, tmp_path):
  with pytest.raises(ValueError, match='in the format array_record: only'):
    tfrecords.convert(imagenet / 'imagenet_r' / '0.2.0', tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def tfrecord(imagenet, tmp_path):
  """Write metadata that name tfrecord, without the records."""
  folder = tmp_path / 'old' / 'imagenet_r' / '0.2.0'
  folder.mkdir(parents=True)
  for name in ('dataset_info.json', 'features.json', 'label.labels.txt'):
    text = (imagenet / 'imagenet_r' / '0.2.0' / name).read_text()
    (folder / name).write_text(text.replace('"array_record"', '"tfrecord"'))
  return folder


def test_copy_that_is_there_is_kept(tfrecord, tmp_path):
  (tmp_path / 'new' / 'imagenet_r' / '0.2.0').mkdir(parents=True)
  with pytest.raises(FileExistsError, match=r'imagenet_r/0\.2\.0 is there'):
    tfrecords.convert(tfrecord, tmp_path / 'new')


@pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is not None,
  reason='TensorFlow is installed',
)
def test_tensorflow_is_asked_for(tfrecord, tmp_path):
  with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[prepare\]'"):
    tfrecords.convert(tfrecord, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
