"""Import of a user's pictures, as a data set that TFDS would have prepared.

The bytes of a picture are copied as they are. TensorFlow is not required.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import csv
import io
import json
import os
import pathlib
import re
from typing import Any
from typing import NamedTuple
import zipfile

from array_record.python import array_record_module
from PIL import Image
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
import tqdm

from modelstock_jax.data import archives
from modelstock_jax.data import benchmarks
from modelstock_jax.data import listings
from modelstock_jax.data import preprocessing
from modelstock_jax.formats import hashes
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write

VERSION = '1.0.0'
# File in the folder of the version, with what `Imported` has.
REPORT = 'import.json'

_AHEAD = 32  # files that the system reads ahead
_MAX_BYTES = 2**28  # of a picture
_MOST_AT_ONCE = 2**17  # Python allocates as many bytes as it may read
_UNREADABLE = (OSError, ValueError, csv.Error, zipfile.BadZipFile)

_proto: Any = tf_example_pb2  # whose classes are made at run time


class Imported(NamedTuple):
  """A data set that was imported.

  Attributes:
    path: folder of the version.
    counts: number of pictures, by class and split.
    not_read: the problem of each file that was left out, by its name.
    notes: sentences about what was done.
  """

  path: pathlib.Path
  counts: listings.Counts
  not_read: Mapping[str, str]
  notes: Sequence[str]


def import_pictures(
  source: text_lib.PathLike,
  data_dir: text_lib.PathLike,
  name: str | None = None,
) -> Imported:
  """Write pictures as a data set with the splits train, validation and test.

  The structure of every file is checked (`preprocessing.check_structure`), not
  each pixel: one that is no picture, is cut short, is animated or has 16 bits
  of grey is left out. Damage that only decoding shows is met in training, which
  counts it (`data.max_bad_examples`), and in `data check --all`.

  Without a validation split, every tenth picture of each class of train is kept
  as one, by the SHA-256 of their names, beginning with the first. Records are
  in this order as well, so `train[:10%]` is a random part.

  Args:
    source: a folder with files `train/CLASS/FILE`, and `val` or `validation`
      and `test` likewise, or `CLASS/FILE`; a zip of such a folder; a .csv or
      .jsonl file with `path`, relative to its folder, `label` and, if wanted,
      `split`; or a file or a folder of them, with the splits in their names:
      .parquet or .arrow as Hugging Face's `datasets` writes, or .tar as
      webdataset.
    data_dir: folder of the prepared data sets. The new one appears there when
      it is complete.
    name: of the data set; None is that of the source.

  Returns:
    What was written; `import.json` in its folder has the same, and the SHA-256
    of the files of records, which `data check --all` verifies.

  Raises:
    FileNotFoundError: there is no such source.
    FileExistsError: `data_dir` has a data set of that name.
    ValueError: the source cannot be read, or a split has no picture of a class;
      all problems are listed.
  """
  source = pathlib.Path(source).expanduser().resolve()
  target = _target(source, data_dir, name)
  target.parent.mkdir(parents=True, exist_ok=True)
  with write.replacing(target) as temporary:
    with text_lib.explained(f'{source}: ', kinds=_UNREADABLE):
      listing = _list(source, temporary.with_name('rows'))
      pictures, notes = listings.arrange(listing.pictures)
      classes = [*listings.count(pictures, listing.classes)]
    not_read = {
      file.name: 'it is in no folder of a class'
      for file in listing.pictures
      if file.name and not file.label
    }
    folder = temporary / VERSION
    folder.mkdir(parents=True)
    not_read |= _write(folder, target.name, pictures, classes)
    problems = [f'{file}: {problem}' for file, problem in not_read.items()]
    lines = '\n  '.join(['\nNot read:', *text_lib.first(problems, 20)])
    with text_lib.explained(f'{source}: ', lines):
      counts = listings.count(
        [x._replace(name='') if x.name in not_read else x for x in pictures],
        classes,
      )
    report = {
      'counts': counts,
      'not_read': not_read,
      'notes': notes,
      'sha256': {x.name: hashes.digest(x) for x in folder.glob('*.array_rec*')},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2))
  return Imported(target / VERSION, counts, not_read, notes)


def _target(
  source: pathlib.Path, data_dir: text_lib.PathLike, name: str | None
) -> pathlib.Path:
  """Return the folder that the data set will have."""
  name = name or re.sub(r'\W+', '_', source.stem.lower())
  if not re.fullmatch('[a-z][a-z0-9_]*', name) or name in benchmarks.BENCHMARKS:
    raise ValueError(
      f'--name={text_lib.plain(name)}: must be lower-case letters, digits and '
      'underscores, begin with a letter, and not be the name of a benchmark'
    )
  target = pathlib.Path(data_dir).expanduser() / name
  if target.exists():
    raise FileExistsError(
      f'{target} is there already: set another --name or --data_dir'
    )
  return target


def _list(source: pathlib.Path, scratch: pathlib.Path) -> listings.Listing:
  """List the pictures of a source; `scratch` is a file for those of tables."""
  if not source.is_dir():
    text_lib.existing_file(source)
    if source.suffix == '.zip':
      return listings.in_zip(source)
    if source.suffix in ('.csv', '.jsonl'):
      return listings.in_table(source)
  shards = archives.find(source)
  if {path.suffix for path in shards.values()} == {'.tar'}:
    return archives.in_tars(shards)
  if shards:
    return archives.in_tables(shards, scratch)
  if source.is_dir():
    return listings.in_folder(source)
  raise ValueError(
    'it is no folder and no .zip, .csv or .jsonl file, nor one of '
    f'{", ".join(archives.KINDS)}'
  )


def _write(
  folder: pathlib.Path,
  dataset: str,
  pictures: Sequence[listings.Picture],
  classes: Sequence[str],
) -> dict[str, str]:
  """Write the files of a data set, and return what could not be read."""
  labels = {name: label for label, name in enumerate(classes)}
  splits, not_read = [], {}
  for split in dict.fromkeys(listings.SPLITS.values()):
    group = [x for x in pictures if x.name and x.split == split]
    if not group:
      continue
    file = folder / f'{dataset}-{split}.array_record-00000-of-00001'
    # Pictures are compressed already.
    writer = array_record_module.ArrayRecordWriter(
      os.fspath(file), 'group_size:1,uncompressed'
    )
    sizes = []
    later = iter(group[_AHEAD:])
    # Threads would wait for each other more than they would help: the system
    # reads the next files meanwhile.
    for picture in tqdm.tqdm(group, desc=split, unit=' pictures'):
      if following := next(later, None):
        _read_ahead(following.place)
      record = _record(picture, labels[picture.label])
      if isinstance(record, bytes):
        writer.write(record)
        sizes.append(len(record))
      else:
        not_read[picture.name] = record
    writer.close()
    splits.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(sizes)],
        num_bytes=sum(sizes),
        filename_template=None,
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(shape=(None, None, 3)),
        'label': tfds.features.ClassLabel(names=classes),
        'file_name': tfds.features.Text(),
      }
    ),
    split_infos=splits,
    check_data=False,
  )
  return not_read


def _read_ahead(place: listings.Place) -> None:
  """Have the system read a file, and do not wait for it."""
  if isinstance(place, pathlib.Path) and hasattr(os, 'posix_fadvise'):
    with contextlib.suppress(OSError), place.open('rb', buffering=0) as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _record(picture: listings.Picture, label: int) -> bytes | str:
  """Return the record of a picture, or why it cannot be read."""
  try:
    with picture.place.open('rb') as file:
      encoded = file.read(_MOST_AT_ONCE)
      if len(encoded) == _MOST_AT_ONCE:
        encoded += file.read(_MAX_BYTES + 1 - _MOST_AT_ONCE)
    if len(encoded) > _MAX_BYTES:
      raise ValueError(f'it has more than {_MAX_BYTES} bytes')
    preprocessing.check_structure(encoded)
    # A JPEG of a phone may hold another one, which nothing reads.
    if encoded[:2] != b'\xff\xd8':
      with Image.open(io.BytesIO(encoded)) as image:
        if getattr(image, 'is_animated', False):
          raise ValueError('it is animated: save one frame of it')
  except Exception as error:  # each layer below has its own kinds
    return re.sub(' <_io.* at .*>', ' it', text_lib.first_line(error))
  example = _proto.Example()
  feature = example.features.feature
  feature['image'].bytes_list.value.append(encoded)
  feature['label'].int64_list.value.append(label)
  feature['file_name'].bytes_list.value.append(os.fsencode(picture.name))
  return example.SerializeToString(deterministic=True)
