import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

from array_record.python import array_record_module
import numpy as np
import pytest
from sklearn import datasets
import tensorflow_datasets as tfds

from modelstock_jax.data import inspection
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
  full = sources.open_source('digits', 'train')
  prefix = sources.open_source('digits', 'train[:200]')
  assert len(prefix) == 200
  for index in (0, 57, 199):
    assert prefix[index] == full[index]


def test_font_sets_are_complete_and_disjoint():
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
from modelstock_jax import data
source, read = data.open_source('digits', 'train'), data.image_reader()
options = dict(batch_size=8, read=read)
next(data.train_batches(source, num_models=2, seed=0, **options))
next(data.eval_batches(source, **options))
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
  assert 'python -m experiments.digits.prepare' in message

  with pytest.raises(FileNotFoundError) as caught:
    sources.open_source('imagenet2012', 'train', data_dir=copied)
  message = str(caught.value)
  assert 'found: digits, font_digits, glyphs' in message
  assert f'modelstock data prepare imagenet2012 --data_dir={copied}' in message


@pytest.mark.parametrize(
  ('split', 'message'),
  [
    ('trian', "split='trian'.*'train', 'validation', 'test'"),
    ('train+trian', "'train', 'validation', 'test'"),
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
  with pytest.raises(OSError, match=r'digits.*cannot be read.*Prepare'):
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
  with pytest.raises(OSError, match=r'1 of 1 files are missing.*No such f'):
    sources.open_source('digits', 'train', data_dir=copied)


def test_damaged_metadata(copied):
  (copied / 'digits' / '1.0.0' / 'dataset_info.json').write_text('{')
  with pytest.raises(OSError, match=r'is damaged.*Prepare it again with'):
    sources.open_source('digits', 'train', data_dir=copied)


@pytest.mark.parametrize('key', ['pythonClassName', '\\u0074ype'])
def test_metadata_import_nothing(copied, key, tmp_path, monkeypatch):
  (tmp_path / 'imported_by_features.py').write_text('')
  monkeypatch.syspath_prepend(tmp_path)
  path = copied / 'digits' / '1.0.0' / 'features.json'
  text = path.read_text().replace(
    '"pythonClassName": "tensorflow_datasets.core.features.scalar',
    f'"{key}": "imported_by_features',
  )
  assert 'imported_by_features' in text
  path.write_text(text)
  with pytest.raises(OSError, match=r'imported_by_features.* is not of TFDS'):
    sources.open_source('digits', 'train', data_dir=copied)
  assert 'imported_by_features' not in sys.modules


@pytest.mark.parametrize('stated', [799, 801, 2**62])
def test_fewer_or_more_records_than_stated(copied, stated):
  path = copied / 'digits' / '1.0.0' / 'dataset_info.json'
  path.write_text(path.read_text().replace('"800"', f'"{stated}"'))
  with pytest.raises(OSError, match=rf'has 800 records, not {stated}\. Prep'):
    sources.open_source('digits', 'train[:9]', data_dir=copied)


@pytest.mark.parametrize('count', ['0', '1', str(10**9)])
def test_numbers_of_classes_that_cannot_be(copied, count):
  folder = copied / 'digits' / '1.0.0'
  (folder / 'label.labels.txt').unlink()
  path = folder / 'features.json'
  path.write_text(path.read_text().replace('"10"', f'"{count}"'))
  with pytest.raises(ValueError, match='must be a ClassLabel of 2 to'):
    sources.open_source('digits', 'train', data_dir=copied)


def test_version_is_chosen(copied):
  newer = copied / 'digits' / '2.0.0'
  shutil.copytree(copied / 'digits' / '1.0.0', newer)
  info = newer / 'dataset_info.json'
  info.write_text(info.read_text().replace('1.0.0', '2.0.0'))

  def name(version):
    return sources.open_source(
      'digits', 'test', data_dir=copied, version=version
    ).name

  assert name(None) == name('2') == 'digits/2.0.0/test'
  assert name('1') == name('1.0') == name('1.0.0') == 'digits/1.0.0/test'
  with pytest.raises(
    ValueError, match=r'has the version 1\.0\.0, 2\.0\.0, wanted is 1\.1\.\*'
  ):
    name('1.1')
  with pytest.raises(ValueError, match=r'wanted is 10\.\*'):
    name('10')
  named = sources.open_source('digits:1.0.0', 'test', data_dir=copied)
  assert named.name == 'digits/1.0.0/test'
  with pytest.raises(ValueError, match=r'wanted is 3\.0\.0\.\*'):
    sources.open_source('digits:3.0.0', 'test', data_dir=copied)


def test_missing_configuration_lists_the_others(imagenet):
  with pytest.raises(FileNotFoundError) as caught:
    sources.open_source('imagenet_v2/top', 'test', data_dir=imagenet)
  assert 'imagenet_v2/topimages' in str(caught.value)
  assert (
    f'modelstock data prepare imagenet_v2/top --data_dir={imagenet}'
    in str(caught.value)
  )


def test_tfrecord_says_how_to_convert(copied):
  info = copied / 'digits' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(
    ValueError,
    match=r'in the format tfrecord.*data convert .*digits/1\.0\.0 NEW_DATA_DIR',
  ):
    sources.open_source('digits', 'test', data_dir=copied)


def test_missing_feature_is_named():
  with pytest.raises(
    ValueError, match=r"no feature \['real_label'\].*image, index"
  ):
    sources.open_source('digits', 'test', label='real_label')


def _rename(folder, names):
  """Give the features of a copy of the digits other names, of one length."""
  for path in folder.glob('*.array_record*'):
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
      for old, new in names.items():
        record = record.replace(old.encode(), new.encode())
      writer.write(record)
    writer.close()
  path = folder / 'features.json'
  stated = json.loads(path.read_text())
  features = stated['featuresDict']['features']
  for old, new in names.items():
    features[new] = features.pop(old)
    with contextlib.suppress(FileNotFoundError):
      (folder / f'{old}.labels.txt').rename(folder / f'{new}.labels.txt')
  path.write_text(json.dumps(stated))


def test_the_only_image_and_label_may_have_any_name(copied):
  _rename(copied / 'digits' / '1.0.0', {'image': 'photo', 'label': 'digit'})
  expected = sources.open_source('digits', 'test')
  source = sources.open_source('digits', 'test', data_dir=copied)
  assert (source.channels, source.image_shape) == (1, (8, 8))
  assert source.class_names == expected.class_names
  assert sources.class_names('digits', data_dir=copied) == source.class_names
  assert list(source) == list(expected)
  assert inspection.inspect('digits', copied, read_all=True)


@pytest.mark.parametrize(
  ('kind', 'add', 'message'),
  [
    (
      'image',
      {'mask': tfds.features.Image()},
      r"\['image'\].*genus, mask, pho",
    ),
    ('label', {}, r"no feature \['label'\]: it has image, not one Image"),
  ],
)
def test_features_of_which_none_is_the_only_one(kind, add, message):
  builder = _Builder(tfds.features.ClassLabel(num_classes=10), [0])
  features = builder.info.features
  if kind == 'image':
    features['photo'], features['genus'] = features.values()
    del features['image'], features['label']
  else:
    del features['label']
  features.update(add)
  with pytest.raises(ValueError, match=message):
    sources.TfdsSource(builder, 'test')


class _Builder:
  """A data set of three records whose labels are as given."""

  data_path = pathlib.Path('/data')

  def __init__(self, feature, labels):
    self.info = type(self)._Info()
    image = tfds.features.Image(shape=(8, 8, 1))
    self.info.features = {'image': image, 'label': feature}
    self._labels = labels

  class _Info:
    full_name = 'made/1.0.0'

  def as_data_source(self, split, decoders):
    return [{'image': b'x', 'label': label} for label in self._labels]


@pytest.mark.parametrize('label', [-1, 10, 4000])
def test_label_outside_the_classes(label):
  builder = _Builder(tfds.features.ClassLabel(num_classes=10), [0, 9, label])
  source = sources.TfdsSource(builder, 'test')
  assert [source[i]['label'] for i in range(2)] == [0, 9]
  with pytest.raises(
    ValueError,
    match=rf'made/1.0.0/test\[2\] has the label {label}, outside 0..9',
  ):
    source[2]


def test_lists_of_labels_are_padded():
  feature = tfds.features.Sequence(tfds.features.ClassLabel(num_classes=20))
  lists = [[], [3], list(range(10)), list(range(11)), [3, 20]]
  source = sources.TfdsSource(
    _Builder(feature, [np.array(actual, np.int64) for actual in lists]), 'test'
  )
  assert len(source.class_names) == 20
  for index, expected in enumerate(lists[:3]):
    actual = source[index]['label']
    assert actual.dtype == np.int32
    assert actual.tolist() == expected + [-1] * (10 - len(expected))
  with pytest.raises(
    ValueError, match=r'\[3\] has 11 labels, more than the 10'
  ):
    source[3]
  with pytest.raises(
    ValueError, match=r'\[4\] has the label .*outside 0\.\.19'
  ):
    source[4]


def test_imagenet_wnids_are_those_of_the_prepared_data(imagenet):
  wnids = sources.imagenet_wnids()
  assert len(wnids) == len(set(wnids)) == 1000
  assert list(wnids) == sorted(wnids)
  assert wnids == sources.class_names('imagenet2012', data_dir=imagenet)


def test_held_out_part_of_a_split():
  """Five of each digit, and the rest: together the split, in its order."""
  full = list(sources.open_source('digits', 'train[:400]'))
  held = sources.open_source('digits', 'train[:400]:held_out=5')
  rest = sources.open_source('digits', 'train[:400]:without=5')
  assert held.name == 'digits/1.0.0/train[:400]:held_out=5'
  assert (len(held), len(rest)) == (50, 350)
  counts = np.bincount([record['label'] for record in held])
  assert counts.tolist() == [5] * 10
  images = [record['image'] for record in full]
  for part in (held, rest):
    places = [images.index(record['image']) for record in part]
    assert places == sorted(places)
  assert sorted(r['image'] for r in [*held, *rest]) == sorted(images)
  with pytest.raises(IndexError, match='it has 50 records'):
    held[50]


def test_held_out_of_too_few():
  with pytest.raises(ValueError, match=r'train\[:20\]:without=26.*no more'):
    sources.open_source('digits', 'train[:20]:without=26')
