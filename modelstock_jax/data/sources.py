"""Random access to prepared TFDS data sets, without TensorFlow.

The bundled sets and ImageNet are read the same way: ArrayRecord files that
TFDS wrote, images left encoded until a pipeline decodes them.
"""

from collections.abc import Sequence
from concurrent import futures
import copy
import json
import logging
import os
import pathlib
import re
from typing import Any

from array_record.python import array_record_module
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from modelstock_jax.data import folders
from modelstock_jax.data import labels as labels_lib
from modelstock_jax.data import records
from modelstock_jax.formats import text as text_lib

BUNDLED_DIR = pathlib.Path(__file__).parent / 'prepared'

# Room for the labels of an image of ReaL, as elsewhere.
REAL_LABELS = 10
# A class of a feature, whose module TFDS would import.
_FOREIGN = re.compile(
  r'"(pythonClassName|python_class_name|type)": "(?!tensorflow_datasets\.)[^"]*'
)
_MAX_CLASSES = 10**6
_MAX_FILES = 20_000  # of a split


# array_record logs an error about files with several records to a chunk, as the
# bundled ones are (experiments/digits/prepare.py says why). It is advice for
# big records.
logging.getLogger('absl').addFilter(
  lambda record: 'created with group size' not in record.getMessage()
)


class UnlabelledError(ValueError):
  """A record has the label -1, as all of a test split may have."""


class TfdsSource:
  """The records of one split of a prepared TFDS data set, images encoded.

  `source[i]` is a dict: `image` are encoded bytes, `label` is an `int`, other
  features are as the data set defines them. Where the labels of an image are a
  list, `label` is `int32[10]`, filled up with -1.

  Attributes:
    name: the data set and split, for messages.
    class_names: names of the classes, by label.
    path: the folder of the files.
    channels: 1 or 3, of decoded images.
    image_shape: height and width; `None` where they vary.
    num_bytes: of all records, as the metadata state; 0 if they do not.
  """

  num_bytes = 0

  def __init__(self, builder: Any, split: str, label: str = 'label'):
    features = builder.info.features
    self._renamed = label not in features
    self._image, label = _names(builder.info, label)
    self.name = f'{builder.info.full_name}/{split}'
    self.path: epath.Path = builder.data_path
    *shape, self.channels = features[self._image].shape
    self.image_shape: tuple[int | None, ...] = tuple(shape)
    classes = getattr(features[label], 'feature', features[label])
    if not 2 <= (getattr(classes, 'num_classes', None) or 0) <= _MAX_CLASSES:
      raise ValueError(
        f'{builder.info.full_name}: the feature {label!r} is '
        f'{text_lib.shown(classes)}, must be a ClassLabel of 2 to '
        f'{_MAX_CLASSES} classes. Prepare it with one.'
      )
    self.class_names: tuple[str, ...] = tuple(classes.names)
    self._label = label
    self._places: np.ndarray | None = None
    self._records = builder.as_data_source(
      split=split, decoders={self._image: tfds.decode.SkipDecoding()}
    )

  def subset(self, places: np.ndarray, name: str) -> 'TfdsSource':
    """Return the records at `places`, `int[n]`, as a source of that name."""
    part = copy.copy(self)
    part._places = places if self._places is None else self._places[places]
    part.num_bytes = 0
    part.name = name
    return part

  def __repr__(self) -> str:
    return f'TfdsSource({self.name}: {len(self)} records)'

  def stored_bytes(self, index: int) -> int:
    """Return the size of a record as it is stored, if this is no part."""
    return len(self._records.data_source[index])

  def __len__(self) -> int:
    return len(self._records if self._places is None else self._places)

  def __getitem__(self, index: int) -> dict[str, Any]:
    records.check_index(self, index)
    try:
      at = index if self._places is None else int(self._places[index])
      record = self._records[at]
      label = record[self._label]
      if self._renamed:
        del record[self._label]
      record['image'] = record.pop(self._image)
      # Of a file cut at certain places, array_record reads empty records.
      if record['image'] is None:
        raise EOFError('the record is empty')
    except Exception as error:  # each layer below has its own kinds
      raise OSError(
        f'{self.name}[{index}] cannot be read: {error}. A file in '
        f'{self.path} is damaged or incomplete; prepare it again.'
      ) from error
    record['label'] = self._check_label(index, label)
    return record

  def _check_label(self, index: int, label: Any) -> Any:
    labels = [label] if np.ndim(label) == 0 else label
    if not all(0 <= value < len(self.class_names) for value in labels):
      kind = UnlabelledError if np.array_equal(label, -1) else ValueError
      raise kind(
        f'{self.name}[{index}] has the label {label}, outside 0..'
        f'{len(self.class_names) - 1}: use a split whose labels are public, or '
        'prepare it again'
      )
    if labels is not label:
      return label
    if len(labels) > REAL_LABELS:
      raise ValueError(
        f'{self.name}[{index}] has {len(labels)} labels, more than the '
        f'{REAL_LABELS} that there is room for'
      )
    missing = REAL_LABELS - len(labels)
    return np.pad(np.int32(labels), (0, missing), constant_values=-1)


