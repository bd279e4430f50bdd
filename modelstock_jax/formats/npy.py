"""Arrays that NumPy wrote: archives, and pickled dicts as Scenic keeps CLIP."""

from collections.abc import Mapping
import math
import pathlib
from typing import Any
import zipfile
import zlib

import numpy as np

from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

# What the reading of a damaged archive may raise.
_DAMAGE = (ValueError, AttributeError, RuntimeError, EOFError, OSError)
_DAMAGE += (MemoryError, zipfile.BadZipFile, zlib.error)


def read_archive(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  """Find the arrays of a `.npz` by name, and read none. No pickle is read.

  NumPy writes bfloat16 as two bytes without a type, which are taken for that.

  Raises:
    ValueError: it is damaged, or holds more than arrays of numbers.
  """
  where = f'{path} is not a complete .npz of arrays: '
  with text.explained(where, kinds=_DAMAGE), zipfile.ZipFile(path) as archive:
    return {
      entry.filename.removesuffix('.npy'): _member(path, archive, entry)
      for entry in archive.infolist()
    }


def _member(
  path: pathlib.Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> tensors_lib.Tensor:
  name = text.plain(entry.filename)
  with archive.open(entry) as file:
    version, _ = np.lib.format.read_magic(file)
    read_header = getattr(np.lib.format, f'read_array_header_{version}_0')
    shape, _, dtype = read_header(file)
    size = entry.file_size - file.tell()
  dtype = tensors_lib.DTYPES['bfloat16'] if dtype.str == '|V2' else dtype
  if tensors_lib.DTYPES.get(dtype.name) != dtype:  # an object is a pickle
    raise ValueError(f'{name} has the dtype {text.shown(dtype.str)}')
  if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
    raise ValueError(f'{name} has another size than it should')

  def load() -> np.ndarray:
    where = f'{path} cannot be read: {name}: '
    with text.explained(where, kinds=_DAMAGE), np.load(path) as arrays:
      return np.array(arrays[entry.filename], order='C').view(dtype)

  axis = tensors_lib.last_axis(shape)
  return tensors_lib.Tensor(shape, dtype, load, filter_axis=axis)


def read(
  path: text.PathLike, *, allow_pickle: bool
) -> dict[str, tensors_lib.Tensor]:
  """Read a pickled dict of arrays.

  Args:
    path: the `.npy` file.
    allow_pickle: unpickling a file can run any code that its author put
      there; True says that it is trusted.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: `allow_pickle` is False, or the file holds something else.
  """
  path = text.existing_file(path)
  if not allow_pickle:
    raise ValueError(
      f'{path} is a pickle, which can run any code when it is read. If you '
      'trust where it comes from, pass allow_pickle=True (--allow-pickle; to '
      '`modelstock train` --config.anchor.allow_pickle=true).'
    )
  try:
    content = np.load(path, allow_pickle=True).item()
  except Exception as error:  # pickle raises whatever it likes
    raise ValueError(
      f'{path} is not a whole .npy file of a dict of arrays: '
      f'{text.plain(str(error))}'
    ) from error
  if not isinstance(content, dict) or not all(
    isinstance(name, str) and isinstance(array, np.ndarray | np.generic)
    for name, array in content.items()
  ):
    raise ValueError(f'{path} does not hold a dict of arrays by name.')
  return {name: tensors_lib.in_memory(array) for name, array in content.items()}


def write(path: text.PathLike, arrays: Mapping[str, Any]) -> None:
  """Write a pickled dict of arrays, as Scenic reads it. It runs nothing."""
  np.save(path, np.array(dict(arrays), object), allow_pickle=True)
