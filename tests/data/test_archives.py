import io
import json
import tarfile

import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet
import pytest

from modelstock_jax.data import pictures
from modelstock_jax.data import sources


def picture(seed):
  """Return the bytes of a picture of 5 x 4 random pixels."""
  pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


NAMES = ('zebra', 'cat')  # not in the order of the alphabet
LABELS = {'train': [0, 1, 1, 0], 'validation': [1, 0], 'test': [0, 1]}
PICTURES = {
  split: [picture(17 * len(split) + i) for i in range(len(labels))]
  for split, labels in LABELS.items()
}


def read(data_dir, split, name='pics'):
  """Return what a split has: label by picture."""
  source = sources.open_source(name, split, data_dir=data_dir)
  return {record['image']: record['label'] for record in source}


def check_all(data_dir, names=NAMES):
  assert sources.class_names('pics', data_dir=data_dir) == names
  for split, labels in LABELS.items():
    labels = [names.index(NAMES[label]) for label in labels]
    expected = dict(zip(PICTURES[split], labels, strict=True))
    assert read(data_dir, split) == expected


def table(images, labels, names=NAMES, image='image', label='label'):
  """Return a table as `datasets` 4 lays one out.

  docs/source/about_dataset_features.mdx, and `Features.arrow_schema`.
  """
  features = {
    image: {'_type': 'Image'},
    label: {'names': list(names), '_type': 'ClassLabel'},
    'id': {'dtype': 'int32', '_type': 'Value'},
  }
  if not names:
    del features[label]
  about = json.dumps({'info': {'features': features}})
  kind = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
  values = [{'bytes': x, 'path': 'a.png'} for x in images]
  columns = {
    image: pa.array(values, kind),
    label: pa.array(labels),
    'id': pa.array(range(len(labels)), pa.int32()),
  }
  return pa.table(columns).replace_schema_metadata({'huggingface': about})


