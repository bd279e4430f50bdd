"""Arrays in a checkpoint that Flax wrote, as Scenic's are.

Such a file is nested maps in msgpack; an array is an extension of type 1 that
holds [shape, dtype, bytes]. Libraries would load all of it, optimizer state
included; here the file is walked from head to head and arrays are read later,
through windows.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md and the
docstrings of flax.serialization.
"""

from collections.abc import Sequence
import itertools
import math
import pathlib
import struct
from typing import Any
from typing import BinaryIO

import numpy as np

from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

_ARRAY = 1  # of Flax's extensions: an array
# Limit of a file, which bounds the time that it takes.
_MAX_VALUES = 500_000
# Kinds that are followed by bytes.
_SIZED = ('bytes', 'text', 'extension')
# A key of the maps in which Flax keeps arrays of more than 1 GiB in pieces.
_PIECES = '__msgpack_chunked_array__'

# Kinds whose head is followed by a number, their length or value: first byte,
# and formats of the number, one for each byte from there on.
_HEADS = {
  byte: (kind, f'>{form}')
  for kind, first, forms in (
    ('bytes', 0xC4, 'BHI'),
    ('extension', 0xC7, 'BHI'),
    ('number', 0xCA, 'fdBHIQbhiq'),
    ('text', 0xD9, 'BHI'),
    ('list', 0xDC, 'HI'),
    ('map', 0xDE, 'HI'),
  )
  for byte, form in enumerate(forms, first)
}


