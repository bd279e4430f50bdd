import hashlib
import io
import json
import os
import zipfile

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from modelstock_jax.cli import main
from modelstock_jax.data import inspection
from modelstock_jax.data import pictures
from modelstock_jax.data import sources


def picture(seed=0, kind='png', mode='RGB', **options):
  """Return the bytes of a picture of 5 x 4 random pixels."""
  file = io.BytesIO()
  shape = (4, 5, 3) if mode == 'RGB' else (4, 5)
  pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  Image.fromarray(pixels).convert(mode).save(file, kind, **options)
  return file.getvalue()


FILES = {
  f'{split}/{label}/{i}.{kind}': picture(i, kind)
  for split, size in (('train', 3), ('val', 2), ('test', 1))
  for label, kind in (('red fox', 'jpeg'), ('cat', 'webp'))
  for i in range(size)
}


def write(folder, files=FILES):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return folder


def read(name, split, data_dir):
  """Return what a split has: bytes and class by file name."""
  source = sources.open_source(name, split, data_dir=data_dir)
  records = [source[i] for i in range(len(source))]
  return {
    r['file_name'].decode(): (r['image'], source.class_names[r['label']])
    for r in records
  }


def expected(split, files=FILES):
  return {
    name: (content, name.split('/')[1])
    for name, content in files.items()
    if name.startswith(f'{split}/')
  }


def check_all(data_dir, name='pics'):
  for split, folder in (
    ('train', 'train'),
    ('validation', 'val'),
    ('test', 'test'),
  ):
    assert read(name, split, data_dir) == expected(folder)
  names = sources.class_names(name, data_dir=data_dir)
  assert names == ('cat', 'red fox')


def test_folders_of_splits_are_copied_byte_for_byte(tmp_path):
  done = pictures.import_pictures(
    write(tmp_path / 'pics'), tmp_path / 'new' / 'data'
  )
  check_all(tmp_path / 'new' / 'data')
  sizes = {'train': 3, 'validation': 2, 'test': 1}
  assert done.counts == {'cat': sizes, 'red fox': sizes}
  assert not done.notes
  assert not done.not_read
  report = json.loads((done.path / 'import.json').read_text())
  assert report['counts'] == done.counts
  # Nothing else is left in the folder.
  assert os.listdir(tmp_path / 'new' / 'data') == ['pics']


def test_checksums_of_the_files_are_verified(tmp_path):
  done = pictures.import_pictures(write(tmp_path / 'pics'), tmp_path / 'data')
  report = json.loads((done.path / 'import.json').read_text())
  files = {path.name: path for path in done.path.glob('*.array_record*')}
  assert len(files) == 3
  assert report['sha256'] == {
    name: hashlib.sha256(path.read_bytes()).hexdigest()
    for name, path in files.items()
  }
  text = inspection.inspect('pics', tmp_path / 'data', read_all=True)
  assert 'SHA-256 of 3 files: as in import.json' in text
  # The other class: each record can be read, and is as long as before.
  [path] = done.path.glob('*-train.*')
  reader = array_record_module.ArrayRecordReader(str(path))
  records = reader.read_all()
  writer = array_record_module.ArrayRecordWriter(
    str(path), 'group_size:1,uncompressed'
  )
  for record in records:
    example = tf_example_pb2.Example.FromString(record)
    values = example.features.feature['label'].int64_list.value
    values[0] = 1 - values[0]
    writer.write(example.SerializeToString(deterministic=True))
  writer.close()
  inspection.inspect('pics', tmp_path / 'data')
  with pytest.raises(
    OSError, match=r"\['pics-train.*'\] is not that in import"
  ):
    inspection.inspect('pics', tmp_path / 'data', read_all=True)


@pytest.mark.parametrize('top', ['', 'my pics/', 'a/b/'])
def test_zip_is_read_wherever_its_folder_is(top, tmp_path):
  with zipfile.ZipFile(tmp_path / 'Pics.zip', 'w') as archive:
    archive.mkdir('__MACOSX')
    for name, content in FILES.items():
      archive.writestr(top + name, content)
  pictures.import_pictures(tmp_path / 'Pics.zip', tmp_path)
  records = read('pics', 'train', tmp_path)
  assert records == {
    top + name: value for name, value in expected('train').items()
  }


