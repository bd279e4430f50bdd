import io

import numpy as np
from PIL import Image
import pytest

from modelstock_jax.data import folders
from modelstock_jax.data import inspection
from modelstock_jax.data import pictures
from modelstock_jax.data import sources


@pytest.fixture
def folder(tmp_path):
  """A folder `pics` of two classes, 12 pictures each, without splits."""
  for label in ('cat', 'red fox'):
    (tmp_path / 'pics' / label).mkdir(parents=True)
    for number in range(12):
      rng = np.random.default_rng([number, len(label)])
      file = io.BytesIO()
      pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
      Image.fromarray(pixels).save(file, 'png')
      path = tmp_path / 'pics' / label / f'{number}.png'
      path.write_bytes(file.getvalue())
  (tmp_path / 'pics' / 'README').write_text('not in a class')
  return tmp_path / 'pics'


@pytest.mark.parametrize('splits', [False, True])
def test_examples_are_those_of_the_import(splits, folder, tmp_path):
  if splits:
    for name in ('train', 'val', 'test'):
      (tmp_path / 'split' / name).mkdir(parents=True)
    for number, name in enumerate(['val', 'test'] + ['train'] * 10):
      for label in ('cat', 'red fox'):
        target = tmp_path / 'split' / name / label / f'{number}.png'
        target.parent.mkdir(exist_ok=True)
        (folder / label / f'{number}.png').rename(target)
    folder = tmp_path / 'split'
  name = f'folder:{folder}'
  pictures.import_pictures(folder, tmp_path / 'data', 'pics')
  sizes = sources.split_sizes('pics', data_dir=tmp_path / 'data')
  assert sources.split_sizes(name) == sizes
  assert sources.class_names(name) == ('cat', 'red fox')
  assert sources.check_files(name) == []
  for split, size in sizes.items():
    expected = sources.open_source('pics', split, data_dir=tmp_path / 'data')
    actual = sources.open_source(name, split, data_dir=tmp_path)
    assert list(actual) == list(expected)
    assert len(actual) == size
    assert actual.class_names == expected.class_names
    assert actual.channels == expected.channels
    assert actual.image_shape == expected.image_shape
  with pytest.raises(IndexError, match=f'it has {size} records'):
    actual[size]


def test_paths_are_those_of_the_working_directory(folder, monkeypatch):
  monkeypatch.chdir(folder.parent)
  source = sources.open_source('folder:pics', 'validation', data_dir='data')
  assert source.path == folder
  # A run is resumed only with the same pictures in the same classes.
  (folder / 'cat' / '0.png').rename(folder / 'cat' / '20.png')
  moved = sources.open_source('folder:pics', 'train', data_dir='data')
  again = sources.open_source('folder:pics', 'train', data_dir='data')
  assert source.name.startswith('folder:pics@')
  assert moved.name == again.name != source.name.replace('validation', 'train')


def test_check_decodes_all(folder):
  text = inspection.inspect(f'folder:{folder}', read_all=True)
  assert 'read in place, splits: train 20, validation 4' in text
  assert 'train: all 20 images were read, of 2 classes' in text
  (folder / 'cat' / '5.png').write_bytes(b'hello')
  with pytest.raises(ValueError, match='1 of 20 records are damaged'):
    inspection.inspect(f'folder:{folder}', read_all=True)


def test_folders_that_cannot_be_used(folder, monkeypatch):
  name = f'folder:{folder}'
  with pytest.raises(FileNotFoundError, match='no such folder'):
    sources.split_sizes(f'{name}s')
  for split in ('test', 'train[:5]', 'train:held_out=1'):
    with pytest.raises(ValueError, match=r'it has train, validation\. Parts'):
      sources.open_source(name, split)
  (folder / 'empty').mkdir()
  with pytest.raises(ValueError, match="train has no picture of 'empty'"):
    sources.open_source(name, 'train')
  monkeypatch.setattr(folders, '_MOST', 20)
  with pytest.raises(ValueError, match=r'more than 20 files: .*data import'):
    sources.open_source(name, 'train')