def open_source(
  dataset: str,
  split: str,
  *,
  data_dir: text_lib.PathLike | None = None,
  version: str | None = None,
  label: str = 'label',
) -> TfdsSource | folders.FolderSource:
  """Open a split of a prepared data set.

  Args:
    dataset: its name, with the configuration where it has several:
      `'digits'`, `'imagenet2012'`, `'imagenet_v2/matched-frequency'`. With the
      version after a colon, as TFDS has it, only that: `'digits:1.0.0'`.
      `'folder:PATH'` is a folder of pictures as `data import` takes it.
    split: a TFDS split: `'train'`, `'train[:200]'`, `'train[90%:]'`. Also a
      part of one: `'train:held_out=26'` has 26 records of each class, drawn as
      `labels.held_out` does, and `'train:without=26'` all others.
    data_dir: the folder of the prepared data sets; `None` for those that come
      with the package (`digits`, `font_digits`, `glyphs`).
    version: beginning of the version: `'5'` is any 5.x.y. The newest of those
      that are prepared is read.
    label: the feature that has the labels. If there is no `label` or no
      `image`, the only ClassLabel or Image takes its place.

  Returns:
    The records, in the order they were written.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: it has no such split, version or feature, or its files are not
      array_record.
    OSError: a file is damaged.

  >>> source = open_source('digits', 'train[:200]')
  >>> len(source), source[7]['label'], source[7]['image'][1:4]
  (200, 7, b'PNG')
  """
  if parts := folders.read(dataset):
    if split not in parts:
      raise ValueError(
        f'split={split!r} of {dataset}: it has {_listed(parts)}. Parts of a '
        'split require `modelstock data import`'
      )
    return parts[split]
  part = re.fullmatch(r'(.*):(held_out|without)=(\d+)', split)
  split, kind, per_class = part.groups() if part else (split, '', 0)
  builder: Any = _builder(dataset, data_dir, version)
  info = builder.info
  formats = {each.value for each in info.available_file_formats()}
  if 'array_record' not in formats:
    raise ValueError(
      f'{builder.data_path} is in the format {_listed(formats)}, which cannot '
      'be read at random: this reads array_record. Copy it with: modelstock '
      f'data convert {builder.data_path} NEW_DATA_DIR'
    )
  with text_lib.explained(f'split={split!r} of {info.full_name}: '):
    size = info.splits[split].num_examples
    shards = info.splits[split].file_instructions
    if size < 1:
      raise ValueError('it is empty')
  _check_files(f'{info.full_name}/{split}', shards)
  source = TfdsSource(builder, split, label)
  source.num_bytes = int(info.splits[split].num_bytes)
  for index in (0, size - 1):
    source[index]  # a damaged file shows here, not in a worker thread
  if not kind:
    return source
  name = f'{source.name}:{kind}={per_class}'
  labels = labels_lib.read(source)
  with text_lib.explained(f'{name}: '):
    rest, held_out = labels_lib.held_out(labels, int(per_class))
  return source.subset(held_out if kind == 'held_out' else rest, name)


def check_files(
  dataset: str, data_dir: text_lib.PathLike | None = None
) -> list[str]:
  """Check the files of all splits as `open_source` does, but read no record.

  Returns:
    The splits of which no file is there.

  Raises:
    OSError: a file is missing or damaged.
  """
  absent = []
  if folders.read(dataset):
    return absent
  for name, split in _builder(dataset, data_dir).info.splits.items():
    shards = split.file_instructions
    if any(epath.Path(shard.filename).exists() for shard in shards):
      _check_files(f'{dataset}/{name}', shards)
    else:
      absent.append(name)
  return absent


def _check_files(name: str, shards: Sequence[Any]) -> None:
  """Raise OSError if files do not have the records that metadata state."""

  def problem(shard: Any) -> str:
    path, stated = os.fspath(shard.filename), shard.examples_in_shard
    try:
      reader = array_record_module.ArrayRecordReader(path)
      count = reader.num_records()
      reader.close()
    except Exception as error:  # of a kind for each file system
      return f'{path} cannot be read ({text_lib.shown(error)})'
    return f'{path} has {count} records, not {stated}' * (count != stated)

  with futures.ThreadPoolExecutor(32) as pool:
    problems = list(filter(None, pool.map(problem, shards)))
  if problems:
    raise OSError(
      f'{name}: {len(problems)} of {len(shards)} files are missing, damaged or '
      f'incomplete: {problems[0]}. Prepare the data set again.'
    )