@pytest.mark.parametrize('kind', ['csv', 'jsonl'])
def test_tables_list_paths_and_labels(kind, tmp_path):
  write(tmp_path)
  rows = [
    {'path': name, 'label': label, 'split': split}
    for name in FILES
    for split, label, _ in [name.split('/')]
  ]
  if kind == 'csv':
    lines = ['split,label,path']
    lines += [f'{r["split"]},{r["label"]},{r["path"]}' for r in rows]
  else:
    lines = map(json.dumps, rows)
  table = tmp_path / f'table.{kind}'
  table.write_text('\n'.join(lines) + '\n')
  pictures.import_pictures(table, tmp_path / 'data', 'pics')
  check_all(tmp_path / 'data')


def test_every_tenth_picture_is_validation_without_that_split(tmp_path):
  names = [f'{label}/{i}.png' for label in ('9', '10') for i in range(12)]
  write(tmp_path / 'pics', {n: picture(i) for i, n in enumerate(names)})
  done = pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data')
  kept = set()
  for label in ('9', '10'):
    inside = [name for name in names if name.startswith(f'{label}/')]
    inside.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    kept |= {inside[0], inside[10]}
  assert {*read('pics', 'validation', tmp_path / 'data')} == kept
  assert {*read('pics', 'train', tmp_path / 'data')} == {*names} - kept
  # Numbers are in their order.
  assert sources.class_names('pics', data_dir=tmp_path / 'data') == ('9', '10')
  assert 'every 10th picture' in done.notes[0]


def test_files_that_cannot_be_read_are_listed(tmp_path, capsys):
  frames = [Image.new('L', (4, 4), value) for value in (0, 255)]
  moving = io.BytesIO()
  frames[0].save(moving, 'gif', save_all=True, append_images=frames[1:])
  bad = {
    'train/cat/text.png': b'hello',
    'train/cat/grey16.png': picture(mode='I;16'),
    'train/cat/moving.gif': moving.getvalue(),
    'train/cat/cut.jpg': picture(0, 'jpeg')[:-20],
    'train/cat/empty.jpg': b'',
    'train/loose.png': picture(),
    'README': b'hello',
  }
  folder = write(tmp_path / 'pics', FILES | bad | {'train/cat/.hidden': b''})
  assert (
    main.main(['data', 'import', str(folder), f'--data_dir={tmp_path}/d']) == 0
  )
  check_all(tmp_path / 'd')
  report = json.loads((tmp_path / 'd/pics/1.0.0/import.json').read_text())
  assert report['not_read'].keys() == bad.keys()
  text = capsys.readouterr().out
  assert f'{len(bad)} files were left out' in text
  assert 'moving.gif: it is animated' in text
  assert 'grey16.png: ' in text
  assert "mode 'I;16'" in text
  assert 'README: it is in no folder of a class' in text
  assert 'label 1 is red fox: train 3, validation 2, test 1' in text


def test_damaged_member_of_an_archive_is_listed(tmp_path):
  path = tmp_path / 'pics.zip'
  extra = FILES | {'train/cat/damaged.png': picture(7)}
  with zipfile.ZipFile(path, 'w') as archive:  # stored, not compressed
    for name, content in extra.items():
      archive.writestr(name, content)
  data = path.read_bytes()
  path.write_bytes(data.replace(picture(7), picture(7)[:-1] + b'x'))
  done = pictures.import_pictures(path, tmp_path)
  assert [*done.not_read] == ['train/cat/damaged.png']
  assert 'CRC' in done.not_read['train/cat/damaged.png']
  check_all(tmp_path)


