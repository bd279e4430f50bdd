"""Arrays in a checkpoint that Flax wrote, as Scenic's are.

Such a file is nested maps in msgpack; an array is an extension of type 1 that
holds [shape, dtype, bytes]. Libraries would load all of it, optimizer state
included; here the file is walked from head to head and arrays are read later,
through windows.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md and the
docstrings of flax.serialization.
"""

import math
import pathlib
import struct
from typing import Any
from typing import BinaryIO

from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

_ARRAY = 1  # of Flax's extensions: an array
# Limit of a file, which bounds the time that it takes.
_MAX_VALUES = 500_000
# Kinds that are followed by bytes.
_SIZED = ('bytes', 'text', 'extension')
# Flax cuts arrays of more than 1 GiB into pieces, under this key.
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
    self._path, self._file, self._heads = path, file, 0

  def walk(self, keys: tuple[str, ...] = ()) -> None:
    """Note the arrays of the next value, and leave the file behind it."""
    if len(keys) > text.MAX_DEPTH:
      raise ValueError(f'it is nested more than {text.MAX_DEPTH} deep')
    name = '/'.join(keys)
    kind, value = self._head()
    if kind == 'map':
      for _ in range(value):
        key = self._text()
        if key == _PIECES:
          raise ValueError(
            f'{text.plain(name)} is larger than 1 GiB and kept in pieces, '
            'which are not read here'
          )
        self.walk((*keys, key))
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

  def _array(self) -> tensors_lib.Tensor:
    """Return the array of an extension: its shape, dtype and bytes."""
    start = self._file.tell()
    head, (kind, rank) = self._head(), self._head()
    if head != ('list', 3) or kind != 'list' or rank > tensors_lib.MAX_RANK:
      raise ValueError(f'at byte {start} there is no array')
    heads = [self._head() for _ in range(rank)]
    shape = tuple(value for _, value in heads)
    if not all(
      kind == 'number' and isinstance(value, int) and value >= 0
      for kind, value in heads
    ):
      raise ValueError(f'at byte {start} an array has no shape')
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
