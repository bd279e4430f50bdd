"""A tensor where it lies in a file, read through windows."""

from collections.abc import Callable
import mmap
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

# The dtypes of safetensors files.
CODES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64),
  'U32': np.dtype(np.uint32),
  'U16': np.dtype(np.uint16),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
  'C64': np.dtype(np.complex64),
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}
FLOATING = {
  CODES[code].name: CODES[code] for code in ('F64', 'F32', 'F16', 'BF16')
}


class Stored(NamedTuple):
  """A tensor of a checkpoint.

  Attributes:
    dtype: of its elements.
    shape: of the tensor.
    read: (start, stop) -> those elements of it in C order, flat. They may be
      a window of a file, which goes when the array does.
    filters: the axis along which slices of it are filters: that of the
      outputs, the first in PyTorch's layout and the last in Flax's.
    offset: bytes before it, in a file that it lies in.
    load: where it is read whole or not at all, what does it.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[int, int], np.ndarray]
  filters: int = 0
  offset: int = 0
  load: Callable[[], np.ndarray] | None = None

  def held(self) -> 'Stored':
    """The same tensor, to be read several times."""
    if self.load is None:
      return self
    flat = self.load().reshape(-1)
    return self._replace(read=lambda start, stop: flat[start:stop], load=None)

  @property
  def size(self) -> int:
    """How many elements."""
    return int(np.prod(self.shape, dtype=np.int64))

  @property
  def floating(self) -> bool:
    """Whether it is merged; what is not must agree across models."""
    return self.dtype.name in FLOATING

  def __str__(self) -> str:
    return f'{self.dtype.name}{list(self.shape)}'


def in_file(
  path: pathlib.Path,
  offset: int,
  dtype: np.dtype,
  shape: tuple[int, ...],
  *,
  filters: int = 0,
) -> Stored:
  """A tensor whose elements lie one after another in a file.

  Args:
    path: the file.
    offset: bytes before the tensor.
    dtype: of its elements, little-endian.
    shape: of the tensor.
    filters: see `Stored`.
  """

  def read(start: int, stop: int) -> np.ndarray:
    if start == stop:
      return np.empty(0, dtype)
    # Only what is read is mapped, so that neither the address space nor the
    # resident memory grows with the file.
    begin = offset + start * dtype.itemsize
    page = begin - begin % mmap.ALLOCATIONGRANULARITY
    length = offset + stop * dtype.itemsize - page
    with path.open('rb') as file:
      window = mmap.mmap(
        file.fileno(), length, access=mmap.ACCESS_READ, offset=page
      )
    return np.frombuffer(window, dtype, stop - start, begin - page)

  return Stored(dtype, shape, read, filters, offset)


def in_memory(
  shape: tuple[int, ...],
  dtype: np.dtype,
  load: Callable[[], np.ndarray],
  *,
  filters: int = 0,
) -> Stored:
  """A tensor of a format that gives it whole or not at all.

  Args:
    shape: of the tensor.
    dtype: of its elements.
    load: gives it.
    filters: see `Stored`.
  """

  def read(start: int, stop: int) -> np.ndarray:
    return load().reshape(-1)[start:stop]

  return Stored(dtype, shape, read, filters, load=load)