def without(*names):
  return {name: x for name, x in FILES.items() if not name.startswith(names)}


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (without('val/cat'), "validation has no picture of 'cat'"),
    (FILES | {'test/cow/1.png': picture()}, "train has no picture of 'cow'"),
    (without('train'), "train has no picture of 'cat'"),
    (
      without('val/cat') | {'val/cat/1.png': b'hello'},
      r"(?s)validation has no picture of 'cat'.*Not read:\n  val/cat/1.png",
    ),
    (
      {'cat/1.png': picture(), 'cat/2.png': picture(), 'cow/1.png': picture()},
      "train has no picture of 'cow'",
    ),
    ({'train/cat/1.png': picture()}, r"classes are \['cat'\], must be 2"),
    ({'1.png': picture()}, r'classes are \[\], must be 2'),
    (FILES | {'dog/1.png': picture()}, r"folders \['dog'\] are beside"),
    (FILES | {'train/a\nb/1.png': picture()}, r"'a\\nb' is not printable"),
  ],
)
def test_classes_must_be_in_all_splits(files, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    pictures.import_pictures(write(tmp_path / 'pics', files), tmp_path / 'data')
  assert not [*tmp_path.glob('data/*')]


def test_empty_folder_of_a_class_is_an_error(tmp_path):
  (write(tmp_path / 'pics') / 'train' / 'cow').mkdir()
  with pytest.raises(ValueError, match="train has no picture of 'cow'"):
    pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data')


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ('file,label\n1.png,cat', r"must have 'path' and 'label'.*\n.*row 1: "),
    ('path,label\n1.png,', r"row 1: \{'label': '', 'path': '1.png'\}"),
    ('path,label,split\n1.png,cat,dev', "one of train, val.*\n.*row 1.*'dev'"),
    ('path,label\n1.png,cat\n1.png,dog', r'of one name.*\n.*1\.png: 2 times'),
  ],
)
def test_rows_of_tables_are_checked(rows, message, tmp_path):
  (tmp_path / 'table.csv').write_text(rows)
  with pytest.raises(ValueError, match=message):
    pictures.import_pictures(tmp_path / 'table.csv', tmp_path / 'data')


def test_two_members_of_one_name_are_an_error(tmp_path):
  twice = 'train/cat/0.webp'
  with zipfile.ZipFile(tmp_path / 'pics.zip', 'w') as archive:
    for name, content in FILES.items():
      archive.writestr(name, content)
    with pytest.warns(UserWarning, match='Duplicate name'):
      archive.writestr(twice, FILES[twice])
  with pytest.raises(ValueError, match=f'{twice}: 2 times'):
    pictures.import_pictures(tmp_path / 'pics.zip', tmp_path)


def test_sources_that_are_none(tmp_path):
  (tmp_path / 'pics.txt').write_text('')
  (tmp_path / 'pics.zip').write_text('no archive')
  for name, kind, message in (
    ('nothing', FileNotFoundError, 'no such file'),
    ('pics.txt', ValueError, 'no folder and no .zip, .csv or .jsonl'),
    ('pics.zip', ValueError, 'not a zip file'),
  ):
    with pytest.raises(kind, match=message):
      pictures.import_pictures(tmp_path / name, tmp_path / 'data')


def test_set_that_is_there_is_kept(tmp_path):
  (tmp_path / 'data' / 'pics' / '2.0.0').mkdir(parents=True)
  with pytest.raises(FileExistsError, match='there already: set another'):
    pictures.import_pictures(write(tmp_path / 'pics'), tmp_path / 'data')
  pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data', 'others')
  check_all(tmp_path / 'data', 'others')


@pytest.mark.parametrize('name', ['1x', 'A', 'a/b', 'digits'])
def test_names_of_data_sets(name, tmp_path):
  with pytest.raises(ValueError, match=f'--name={name}: must be'):
    pictures.import_pictures(write(tmp_path / 'pics'), tmp_path / 'd', name)


@pytest.mark.oracle
def test_tensorflow_parses_the_records(tmp_path):
  import tensorflow as tf

  done = pictures.import_pictures(write(tmp_path / 'pics'), tmp_path / 'd')
  [path] = done.path.glob('*-train.*')
  reader = array_record_module.ArrayRecordReader(str(path))
  records = {}
  for record in reader.read_all():
    parsed = tf.io.parse_single_example(
      record,
      {
        'image': tf.io.FixedLenFeature([], tf.string),
        'label': tf.io.FixedLenFeature([], tf.int64),
        'file_name': tf.io.FixedLenFeature([], tf.string),
      },
    )
    label = ('cat', 'red fox')[int(parsed['label'])]
    name = parsed['file_name'].numpy().decode()
    records[name] = parsed['image'].numpy(), label
  assert records == expected('train')
