import json
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
  for name in ('digits', 'noise'):  # the benchmark, and a shift of it
    lines = inspection.inspect(name, digits, read_all=True).splitlines()
    assert [line.strip() for line in lines if 'were read' in line] == [
      f'digits/1.0.0/{split}: all {size} images were read, of 10 classes'
      for split, size in (('test', 597), ('train', 800), ('validation', 400))
    ]
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


def test_damage_of_the_split_to_train_on(imagenet, tmp_path, capsys):
  """The benchmark 'imagenet' is of the validation split."""
  shutil.copytree(imagenet / 'imagenet2012', tmp_path / 'imagenet2012')
  text = inspection.inspect('imagenet', tmp_path, read_all=True)
  assert 'imagenet2012/5.1.0/validation: all 11 images were read' in text
  assert 'imagenet2012/5.1.0/train: all 15 images were read' in text
  assert 'train: 100%' in capsys.readouterr().err
  (train,) = (tmp_path / 'imagenet2012/5.1.0').glob('*-train.*')
  records = array_record_module.ArrayRecordReader(str(train)).read_all()
  records[7] = records[7].replace(b'\xff\xd8', b'\xff\xd9')
  _write(train, records)
  inspection.inspect('imagenet', tmp_path)
  with pytest.raises(ValueError, match=r'train: 1 of 15 records .*\n.*\[7\]'):
    inspection.inspect('imagenet', tmp_path, read_all=True)


def test_every_configuration_is_read(imagenet):
  text = inspection.inspect('imagenet_c', imagenet, read_all=True)
  assert 'all 150 images were read, of 2 classes' in text


def _shards(folder, split, shards):
  """Write a split of digits as several files, and say so."""
  (old,) = folder.glob(f'digits-{split}.*')
  old.unlink()
  for i, records in enumerate(shards):
    name = f'digits-{split}.array_record-{i:05d}-of-{len(shards):05d}'
    _write(folder / name, records)
  path = folder / 'dataset_info.json'
  info = json.loads(path.read_text())
  for entry in info['splits']:
    if entry['name'] == split:
      entry['shardLengths'] = [str(len(records)) for records in shards]
  path.write_text(json.dumps(info))


@pytest.mark.parametrize('kind', ['first', 'validation', 'fonts'])
def test_a_file_of_another_set(digits, kind):
  """Of the same names, counts and shapes; each label is one of the set."""
  folder = digits / 'digits/1.0.0'
  (path,) = folder.glob('digits-train.*')
  train = array_record_module.ArrayRecordReader(str(path)).read_all()
  shards = [train[:200], train[200:400], train[400:]]
  others = {
    'first': path,
    'validation': next(folder.glob('digits-validation.*')),
    'fonts': next((sources.BUNDLED_DIR / 'font_digits').rglob('*.array_*')),
  }
  other = array_record_module.ArrayRecordReader(str(others[kind])).read_all()
  _shards(folder, 'train', [shards[0], other[:200], shards[2]])
  with pytest.raises(ValueError, match=r'digits/1.0.0/train: its records have'):
    inspection.inspect('digits', digits, read_all=True)
  (folder / 'digits-train.array_record-00001-of-00003').unlink()
  _write(folder / 'digits-train.array_record-00001-of-00003', shards[1])
  inspection.inspect('digits', digits, read_all=True)


def test_a_bad_label_in_the_middle(digits, monkeypatch):
  """Which a check of the first and the last record does not see."""
  read = sources.TfdsSource._check_label

  def check(source, index, label):
    return read(source, index, -1 if index == 5 else label)

  monkeypatch.setattr(sources.TfdsSource, '_check_label', check)
  inspection.inspect('digits', digits)
  with pytest.raises(ValueError, match=r'\[5\] has the label -1') as error:
    inspection.inspect('digits', digits, read_all=True)
  assert '1 of 597 records are damaged' in str(error.value)


def test_labels_that_are_not_public(digits, monkeypatch):
  """As those of the split 'test' of ImageNet."""
  read = sources.TfdsSource._check_label

  def check(source, index, label):
    return read(source, index, -1 if 'train' in source.name else label)

  monkeypatch.setattr(sources.TfdsSource, '_check_label', check)
  text = inspection.inspect('digits', digits, read_all=True)
  assert 'NOTE: digits/1.0.0/train[0] has the label -1' in text
  assert 'validation: all 400 images were read' in text


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
