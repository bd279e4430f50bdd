"""Random access to prepared TFDS data sets, without TensorFlow.

The bundled sets and ImageNet are read the same way: ArrayRecord files that
TFDS wrote, images left encoded until a pipeline decodes them.
"""

from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib
from typing import Any

from etils import epath
import tensorflow_datasets as tfds

BUNDLED_DIR = pathlib.Path(__file__).parent / 'prepared'

_Path = str | os.PathLike[str]


class Source:
  """The records of one split.

  `len(source)` is the number of records and `source[i]` the i-th as a dict:
  `image` are encoded bytes, `label` is an `int`, other features are as the
  data set defines them.

  Attributes:
    name: the data set and split, for messages.
    channels: 1 or 3, what decoded images are to have.
    num_classes: the size of the label space.
  """

  def __init__(self, builder: Any, split: str):
    features = builder.info.features
    self.name = f'{builder.info.full_name}/{split}'
    self.channels: int = features['image'].shape[-1]
    self.num_classes: int = features['label'].num_classes
    self._data_path = builder.data_path
    skip = tfds.decode.SkipDecoding
    self._records = builder.as_data_source(
      split=split, decoders={'image': skip()}
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name}[{index}]: it has {len(self)} records')
    try:
      record = self._records[index]
      # Of a file cut at certain places, array_record reads empty records.
      if record['image'] is None:
        raise EOFError('the record is empty')
    except Exception as error:  # each layer below has its own kinds
      raise OSError(
        f'{self.name}[{index}] cannot be read: {error}. A file in '
        f'{self._data_path} is damaged or incomplete; prepare it again.'
      ) from error
    return record

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[index] for index in range(len(self)))

  def __repr__(self) -> str:
    return f'Source({self.name}: {len(self)} records)'


def open_source(
  dataset: str, split: str, *, data_dir: _Path | None = None
) -> Source:
  """Opens a split of a prepared data set.

  Args:
    dataset: its name, with the configuration where it has several:
      `'digits'`, `'imagenet2012'`, `'imagenet_v2/matched-frequency'`. The
      newest prepared version is read.
    split: a TFDS split: `'train'`, `'train[:200]'`, `'train[90%:]'`.
    data_dir: the folder of the prepared data sets; `None` for those that come
      with the package (`digits`, `font_digits`, `glyphs`).

  Returns:
    The records, in the order they were written.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: it has no such split.
    OSError: a file is damaged.

  >>> source = open_source('digits', 'train[:200]')
  >>> len(source), source[7]['label'], source[7]['image'][1:4]
  (200, 7, b'PNG')
  """
  builder = _builder(dataset, data_dir)
  unknown = [
    part
    for part in split.split('+')
    if part.partition('[')[0].strip() not in builder.info.splits
  ]
  if unknown:
    raise ValueError(
      f'split={split!r}: {builder.info.full_name} has the splits '
      f'{_listed(builder.info.splits)}'
    )
  try:
    size = builder.info.splits[split].num_examples
  except ValueError as error:
    raise ValueError(
      f'split={split!r} of {builder.info.full_name}: {error}'
    ) from error
  if not size:
    raise ValueError(f'split={split!r} of {builder.info.full_name} is empty')
  source = Source(builder, split)
  with _expect_groups(dataset):
    for index in (0, size - 1):
      source[index]  # a damaged file shows here, not in a worker thread
  return source


def class_names(
  dataset: str, *, data_dir: _Path | None = None
) -> tuple[str, ...]:
  """Returns the names of a data set's labels, in label order.

  >>> class_names('digits')
  ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
  """
  features: Any = _builder(dataset, data_dir).info.features
  return tuple(features['label'].names)


def split_sizes(
  dataset: str, *, data_dir: _Path | None = None
) -> dict[str, int]:
  """Returns the number of records of every split.

  >>> split_sizes('digits')
  {'test': 597, 'train': 800, 'validation': 400}
  """
  splits = _builder(dataset, data_dir).info.splits
  return {name: splits[name].num_examples for name in sorted(splits)}


def _builder(dataset: str, data_dir: _Path | None) -> tfds.core.DatasetBuilder:
  folder = epath.Path(BUNDLED_DIR if data_dir is None else data_dir)
  versions = [
    path
    for path in _folders(folder / dataset)
    if tfds.core.Version.is_valid(path.name)
  ]
  if not versions:
    raise FileNotFoundError(_missing(dataset, folder))
  newest = max(versions, key=lambda path: tfds.core.Version(path.name))
  try:
    return tfds.builder_from_directory(newest)
  except Exception as error:  # each layer below has its own kinds
    raise OSError(
      f'{newest} is damaged: {error}. Prepare it again with: '
      f'{_command(dataset, folder)}'
    ) from error


@contextlib.contextmanager
def _expect_groups(dataset: str):
  """Silences one message about the bundled files while they are opened.

  array_record logs an error when a file has several records to a chunk. That
  is advice for big records: see `prepare.py` for why ours are grouped.
  """
  logger = logging.getLogger('absl')

  def rule(record: logging.LogRecord) -> bool:
    return 'created with group size' not in record.getMessage()

  if (BUNDLED_DIR / dataset).is_dir():
    logger.addFilter(rule)
  try:
    yield
  finally:
    logger.removeFilter(rule)


def _folders(folder: epath.Path) -> list[epath.Path]:
  if not folder.is_dir():
    return []
  return sorted(path for path in folder.iterdir() if path.is_dir())


def _missing(dataset: str, folder: epath.Path) -> str:
  present = _listed([path.name for path in _folders(folder)])
  return (
    f'no prepared data set {dataset!r} in {folder} (found: {present}). '
    f'Prepare it with: {_command(dataset, folder)}'
  )


def _command(dataset: str, folder: epath.Path) -> str:
  if (BUNDLED_DIR / dataset).is_dir():
    return f'python -m modelstock_jax.data.prepare {folder}'
  return f'tfds build {dataset} --file_format=array_record --data_dir={folder}'


def _listed(names) -> str:
  return ', '.join(sorted(names)) or 'none'
