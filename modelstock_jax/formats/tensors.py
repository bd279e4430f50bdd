"""Named tensors on disk, read whole or through windows."""

from collections.abc import Callable
from collections.abc import Collection
import functools
import logging
import math
import os
import pathlib
import re
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

from modelstock_jax.formats import remote
from modelstock_jax.formats import text

_log = logging.getLogger(__name__)

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
# Sub-trees of weights, and what DiLoCo has its replicas' in.
SUBTREES = ('params', 'model_params')
_REPLICAS = 'inner_state'

# What DataParallel, torch.compile, Lightning and the classifiers of Model Soups
# and WiSE-FT put before the names of a state dict.
_WRAPPERS = re.compile(r'^((module|_orig_mod|model|image_encoder)\.)+')


class Tensor(NamedTuple):
  """A tensor of a checkpoint, which is read when it is asked for.

  Attributes:
    shape: shape of the tensor.
    dtype: dtype of its elements.
    load: () -> the complete tensor, an array that the caller may change.
    window: (start, stop) -> those elements in C order, flat. None: the format
      gives tensors only as a whole.
    filter_axis: the axis of the outputs: the first in PyTorch's layout, the
      last in Flax's.
    offset: bytes before it in the file that holds it; -1 if it is in pieces.
    factors: of a tensor that is not stored but a product, see `lora.Factors`.
    forget: () -> None, drops it from the system's cache of files.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]
  window: Callable[[int, int], np.ndarray] | None = None
  filter_axis: int = 0
  offset: int = 0
  factors: Any = None
  forget: Callable[[], None] = lambda: None

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

  def part(self, index: int) -> 'Tensor':
    """Return one index of the first axis."""
    size = math.prod(self.shape[1:])

    def window(start: int, stop: int) -> np.ndarray:
      return self.read(index * size + start, index * size + stop)

    part = self._replace(shape=self.shape[1:], load=lambda: self.load()[index])
    return part._replace(window=window) if self.window else part

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


def select(
  path: str, names: Collection[str], pattern: str | None, replicas: bool = False
) -> dict[str, str]:
  """Select arrays of weights among those of a checkpoint.

  Args:
    path: of the checkpoint, for the error.
    names: of its arrays.
    pattern: a regular expression, the arrays whose complete names it matches.
      None: those of the sub-tree 'params' or 'model_params', else all.
    replicas: prefer the replicas of DiLoCo to their mean, under its names.

  Returns:
    The names of the selected arrays, by the names that they are to have.

  Raises:
    ValueError: nothing is selected.
  """
  prefix = ''
  if pattern is None:
    tops = sorted({name.split('/')[0] for name in names})
    top = next((top for top in SUBTREES if top in tops), None)
    if replicas and top and _REPLICAS in tops:
      prefix = f'{_REPLICAS}/'
    pattern = '.*' if top is None else f'{prefix}{top}/.*'
    if top and len(tops) > 1:
      tree, trees = prefix + top, text.listed(tops)
      _log.info('%s: its sub-tree %s, of %s.', path, tree, trees)
  selected = [name for name in names if re.fullmatch(pattern, name)]
  if not selected:
    raise ValueError(
      f'{path}: {text.shown(pattern)} matches none of its arrays: '
      f'{text.listed(names)}.'
    )
  return {name.removeprefix(prefix): name for name in selected}


def unwrapped(names: Collection[str]) -> dict[str, str]:
  """Map the names of a state dict to those without prefixes of wrappers.

  The prefixes are `module.`, `_orig_mod.`, `model.` and `image_encoder.`, in
  any order. Where two names would become one, all are kept as they are.

  >>> unwrapped(['module.model.visual.proj', 'module.classification_head.bias'])
  {'module.model.visual.proj': 'visual.proj', \
'module.classification_head.bias': 'classification_head.bias'}
  """
  plain = {name: _WRAPPERS.sub('', name) for name in names}
  unique = len(set(plain.values())) == len(plain)
  return plain if unique else {name: name for name in names}


def last_axis(shape: tuple[int, ...]) -> int:
  """Return the axis of the filters in Flax's layout, [..., in, out]."""
  return max(len(shape) - 1, 0)


def in_memory(array: np.ndarray) -> Tensor:
  """Return an array of Flax's layout as a tensor, of which reads are copies."""
  load, axis = functools.partial(np.array, array), last_axis(array.shape)
  return Tensor(array.shape, array.dtype, load, filter_axis=axis)


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
  in_bucket = remote.kvstore(path)['driver'] != 'file'

  def window(start: int, stop: int) -> np.ndarray:
    begin, count = offset + start * dtype.itemsize, stop - start
    if in_bucket and count:
      with text.explained(f'{path} cannot be read: '):
        data = remote.read(path, begin, begin + count * dtype.itemsize)
      return np.frombuffer(bytearray(data), dtype)
    array = np.fromfile(path, dtype, count, offset=begin)
    if array.size < count:
      raise ValueError(f'{path} has become shorter. Copy it again.')
    return array

  def load() -> np.ndarray:
    return window(0, math.prod(shape)).reshape(shape)

  def forget() -> None:
    if not in_bucket and hasattr(os, 'posix_fadvise'):  # not on a Mac
      nbytes = math.prod(shape) * dtype.itemsize
      with path.open('rb') as file:
        os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)

  return Tensor(shape, dtype, load, window, filter_axis, offset, forget=forget)


def strided(
  flat: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
  """Return the tensor whose elements lie in a flat one by strides.

  Args:
    flat: one axis of elements, with windows; it holds all that strides reach.
    shape: of the result.
    strides: in elements, for each axis.
  """

  def load() -> np.ndarray:
    array = flat.load()
    steps = [stride * flat.dtype.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(array, shape, steps)
    return view.copy(order='C')

  return Tensor(shape, flat.dtype, load, forget=flat.forget)