def save_arrow(path, rows):
  """Write a table as `Dataset.save_to_disk` does: a stream of batches."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with pa.ipc.new_stream(str(path), rows.schema) as stream:
    stream.write_table(rows, max_chunksize=3)


def save_parquet(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(rows, path, row_group_size=3)


@pytest.mark.parametrize(('image', 'label'), [('image', 'label'), ('a', 'b')])
def test_folder_of_the_hub(image, label, tmp_path):
  for split, labels in LABELS.items():
    rows = table(PICTURES[split], labels, image=image, label=label)
    path = tmp_path / f'pics/data/{split}-00000-of-00001.parquet'
    save_parquet(path, rows)
  (tmp_path / 'pics' / 'README.md').write_text('A data set of train.')
  done = pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data')
  check_all(tmp_path / 'data')
  assert done.counts['cat'] == {'train': 2, 'validation': 1, 'test': 1}
  assert [path.name for path in (tmp_path / 'data').iterdir()] == ['pics']


def test_folder_of_save_to_disk(tmp_path):
  folder = tmp_path / 'pics'
  for split, labels in LABELS.items():
    rows = table(PICTURES[split], labels)
    half = len(labels) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
      name = f'data-{shard:05d}-of-00002.arrow'
      save_arrow(folder / split / name, part)
    # What `map` has kept there, and is not of the set.
    save_arrow(folder / split / 'cache-123.arrow', rows.select(['id']))
    (folder / split / 'state.json').write_text('{}')
  (folder / 'dataset_dict.json').write_text(json.dumps({'splits': [*LABELS]}))
  pictures.import_pictures(folder, tmp_path / 'data')
  check_all(tmp_path / 'data')


def test_one_file_of_texts_as_labels(tmp_path):
  labels = ['b', 'a'] * 12
  images = [picture(i) for i in range(24)]
  save_parquet(tmp_path / 'pics.parquet', table(images, labels, names=()))
  done = pictures.import_pictures(tmp_path / 'pics.parquet', tmp_path / 'data')
  # Without a split in the name all are train, and every tenth is kept.
  sizes = {'train': 10, 'validation': 2}
  assert done.counts == {'a': sizes, 'b': sizes}
  assert read(tmp_path / 'data', 'train') | read(
    tmp_path / 'data', 'validation'
  ) == {x: 'ab'.index(y) for x, y in zip(images, labels, strict=True)}


GOOD = table(PICTURES['train'], LABELS['train'])


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    (
      GOOD.drop(['label']),
      r"columns \['image', 'id'\], of which \[\] are of the type ClassLabel",
    ),
    (GOOD.drop(['image']), r'of which \[\] are of the type Image'),
    (
      GOOD.replace_schema_metadata({'huggingface': '{"info": [1]}'}),
      "train.parquet: 'list' object has no",
    ),
    (
      GOOD.set_column(0, 'image', pa.array([1, 2, 3, 4])),
      "train.parquet: a bytes-like object is required, not 'int'",
    ),
    (
      table(PICTURES['train'], [0, -1, 2, None]),
      r'one of 0..1.*\n.*parquet:1: -1, .*\n.*:2: 2, .*\n.*:3: None, ',
    ),
    (table([PICTURES['train'][0], None], [0, 1]), ':1: 1, 0 bytes'),
    (table(PICTURES['train'], LABELS['train'], 'abc'), "no picture of 'c'"),
  ],
)
def test_tables_are_checked(rows, message, tmp_path):
  path = tmp_path / 'train.parquet'
  save_parquet(path, rows)
  with pytest.raises(ValueError, match=message):
    pictures.import_pictures(path, tmp_path / 'data')
  assert not [*tmp_path.glob('data/*')]


def test_names_of_labels_are_those_of_all_files(tmp_path):
  save_parquet(tmp_path / 'pics' / 'train.parquet', GOOD)
  other = table(PICTURES['test'], LABELS['test'], NAMES[::-1])
  save_parquet(tmp_path / 'pics' / 'test.parquet', other)
  with pytest.raises(ValueError, match=r'train.parquet: its classes are not'):
    pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data')


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (['train.tar', 'a.parquet'], r"files of \['.parquet', '.tar'\]"),
    (['train.tar', 'extra.tar'], r'words train, val.*\n  extra.tar'),
    (['train-test.tar'], r'words train, val.*\n  train-test.tar'),
    (['train.tar'], 'train.tar: truncated header'),
    (['train.arrow'], 'train.arrow: '),
    (['train.parquet'], 'train.parquet: Parquet magic bytes not found'),
  ],
)
def test_files_that_do_not_belong(files, message, tmp_path):
  (tmp_path / 'pics').mkdir()
  for name in files:
    (tmp_path / 'pics' / name).write_text('no archive')
  with pytest.raises(ValueError, match=message):
    pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data')


def save_tar(path, members):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as archive:
    for name, content in members:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def samples(split, kind):
  """Return the members that webdataset writes: a sample after another."""
  for number, (image, label) in enumerate(
    zip(PICTURES[split], LABELS[split], strict=True)
  ):
    value = {
      'cls': str(label),
      'json': json.dumps({'label': NAMES[label], 'id': 1}),
      'txt': f'{NAMES[label]}\n',
    }[kind]
    yield f'{split}/{number:06d}.png', image
    yield f'{split}/{number:06d}.seg.png', b'another picture of it'
    yield f'{split}/{number:06d}.{kind}', value.encode()


@pytest.mark.parametrize('kind', ['cls', 'json', 'txt'])
def test_shards_of_webdataset(kind, tmp_path):
  for split in LABELS:
    members = [*samples(split, kind)]
    for shard, part in enumerate((members[:3], members[3:])):
      save_tar(tmp_path / f'pics/{split}-{shard:06d}.tar', part)
  pictures.import_pictures(tmp_path / 'pics', tmp_path / 'data')
  if kind == 'cls':
    assert sources.class_names('pics', data_dir=tmp_path / 'data') == ('0', '1')
    for split, labels in LABELS.items():
      expected = dict(zip(PICTURES[split], labels, strict=True))
      assert read(tmp_path / 'data', split) == expected
  else:
    check_all(tmp_path / 'data', ('cat', 'zebra'))


@pytest.mark.parametrize(
  ('members', 'message'),
  [
    ([('1.png', b''), ('2.cls', b'0')], r"tar/1 has \['png'\]\n.*/2 has \['c"),
    ([('1.png', b''), ('1.jpg', b''), ('1.cls', b'0')], r"\['cls', 'jpg', 'p"),
    ([('1.png', b''), ('1.cls', b'0'), ('1.png', b'')], '1.png is there twice'),
    ([('1.png', b''), ('1.json', b'{"label":')], 'tar/1: Expecting value'),
    ([('1.png', b''), ('1.json', b'{"id": 3}')], r"has \['json', 'png'\]"),
    ([('1.png', b''), ('1.cls', b'')], r"has \['cls', 'png'\]"),
  ],
)
def test_members_of_tars_are_checked(members, message, tmp_path):
  save_tar(tmp_path / 'pics.tar', members)
  with pytest.raises(ValueError, match=message):
    pictures.import_pictures(tmp_path / 'pics.tar', tmp_path / 'data')


def test_tar_that_ends_early(tmp_path):
  path = tmp_path / 'train.tar'
  save_tar(path, samples('train', 'txt'))
  path.write_bytes(path.read_bytes()[:3000])
  with pytest.raises(ValueError, match=r'train.tar: unexpected end of data'):
    pictures.import_pictures(path, tmp_path / 'data')
