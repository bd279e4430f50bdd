"""Prepares data sets that TFDS has builders for, as array_record."""

import importlib
from typing import Any

from etils import epath
import tensorflow_datasets as tfds

from modelstock_jax.data import benchmarks
from modelstock_jax.data import objectnet
from modelstock_jax.data import sources

# Archives that TFDS does not download, as their licence is agreed to in person:
# bytes by name. Each data set needs one of its archives at least.
_VALIDATION = {'ILSVRC2012_img_val.tar': 6_744_924_160}
ARCHIVES = {
  'imagenet2012': {'ILSVRC2012_img_train.tar': 147_897_477_120} | _VALIDATION,
  'imagenet2012_real': _VALIDATION,
  'imagenet2012_corrupted': _VALIDATION,
}


def datasets(name: str) -> tuple[str, ...]:
  """Return the data sets behind a name.

  Args:
    name: of a benchmark, or of a data set as TFDS calls it.

  Returns:
    Names of data sets, with their configurations.

  >>> datasets('imagenet'), datasets('imagenet_v2/topimages')
  (('imagenet2012',), ('imagenet_v2/topimages',))
  """
  benchmark = benchmarks.BENCHMARKS.get(name)
  return benchmark.datasets if benchmark else (name,)


def prepare(
  name: str,
  data_dir: sources.PathLike,
  manual_dir: sources.PathLike | None = None,
) -> None:
  """Runs the builders of TFDS, which download what they may.

  Args:
    name: see `datasets`.
    data_dir: the folder of all data sets.
    manual_dir: where the archives are that are downloaded by hand; `None` is
      `data_dir/downloads/manual`.

  Raises:
    FileNotFoundError: such an archive is missing; says which, and where from.
    ModuleNotFoundError: TensorFlow is not installed.
    OSError: a download failed, or a folder cannot be written.
    ValueError: TFDS has no data set of that name.
  """
  folder = epath.Path(data_dir).expanduser()
  manual = epath.Path(manual_dir or folder / 'downloads/manual').expanduser()
  names = datasets(name)
  if names == (benchmarks.BENCHMARKS['objectnet'].dataset,):
    raise ValueError(
      'ObjectNet is read from its own files, and nothing is prepared. '
      + objectnet.INSTRUCTIONS.format(folder=folder / names[0])
    )
  _check_archives(names[0].partition('/')[0], manual)
  import_tensorflow()
  config = tfds.download.DownloadConfig(manual_dir=manual)
  for dataset in names:
    try:
      builder = tfds.builder(
        dataset, data_dir=folder, file_format='array_record'
      )
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
      raise ValueError(f'TFDS does not know {dataset!r}: {error}') from error
    try:
      builder.download_and_prepare(download_config=config)
    except ImportError:
      raise
    except Exception as error:  # each layer below has its own kinds
      raise OSError(
        f'{dataset} could not be prepared in {folder}: {error}. The same '
        'command starts it again; what is downloaded is not downloaded again.'
      ) from error


def import_tensorflow() -> Any:
  """Returns the module.

  Raises:
    ModuleNotFoundError: it is not installed; says how to.
  """
  try:
    return importlib.import_module('tensorflow')
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'Preparing and converting data sets requires TensorFlow: pip install '
      "'modelstock_jax[prepare]' (in a clone: pip install '.[prepare]'). "
      'Reading them does not.',
      name=error.name,
    ) from error


def _check_archives(dataset: str, manual: epath.Path) -> None:
  archives = ARCHIVES.get(dataset, {})
  if not archives or any((manual / name).exists() for name in archives):
    return
  listed = '\n'.join(
    f'  {name}  {size:,} bytes' for name, size in archives.items()
  )
  several = ' (one is enough for its split)' if len(archives) > 1 else ''
  raise FileNotFoundError(
    f'{dataset} is made from archives that you download by hand{several}:\n'
    f'{listed}\nRegister at https://image-net.org/download-images, download '
    f'them and put them into {manual}, or say where they are with --manual_dir.'
  )