def class_names(
  dataset: str, *, data_dir: text_lib.PathLike | None = None
) -> tuple[str, ...]:
  """Return the names of a data set's labels, in label order.

  >>> class_names('digits')
  ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
  """
  for source in folders.read(dataset).values():
    return source.class_names
  info = _builder(dataset, data_dir).info
  return tuple(info.features[_names(info, 'label')[1]].names)


def split_sizes(
  dataset: str, *, data_dir: text_lib.PathLike | None = None
) -> dict[str, int]:
  """Return the number of records of every split.

  >>> split_sizes('digits')
  {'test': 597, 'train': 800, 'validation': 400}
  """
  if parts := folders.read(dataset):
    return {name: len(parts[name]) for name in sorted(parts)}
  splits = _builder(dataset, data_dir).info.splits
  return {name: splits[name].num_examples for name in sorted(splits)}


def imagenet_wnids() -> tuple[str, ...]:
  """Return the WordNet ids of ImageNet's 1000 classes, in label order.

  >>> imagenet_wnids()[:2]
  ('n01440764', 'n01443537')
  """
  # All of TFDS's ImageNets share this file.
  path = tfds.core.tfds_path('datasets/imagenet2012/labels.txt')
  return tuple(path.read_text().split())


def _builder(
  dataset: str, data_dir: text_lib.PathLike | None, version: str | None = None
) -> tfds.core.DatasetBuilder:
  folder = epath.Path(data_dir or BUNDLED_DIR).expanduser()
  dataset, _, stated = dataset.partition(':')
  version = stated or version
  # The package itself is no place to prepare data in.
  command = (
    f'modelstock data prepare {dataset} --data_dir={data_dir or "DATA_DIR"}'
  )
  if (BUNDLED_DIR / dataset).is_dir():
    command = f'python -m experiments.digits.prepare {folder} (in a clone)'
  versions = tfds.core.utils.version.list_all_versions(folder / dataset)
  if not versions:
    base = dataset.partition('/')[0]
    configs = [f'{base}/{name}' for name in _folders(folder / base)]
    raise FileNotFoundError(
      f'no prepared data set {dataset!r} in {folder} (found: '
      f'{_listed(_folders(folder) + configs)}). Prepare it with: {command}'
    )
  if version is not None:
    wanted = [v for v in versions if f'{v}.'.startswith(f'{version}.')]
    if not wanted:
      raise ValueError(
        f'{folder / dataset} has the version {_listed(map(str, versions))}, '
        f'wanted is {version}.*. Prepare it with: {command}'
      )
    versions = wanted
  newest = folder / dataset / str(versions[-1])
  try:
    return open_builder(newest)
  except Exception as error:  # each layer below has its own kinds
    raise OSError(
      f'{newest} is damaged: {text_lib.plain(str(error))}. Prepare it again '
      f'with: {command}'
    ) from error


def open_builder(folder: epath.Path) -> tfds.core.DatasetBuilder:
  """Open a version of a prepared data set, whose files cannot import modules.

  Args:
    folder: of the version.

  Raises:
    ValueError: a feature is of a class that is not of TFDS.
  """
  path = folder / 'features.json'
  if path.is_file():
    text = json.dumps(text_lib.parse_json(path.read_bytes()))
    if foreign := _FOREIGN.search(text):
      raise ValueError(f'{foreign[0]} in {path.name} is not of TFDS')
  builder = tfds.builder_from_directory(folder)
  for split in builder.info.splits.values():
    if len(split.shard_lengths) > _MAX_FILES:
      raise ValueError(f'{split.name} is said to have over {_MAX_FILES} files')
  return builder


def _names(info: Any, label: str) -> list[str]:
  """Return the names of the features that have the image and the label."""
  names, missing = [], []
  for name, kind in (
    ('image', tfds.features.Image),
    (label, tfds.features.ClassLabel),
  ):
    only = [x for x, feature in info.features.items() if type(feature) is kind]
    if name in info.features:
      names.append(name)
    elif len(only) == 1 and name != 'real_label':
      names += only
    else:
      missing.append(name)
  if missing:
    raise ValueError(
      f'{info.full_name} has no feature {missing}: it has '
      f'{_listed(info.features)}, not one Image and one ClassLabel. Read it '
      'with get_source in a config file'
    )
  return names


def _folders(path: epath.Path) -> list[str]:
  """Return the names of the folders in a folder, or none."""
  return [p.name for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _listed(names) -> str:
  return ', '.join(sorted(names)) or 'none'
