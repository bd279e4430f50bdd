import shutil

from array_record.python import array_record_module
import pytest

from modelstock_jax.data import inspection
from modelstock_jax.data import sources


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


def test_complete_split_needs_no_note(imagenet, monkeypatch):
  benchmark = inspection.benchmarks.BENCHMARKS['imagenet_v2']
  monkeypatch.setitem(
    inspection.benchmarks.BENCHMARKS, 'imagenet_v2', benchmark._replace(size=3)
  )
  assert 'NOTE' not in inspection.inspect('imagenet_v2', imagenet)


def test_fewer_classes_are_an_error(imagenet, monkeypatch):
  benchmark = inspection.benchmarks.BENCHMARKS['imagenet_a']
  monkeypatch.setitem(
    inspection.benchmarks.BENCHMARKS,
    'imagenet_a',
    benchmark._replace(num_classes=201),
  )
  with pytest.raises(ValueError, match='has 200 classes, imagenet_a takes 201'):
    inspection.inspect('imagenet_a', imagenet)


@pytest.fixture
def digits(tmp_path):
  shutil.copytree(sources.BUNDLED_DIR / 'digits', tmp_path / 'digits')
  return tmp_path


TEST = 'digits/1.0.0/digits-test.array_record-00000-of-00001'


def _write(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


def test_all_records_are_read(digits):
  reader = array_record_module.ArrayRecordReader(str(digits / TEST))
  records = reader.read_all()
  assert inspection.inspect('digits', digits, read_all=True).endswith(
    'all 597 images were read, of 10 classes'
  )
  records[7] = records[7].replace(b'\x89PNG', b'\x89PIG')
  records[8] = b''
  _write(digits / TEST, records)
  inspection.inspect('digits', digits)  # looks at the first and the last
  with pytest.raises(ValueError, match='2 of 597 records are damaged') as error:
    inspection.inspect('digits', digits, read_all=True)
  _, first, second = str(error.value).splitlines()
  assert 'test[7]' in first
  assert 'are no image' in first
  assert 'test[8] cannot be read' in second


def test_one_class_alone(digits):
  reader = array_record_module.ArrayRecordReader(str(digits / TEST))
  _write(digits / TEST, reader.read([0]) * 597)
  with pytest.raises(ValueError, match='all images are of 1 class'):
    inspection.inspect('digits', digits, read_all=True)


def test_files_of_other_splits(digits):
  """The benchmark reads 'test'; a part of 'train' is no use to anyone."""
  (train,) = (digits / 'digits/1.0.0').glob('*-train.*')
  reader = array_record_module.ArrayRecordReader(str(train))
  _write(train, reader.read_all()[:700])
  with pytest.raises(
    OSError, match=r'digits/train: 1 of 1 .* 700 records, not'
  ):
    inspection.inspect('digits', digits)
  train.unlink()
  text = inspection.inspect('digits', digits)
  assert 'NOTE: the files of digits/train are not there' in text


def test_first_image_that_is_none(imagenet, monkeypatch):
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
