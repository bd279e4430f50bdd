"""Preparation of data sets that TFDS has builders for, as array_record."""

from collections.abc import Iterator
import contextlib
from typing import Any

from etils import epath
import tensorflow_datasets as tfds

from modelstock_jax.data import benchmarks
from modelstock_jax.data import objectnet
from modelstock_jax.formats import lock
from modelstock_jax.formats import text as text_lib


def datasets(name: str) -> tuple[str, ...]:
  """Return the data sets behind a name.

  Args:
    name: name of a benchmark, or of a data set as TFDS calls it.

  Returns:
    Names of data sets, with their configurations.

  >>> datasets('imagenet'), datasets('imagenet_v2/topimages')
  (('imagenet2012',), ('imagenet_v2/topimages',))
  """
  benchmark = benchmarks.BENCHMARKS.get(name)
  return benchmark.datasets if benchmark else (name,)


def prepare(
  name: str,
  data_dir: text_lib.PathLike,
  manual_dir: text_lib.PathLike | None = None,
) -> None:
  """Run the builders of TFDS, which download what they may.

  Args:
    name: see `datasets`.
    data_dir: the folder of all data sets.
    manual_dir: folder of the archives that are downloaded by hand; None is
      `data_dir/downloads/manual`.

  Raises:
    ModuleNotFoundError: TensorFlow is not installed.
    OSError: an archive is missing (the message of TFDS says which, and where
      from), a download failed, a folder cannot be written, or another process
      prepares it.
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
  import_tensorflow()  # before anything is downloaded
  config = tfds.download.DownloadConfig(manual_dir=manual)
  for dataset in names:
    try:
      builder = tfds.builder(
        dataset, data_dir=folder, file_format='array_record'
      )
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
      raise ValueError(f'TFDS does not know {dataset!r}: {error}') from error
    if builder.data_path.exists():
      continue
    try:
      with _alone(builder.data_path):
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # each layer below has its own kinds
      raise OSError(
        f'{dataset} could not be prepared in {folder}: {error}. The same '
        'command starts it again; what is downloaded is not downloaded again.'
      ) from error


@contextlib.contextmanager
def _alone(path: epath.Path) -> Iterator[None]:
  """Lock a folder that TFDS writes; remove what killed processes left of it."""
  if '://' in str(path):  # a bucket has no locks
    yield
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with lock.hold(path.parent / f'.{path.name}.lock', path):
    for incomplete in path.parent.glob(f'incomplete.*_{path.name}'):
      incomplete.rmtree()
    yield


def import_tensorflow() -> Any:
  """Import TensorFlow.

  Raises:
    ModuleNotFoundError: it is not installed; says how to.
  """
  try:
    import tensorflow
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'Preparing and converting data sets requires TensorFlow: pip install '
      "'modelstock_jax[prepare]' (in a clone: pip install '.[prepare]'). "
      'Reading them does not.',
      name=error.name,
    ) from error
  return tensorflow