def read(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  """Find the arrays of a file, by their keys joined by '/', and read none.

  Raises:
    ValueError: it is not a complete file of this kind.
  """
  try:
    with path.open('rb') as file:
      walker = _Walker(path, file)
      walker.walk()
      if file.tell() != walker.size:
        raise ValueError(f'{walker.size - file.tell()} bytes too many')
  except (EOFError, struct.error) as error:
    raise ValueError(
      f'{path} is not a whole checkpoint of Flax ({error}). Copy it again.'
    ) from error
  except ValueError as error:  # not of a cut
    raise ValueError(f'{path} is no checkpoint of Flax: {error}.') from error
  return walker.arrays


class _Walker:
  """Notes the arrays of a file, going from head to head.

  Attributes:
    arrays: arrays by name.
    size: size of the file, bytes.
  """

  def __init__(self, path: pathlib.Path, file: BinaryIO):
    self.arrays: dict[str, tensors_lib.Tensor] = {}
    self.size = path.stat().st_size
    self._numbers: dict[str, Any] = {}
    self._path, self._file, self._heads = path, file, 0

  def walk(self, keys: tuple[str, ...] = ()) -> None:
    """Note the arrays of the next value, and leave the file behind it."""
    if len(keys) > text.MAX_DEPTH:
      raise ValueError(f'it is nested more than {text.MAX_DEPTH} deep')
    name = '/'.join(keys)
    kind, value = self._head()
    if kind == 'map':
      members = set()
      for _ in range(value):
        members.add(key := self._text())
        self.walk((*keys, key))
      if _PIECES in members:
        self._join(name)
    elif kind == 'list':
      for number in range(value):
        self.walk((*keys, str(number)))
    elif kind in _SIZED:
      end = self._file.tell() + value
      if kind == 'extension' and self._take('>b') == _ARRAY:
        if name in self.arrays:
          raise ValueError(f'{text.plain(name)} stands twice')
        self.arrays[name] = self._array()
      self._file.seek(end)
    elif kind == 'number':
      self._numbers[name] = value

  def _join(self, name: str) -> None:
    """Take the pieces of an array for one array of the shape that is stated."""

    def numbered(part: str, values: dict[str, Any]) -> list[Any]:
      names = (f'{name}/{part}/{number}' for number in itertools.count())
      return [
        values.pop(n) for n in itertools.takewhile(values.__contains__, names)
      ]

    shape = _checked(numbered('shape', self._numbers))
    pieces = numbered('chunks', self.arrays)
    size, kinds = sum(p.size for p in pieces), {p.dtype for p in pieces}
    if name in self.arrays or size != math.prod(shape) or len(kinds) != 1:
      raise ValueError(f'the pieces of {text.plain(name)} do not fit')
    self.arrays[name] = _joined(pieces, shape)

  def _array(self) -> tensors_lib.Tensor:
    """Return the array of an extension: its shape, dtype and bytes."""
    start = self._file.tell()
    head, (kind, rank) = self._head(), self._head()
    if head != ('list', 3) or kind != 'list':
      raise ValueError(f'at byte {start} there is no array')
    heads = [self._head() for _ in range(rank)]
    shape = _checked([n if kind == 'number' else kind for kind, n in heads])
    name = self._text()
    if name not in tensors_lib.DTYPES:
      raise ValueError(f'an array has the dtype {text.shown(name)}')
    dtype = tensors_lib.DTYPES[name]
    if self._head() != ('bytes', math.prod(shape) * dtype.itemsize):
      raise ValueError(f'at byte {start} an array does not fit itself')
    axis = tensors_lib.last_axis(shape)
    offset = self._file.tell()
    return tensors_lib.in_file(
      self._path, offset, dtype, shape, filter_axis=axis
    )

  def _text(self) -> str:
    kind, length = self._head()
    if kind != 'text':
      raise ValueError(f'a key is no text but {kind}')
    return self._file.read(length).decode()

  def _head(self) -> tuple[str, Any]:
    """Read the next head: a kind, and its value or its length in bytes.

    The bytes that follow a head lie within the file.
    """
    self._heads += 1
    if self._heads > _MAX_VALUES:
      raise ValueError(f'it has more than {_MAX_VALUES} values')
    first = self._take('>B')
    kind, value = 'number', first
    if first in _HEADS:
      kind, form = _HEADS[first]
      value = self._take(form) + (kind == 'extension')  # a byte for its type
    elif first >= 0xE0:
      value = first - 0x100
    elif 0xD4 <= first <= 0xD8:
      kind, value = 'extension', 1 + (1 << (first - 0xD4))
    elif first in (0xC0, 0xC2, 0xC3):
      kind, value = 'constant', None
    elif first > 0xBF:
      raise ValueError(
        f'byte {first:#x} at {self._file.tell() - 1} means nothing'
      )
    elif first > 0x9F:
      kind, value = 'text', first & 0x1F
    elif first > 0x7F:
      kind, value = 'map' if first <= 0x8F else 'list', first & 0x0F
    if kind in _SIZED and self._file.tell() + value > self.size:
      raise EOFError('it breaks off')
    return kind, value

  def _take(self, form: str) -> Any:
    """Read one number."""
    return struct.unpack(form, self._file.read(struct.calcsize(form)))[0]


def _checked(shape: Sequence[Any]) -> tuple[int, ...]:
  """Return a shape; raise a ValueError if it is none."""
  sizes = all(isinstance(size, int) and size >= 0 for size in shape)
  if not sizes or len(shape) > tensors_lib.MAX_RANK:
    raise ValueError(f'an array has the shape {text.shown(shape)}')
  return tuple(shape)


def _joined(
  pieces: Sequence[tensors_lib.Tensor], shape: tuple[int, ...]
) -> tensors_lib.Tensor:
  """Return the tensor whose elements are those of the pieces, in order."""
  begins = itertools.accumulate((p.size for p in pieces[:-1]), initial=0)
  places = [*zip(pieces, begins, strict=True)]

  def window(start: int, stop: int) -> np.ndarray:
    ends = np.array([start, stop])
    return np.concatenate(
      [p.read(*np.clip(ends - begin, 0, p.size)) for p, begin in places]
    )

  def load() -> np.ndarray:
    return window(0, math.prod(shape)).reshape(shape)

  axis = tensors_lib.last_axis(shape)
  return tensors_lib.Tensor(shape, pieces[0].dtype, load, window, axis, -1)
