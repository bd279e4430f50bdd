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
    ValueError: it is not a whole file of this kind.
  """
  size = path.stat().st_size
  arrays: dict[str, tensors_lib.Tensor] = {}
  try:
    with path.open('rb') as file:
      _walk(file, size, (), path, arrays)
      if file.tell() != size:
        raise ValueError(f'{size - file.tell()} bytes too many')
  except (ValueError, struct.error) as error:
    raise ValueError(
      f'{path} is not a whole checkpoint of Flax ({error}). Copy it again.'
    ) from error
  return arrays


def _walk(
  file: BinaryIO,
  size: int,
  keys: tuple[str, ...],
  path: pathlib.Path,
  arrays: dict[str, tensors_lib.Tensor],
) -> None:
  """Note the arrays of the next value, and leave the file behind it."""
  if len(keys) > text.MAX_DEPTH:
    raise ValueError(f'it is nested more than {text.MAX_DEPTH} deep')
  name = '/'.join(keys)
  kind, value = _head(file, size)
  end = file.tell() + value if kind in ('bytes', 'text', 'extension') else None
  if kind == 'map':
    for _ in range(value):
      key = _text(file, size)
      if key == _PIECES:
        raise ValueError(
          f'{text.plain(name)} is larger than 1 GiB and kept in pieces, which '
          'are not read here'
        )
      _walk(file, size, (*keys, key), path, arrays)
  elif kind == 'list':
    for number in range(value):
      _walk(file, size, (*keys, str(number)), path, arrays)
  elif kind == 'extension' and _take(file, '>b') == _ARRAY:
    if name in arrays:
      raise ValueError(f'{text.plain(name)} stands twice')
    arrays[name] = _array(file, size, path)
  if end is not None:
    file.seek(end + (kind == 'extension'))  # whose length leaves its type out


def _array(file: BinaryIO, size: int, path: pathlib.Path) -> tensors_lib.Tensor:
  start = file.tell()
  head, (kind, rank) = _head(file, size), _head(file, size)
  if head != ('list', 3) or kind != 'list' or rank > tensors_lib.MAX_RANK:
    raise ValueError(f'at byte {start} there is no array')
  heads = [_head(file, size) for _ in range(rank)]
  shape = tuple(value for _, value in heads)
  if not all(
    kind == 'number' and isinstance(value, int) and value >= 0
    for kind, value in heads
  ):
    raise ValueError(f'at byte {start} an array has no shape')
  name = _text(file, size)
  if name not in tensors_lib.DTYPES:
    raise ValueError(f'an array has the dtype {text.shown(name)}')
  dtype = tensors_lib.DTYPES[name]
  if _head(file, size) != ('bytes', math.prod(shape) * dtype.itemsize):
    raise ValueError(f'at byte {start} an array does not fit itself')
  return tensors_lib.in_file(
    path,
    file.tell(),
    dtype,
    shape,
    filter_axis=tensors_lib.last_axis(shape),
  )


def _text(file: BinaryIO, size: int) -> str:
  kind, length = _head(file, size)
  if kind != 'text':
    raise ValueError(f'a key is no text but {kind}')
  return file.read(length).decode()


def _head(file: BinaryIO, size: int) -> tuple[str, Any]:
  """Read the next head: a kind, and its value or length.

  What has a length of bytes ends within the file.
  """
  first = _take(file, '>B')
  if first <= 0x7F or first >= 0xE0:
    return 'number', first if first <= 0x7F else first - 0x100
  if first <= 0x9F:
    return 'map' if first <= 0x8F else 'list', first & 0x0F
  if first in (0xC0, 0xC2, 0xC3):
    return 'constant', None
  if first <= 0xBF:
    kind, value = 'text', first & 0x1F
  elif 0xD4 <= first <= 0xD8:
    kind, value = 'extension', 1 << (first - 0xD4)
  elif first in _HEADS:
    kind, form = _HEADS[first]
    value = _take(file, form)
  else:
    raise ValueError(f'byte {first:#x} at {file.tell() - 1} means nothing')
  length = {'bytes': value, 'text': value, 'extension': value + 1}.get(kind, 0)
  if file.tell() + length > size:
    raise ValueError('it breaks off')
  return kind, value


def _take(file: BinaryIO, form: str) -> Any:
  return struct.unpack(form, file.read(struct.calcsize(form)))[0]
