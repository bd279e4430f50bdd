"""Named tensors on disk, read whole or through windows."""

from collections.abc import Callable
from collections.abc import Collection
import math
import pathlib
import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from modelstock_jax.formats import text

# The dtypes of the elements, by numpy's names.
FLOATING = ('float64', 'float32', 'float16', 'bfloat16')
DTYPES = {
  dtype.name: dtype
  for dtype in (
    *map(np.dtype, FLOATING),
    *map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)),
    *map(np.dtype, ('int64', 'int32', 'int16', 'int8')),
    *map(np.dtype, ('uint64', 'uint32', 'uint16', 'uint8')),
    *map(np.dtype, ('bool', 'complex64')),
  )
}
MAX_RANK = 64  # of numpy's arrays


class Tensor(NamedTuple):
  """A tensor of a checkpoint, which is read when it is asked for.

  Attributes:
    shape: shape of the tensor.
    dtype: dtype of its elements.
    load: () -> the complete tensor, an array that the caller may change.
    window: (start, stop) -> those elements in C order, flat: a window of the
      file, which goes when the array does. None: the format gives tensors
      only as a whole.
    filter_axis: the axis of the outputs: the first in PyTorch's layout, the
      last in Flax's.
    offset: bytes before it in the file that holds it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]
  window: Callable[[int, int], np.ndarray] | None = None
  filter_axis: int = 0
  offset: int = 0

  def read(self, start: int, stop: int) -> np.ndarray:
    """Read the elements `start` to `stop` in C order, flat."""
    if self.window is not None:
      return self.window(start, stop)
    return self.load().reshape(-1)[start:stop]

  def cached(self) -> 'Tensor':
    """Return the tensor for repeated reads: whole ones are loaded now."""
    if self.window is not None:
      return self
    flat = self.load().reshape(-1)
    return self._replace(window=lambda start, stop: flat[start:stop])

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def floating(self) -> bool:
    """True if it is merged; what is not must agree across models."""
    return self.dtype.name in FLOATING

  def __str__(self) -> str:
    return f'{self.dtype.name}{list(self.shape)}'


def select(where: str, names: Collection[str], pattern: str) -> list[str]:
  """Return the names that a regular expression matches completely.

  Args:
    where: the checkpoint, for the error.
    names: of its arrays.
    pattern: the regular expression.

  Raises:
    ValueError: it matches none.
  """
  selected = [name for name in names if re.fullmatch(pattern, name)]
  if not selected:
    raise ValueError(
      f'{where}: {text.shown(pattern)} matches none of its arrays: '
      f'{text.listed(names)}.'
    )
  return selected


def last_axis(shape: tuple[int, ...]) -> int:
  """Return the axis of the filters in Flax's layout, [..., in, out]."""
  return max(len(shape) - 1, 0)


def in_file(
  path: pathlib.Path,
  offset: int,
  dtype: np.dtype,
  shape: tuple[int, ...],
  *,
  filter_axis: int = 0,
) -> Tensor:
  """Return a tensor whose elements lie one after another in a file.

  Args:
    path: the file.
    offset: bytes before the tensor.
    dtype: dtype of its elements, little-endian.
    shape: shape of the tensor.
    filter_axis: see `Tensor`.
  """

  def load() -> np.ndarray:
    array = np.fromfile(path, dtype, math.prod(shape), offset=offset)
    if array.size < math.prod(shape):
      raise ValueError(f'{path} has become shorter. Copy it again.')
    return array.reshape(shape)

  def window(start: int, stop: int) -> np.ndarray:
    if start == stop:
      return np.empty(0, dtype)
    # Only what is read is mapped, so that neither the address space nor the
    # resident memory grows with the file.
    begin = offset + start * dtype.itemsize
    return np.asarray(np.memmap(path, dtype, 'r', begin, (stop - start,)))

  return Tensor(shape, dtype, load, window, filter_axis, offset)


def strided(
  flat: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
  """Return the tensor whose elements lie in a flat one by strides.

  Args:
    flat: one axis of elements, with windows; it holds all that strides reach.
    shape: of the result.
    strides: in elements, for each axis.
  """

  def view() -> np.ndarray:
    array = flat.read(0, flat.size)
    steps = [stride * flat.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(array, shape, steps)

  return Tensor(
    shape,
    flat.dtype,
    load=lambda: view().copy(order='C'),
    window=lambda start, stop: view().flat[start:stop],
  )
