"""Lists of pictures in archives that other libraries write.

They are the tar files of webdataset, and the parquet and arrow files of Hugging
Face's `datasets`.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import io
import pathlib
import re
import tarfile
from typing import IO
from typing import Any
from typing import NamedTuple

from modelstock_jax.data import listings
from modelstock_jax.formats import text as text_lib

KINDS = ('.arrow', '.parquet', '.tar')

# Members of a tar that are pictures, by the end of their name.
_PICTURES = frozenset(
  {'jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff'}
)
_MAX_LABEL = 10**6  # bytes of a member that has a label
# A file may state anything anywhere.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError)
# How `datasets` names files in which it keeps results of its own.
_CACHED = ('cache-', 'tmp')


class _Place(NamedTuple):
  """The bytes of a picture within a file."""

  file: pathlib.Path
  offset: int
  size: int

  def open(self, mode: str) -> IO[bytes]:
    with self.file.open(mode) as file:
      file.seek(self.offset)
      return io.BytesIO(file.read(self.size))


def find(source: pathlib.Path) -> dict[str, pathlib.Path]:
  """Return the files of `KINDS` in a folder by their names, or one file.

  Raises:
    ValueError: they are of several kinds.
  """
  root = source if source.is_dir() else source.parent
  paths = source.rglob('*') if source.is_dir() else [source]
  names = {
    path.relative_to(root).as_posix(): path
    for path in sorted(path for path in paths if path.suffix in KINDS)
    if not path.name.startswith(('.', *_CACHED))
  }
  if len(kinds := {path.suffix for path in names.values()}) > 1:
    raise ValueError(f'it has files of {sorted(kinds)}: give one kind')
  return names


def in_tars(paths: Mapping[str, pathlib.Path]) -> listings.Listing:
  """List the pictures of tar files as webdataset writes them.

  Members of one name up to the first dot belong together: a picture, and a
  class in `.cls`, in the key `label` of `.json`, or in `.txt`.

  Args:
    paths: the files by their names, which have the split.

  Raises:
    ValueError: a picture has no class, or a class no picture; a member is there
      twice.
  """
  pictures, problems = [], []
  for (shard, path), split in zip(paths.items(), _splits(paths), strict=True):
    samples: dict[str, dict[str, _Place]] = {}
    with (
      text_lib.explained(f'{shard}: ', kinds=tarfile.TarError),
      tarfile.open(path, 'r:') as archive,
    ):
      for member in archive:
        folder, slash, file = member.name.rpartition('/')
        key, _, kind = file.partition('.')
        if not key or not member.isreg():  # hidden, a folder or a link
          continue
        sample = samples.setdefault(f'{shard}/{folder}{slash}{key}', {})
        if kind in sample:
          problems.append(f'{shard}: {member.name} is there twice')
        sample[kind] = _Place(path, member.offset_data, member.size)
    for key, sample in samples.items():
      images = [kind for kind in sample if kind.lower() in _PICTURES]
      with text_lib.explained(f'{key}: '):
        label = _label(sample)
      if len(images) == 1 and label:
        name = f'{key}.{images[0]}'
        place = sample[images[0]]
        pictures.append(listings.Picture(split, label, name, place))
      else:
        problems.append(f'{key} has {sorted(sample)}')
  text_lib.raise_problems(
    'of each name there must be one picture, and a .cls, .txt or .json file '
    "with its class (in .json, as 'label').",
    problems,
    most=8,
  )
  return listings.Listing(pictures)


def _label(sample: Mapping[str, _Place]) -> str:
  """Return the class that members of a tar state, or ''."""
  kind = next((x for x in ('cls', 'json', 'txt') if x in sample), None)
  if kind is None or sample[kind].size > _MAX_LABEL:
    return ''
  value: Any = sample[kind].open('rb').read().decode()
  if kind == 'json':
    value = text_lib.parse_json(value)
    value = value.get('label', '') if isinstance(value, dict) else ''
  return str(value).strip()


def in_tables(
  paths: Mapping[str, pathlib.Path], scratch: pathlib.Path
) -> listings.Listing:
  """List the pictures of parquet or arrow files as `datasets` writes them.

  Args:
    paths: the files by their names, which have the split.
    scratch: a file that takes the bytes of the pictures, which are wanted in
      another order than that of the rows.

  Raises:
    ModuleNotFoundError: pyarrow is not installed.
    ValueError: a file has not one column of images and one of labels; a label
      is outside of their names; a row has no bytes.
  """
  pictures, problems = [], []
  classes: dict[str, tuple[str, ...]] = {}
  with scratch.open('wb') as file:
    for (shard, path), split in zip(paths.items(), _splits(paths), strict=True):
      with text_lib.explained(f'{shard}: ', kinds=_UNREADABLE):
        names, rows = _read(path)
        classes[shard] = names
        for number, (image, label) in enumerate(rows):
          name = f'{shard}:{number}'
          encoded, value = image.as_py(), label.as_py()
          if isinstance(encoded, dict):
            encoded = encoded['bytes']
          if names and value is not None:
            value = names[value] if 0 <= value < len(names) else None
          if value is None or encoded is None:
            problems.append(f'{name}: {label}, {len(encoded or b"")} bytes')
            continue
          place = _Place(scratch, file.tell(), file.write(encoded))
          pictures.append(listings.Picture(split, str(value), name, place))
  names = next(iter(classes.values()))
  problems += [
    f'{shard}: its classes are not those of the other files'
    for shard, others in classes.items()
    if others != names
  ]
  text_lib.raise_problems(
    'each row must have the bytes of a picture and a label, if the labels have '
    f'names one of 0..{len(names) - 1}. Take out the others, such as splits '
    'whose labels are not public.',
    problems,
    most=8,
  )
  splits = {picture.split for picture in pictures}
  pictures += [listings.Picture(x, c, '') for x in splits for c in names]
  return listings.Listing(pictures, names)


def _read(path: pathlib.Path) -> tuple[tuple[str, ...], Iterator[Any]]:
  """Return the names of the labels of a file, and its images and labels."""
  import pyarrow as pa
  from pyarrow import parquet

  is_parquet = path.suffix == '.parquet'
  reader: Any = parquet.ParquetFile if is_parquet else pa.ipc.open_stream
  file = reader(pa.memory_map(str(path)))
  schema = file.schema_arrow if is_parquet else file.schema
  stated = (schema.metadata or {}).get(b'huggingface', b'{}')
  features = text_lib.parse_json(stated).get('info', {}).get('features', {})

  def column(kind: str, usual: str) -> str:
    names = [
      name
      for name in schema.names
      if (features.get(name) or {'_type': ''})['_type'] == kind
    ]
    names = names or [name for name in schema.names if name == usual]
    if len(names) != 1:
      raise ValueError(
        f'it has the columns {text_lib.listed(schema.names)}, of which '
        f'{names} are of the type {kind}: must be one. Remove the others, or '
        'cast it with `datasets`'
      )
    return names[0]

  image, label = column('Image', 'image'), column('ClassLabel', 'label')
  names = (features.get(label) or {}).get('names') or ()
  if is_parquet:
    file = file.iter_batches(batch_size=64, columns=[image, label])
  return tuple(map(str, names)), (
    row
    for batch in file
    for row in zip(batch.column(image), batch.column(label), strict=True)
  )


def _splits(names: Mapping[str, Any]) -> list[str]:
  """Return the split in each name; all are train if there is none."""
  words = [re.split('[^a-z]+', name.lower()) for name in names]
  splits = [
    {split for word, split in listings.SPLITS.items() if word in listed}
    for listed in words
  ]
  if not any(splits):
    return ['train'] * len(splits)
  text_lib.raise_problems(
    f'names of files must have one of the words {", ".join(listings.SPLITS)}.',
    [x for x, split in zip(names, splits, strict=True) if len(split) != 1],
    most=8,
  )
  return [split.pop() for split in splits]
