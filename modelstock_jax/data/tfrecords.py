"""Copies of data sets that TFDS prepared as tfrecord, for random access.

TFDS has a converter of its own, but it takes Apache Beam and leaves the files
with the class names behind.
"""

import os
import pathlib
from typing import Any

from etils import epath
from tensorflow_datasets.core import file_adapters
import tqdm

from modelstock_jax.data import sources
from modelstock_jax.data import tfds_prepare
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write

_INFO = 'dataset_info.json'


def convert(
  version_dir: text_lib.PathLike, data_dir: text_lib.PathLike
) -> pathlib.Path:
  """Copy one version of a data set as array_record, record by record.

  Args:
    version_dir: the folder of the version: `.../imagenet2012/5.1.0`.
    data_dir: the folder of the data sets that takes the copy. It appears there
      when it is complete.

  Returns:
    The folder of the copy, `data_dir/imagenet2012/5.1.0`.

  Raises:
    FileNotFoundError: there is no prepared data set in `version_dir`.
    FileExistsError: the copy is there.
    ModuleNotFoundError: TensorFlow is not installed.
    OSError: a file is damaged.
    ValueError: the files are not tfrecord.
  """
  source = pathlib.Path(version_dir).expanduser()
  if not (source / _INFO).is_file():
    versions = sorted(str(path.parent) for path in source.glob(f'*/**/{_INFO}'))
    raise FileNotFoundError(
      f'{source} holds no version of a data set (no {_INFO}). Give the folder '
      f'of one, such as {versions[0] if versions else "imagenet2012/5.1.0"}'
    )
  builder = sources.open_builder(epath.Path(source))
  if builder.info.file_format != file_adapters.FileFormat.TFRECORD:
    raise ValueError(
      f'{source} is in the format {builder.info.file_format.value}: only '
      'tfrecord needs copying'
    )
  target = pathlib.Path(data_dir).expanduser() / builder.info.full_name
  if target.exists():
    raise FileExistsError(f'{target} is there already: delete it first')
  tfds_prepare.import_tensorflow()  # before anything is written
  target.parent.mkdir(parents=True, exist_ok=True)
  with write.replacing(target) as folder:
    folder.mkdir()
    for split in builder.info.splits.values():
      _copy_records(split, folder)
    builder.info.as_proto.ClearField('alternative_file_formats')
    builder.info.set_file_format(
      'array_record', override=True, override_if_initialized=True
    )
    builder.info.write_to_directory(folder)
  return target


def _copy_records(split: Any, folder: pathlib.Path) -> None:
  tf = tfds_prepare.import_tensorflow()
  old = split.filename_template
  new = old.replace(data_dir=folder, filetype_suffix='array_record')
  lengths = tqdm.tqdm(split.shard_lengths, desc=split.name, unit=' files')
  for shard, length in enumerate(lengths):
    place = dict(shard_index=shard, num_shards=split.num_shards)
    path = os.fspath(old.sharded_filepath(**place))
    try:
      records = list(tf.data.TFRecordDataset(path).as_numpy_iterator())
    except tf.errors.OpError as error:
      raise OSError(f'{path} cannot be read: {error.message}') from error
    if len(records) != length:
      raise OSError(
        f'{path} has {len(records)} records, {_INFO} says {length}: the file '
        'is damaged, or the copy of another version'
      )
    file_adapters.ArrayRecordFileAdapter.write_examples(
      new.sharded_filepath(**place), enumerate(records)
    )
