import json
import shutil

import pytest

from modelstock_jax.data import inspection


def _lines(name, data_dir):
  return inspection.inspect(name, data_dir).splitlines()


def test_what_is_said(imagenet):
  # As make_imagenet.py says: 15 pictures to train on, 11 to validate; the
  # first on disk is as its record says.
  assert _lines('imagenet', imagenet) == [
    f'imagenet: {imagenet}/imagenet2012/5.1.0',
    '  version 5.1.0, array_record, splits: train 15, validation 11',
    '  validation: 11 images, 1000 classes; the first is JPEG, 22 x 18, label '
    '334 (n02346627)',
    '  NOTE: the published split has 50,000 images: results on these do not '
    'compare with others',
  ]


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('imagenet_r', ['200 images, 200 classes', 'JPEG, 1 x 1', 'has 30,000']),
    ('imagenet_v2', ['test 3', '3 images, 1000 classes', 'JPEG, 20 x 15']),
    ('imagenet_real', ['validation 11', 'label', 'has 50,000']),
    ('imagenet_c', ['75 configurations', '150 images', '224 x 224']),
    ('objectnet', ['folders of PNG', '114 images, 113 classes', '16 x 14']),
    ('imagenet_v2/topimages', ['test: 1 images', 'label 7 (']),
    ('imagenet2012', ['train: 15 images', 'validation: 11 images']),
  ],
)
def test_every_kind_is_described(name, words, imagenet):
  text = inspection.inspect(name, imagenet)
  assert [word for word in words if word not in text] == []


def test_whole_split_needs_no_note(imagenet, monkeypatch):
  benchmark = inspection.benchmarks.BENCHMARKS['imagenet_v2']
  monkeypatch.setitem(
    inspection.benchmarks.BENCHMARKS, 'imagenet_v2', benchmark._replace(size=3)
  )
  assert 'NOTE' not in inspection.inspect('imagenet_v2', imagenet)


def test_fewer_classes_are_an_error(imagenet, tmp_path):
  shutil.copytree(imagenet / 'imagenet_a', tmp_path / 'imagenet_a')
  info = tmp_path / 'imagenet_a/0.1.0/dataset_info.json'
  content = json.loads(info.read_text())
  content['splits'][0]['shardLengths'] = ['150']
  info.write_text(json.dumps(content))
  with pytest.raises(ValueError, match='has 150 classes, imagenet_a takes 200'):
    inspection.inspect('imagenet_a', tmp_path)


def test_first_image_that_is_none(imagenet, monkeypatch):
  from modelstock_jax.data import sources

  read = sources.TfdsSource.__getitem__
  monkeypatch.setattr(
    sources.TfdsSource,
    '__getitem__',
    lambda source, i: {**read(source, i), 'image': b'no image'},
  )
  with pytest.raises(ValueError, match=r'imagenet_v2/.*/test\[0\]: 8 bytes'):
    inspection.inspect('imagenet_v2', imagenet)


def test_unknown_name(imagenet):
  with pytest.raises(
    FileNotFoundError, match="no prepared data set 'imagenot'"
  ):
    inspection.inspect('imagenot', imagenet)
