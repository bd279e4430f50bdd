"""Where the arrays are in a checkpoint that Flax wrote, as Scenic's are.

Such a file is nested maps in msgpack; an array is an extension of type 1 that
holds [shape, dtype, bytes]. Nothing is loaded: the file is walked from head to
head, and arrays are read later through windows of it.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md and the
docstrings of flax.serialization.
"""

import math
import pathlib
import struct
from typing import Any
from typing import BinaryIO
from typing import NamedTuple

from modelstock_jax.files import stored as stored_lib

_ARRAY = 1  # of Flax's extensions: an array
# Flax cuts arrays of more than 1 GiB into pieces, under this key.
_PIECES = '__msgpack_chunked_array__'
_DEEPEST = 100


class _Payload(NamedTuple):
  """Bytes that are left where they are."""

  kind: int | None  # of an extension
  offset: int
  length: int


def arrays(path: pathlib.Path) -> dict[str, stored_lib.Stored]:
  """The arrays of a file, by their keys joined by '/'.

  Raises:
    ValueError: it is not a whole file of this kind.
  """
  size = path.stat().st_size
  found: dict[str, stored_lib.Stored] = {}
  try:
    with path.open('rb') as file:
      _walk(file, path, size, (), found)
      if file.tell() != size:
        raise ValueError(f'{size - file.tell()} bytes too many')
  except (ValueError, TypeError, struct.error) as error:
    raise ValueError(
      f'{path} is not a whole checkpoint of Flax ({error}). Copy it again.'
    ) from error
  return found


def _walk(
  file: BinaryIO,
  path: pathlib.Path,
  size: int,
  keys: tuple[str, ...],
  found: dict[str, stored_lib.Stored],
) -> None:
  """Notes the arrays of the value that comes next."""
  if len(keys) > _DEEPEST:
    raise ValueError(f'it is nested more than {_DEEPEST} deep')
  code, value = _head(file, size)
  if code == 'map':
    for _ in range(value):
      key = _text(file, size)
      if key == _PIECES:
        raise ValueError(
          f'{"/".join(keys)} is larger than 1 GiB and kept in pieces, which '
          'are not read here'
        )
      _walk(file, path, size, (*keys, key), found)
  elif code == 'list':
    for number in range(value):
      _walk(file, path, size, (*keys, str(number)), found)
  elif isinstance(value, _Payload):
    if value.kind == _ARRAY:
      found['/'.join(keys)] = _array(file, path, size, value)
    file.seek(value.offset + value.length)


def _array(
  file: BinaryIO, path: pathlib.Path, size: int, payload: _Payload
) -> stored_lib.Stored:
  file.seek(payload.offset)
  if _head(file, size) != ('list', 3):
    raise ValueError(f'at byte {payload.offset} there is no array')
  code, rank = _head(file, size)
  if code != 'list':
    raise ValueError(f'at byte {payload.offset} an array has no shape')
  lengths = [_head(file, size) for _ in range(rank)]
  if any(code != 'number' or value < 0 for code, value in lengths):
    raise ValueError(f'at byte {payload.offset} an array has no shape')
  shape = tuple(int(value) for _, value in lengths)
  name = _text(file, size)
  dtypes = {dtype.name: dtype for dtype in stored_lib.CODES.values()}
  if name not in dtypes:
    raise ValueError(f'an array has the dtype {name!r}')
  code, data = _head(file, size)
  dtype = dtypes[name]
  if code != 'bytes' or data.length != math.prod(shape) * dtype.itemsize:
    raise ValueError(f'at byte {payload.offset} an array does not fit itself')
  return stored_lib.in_file(
    path, data.offset, dtype, shape, filters=max(len(shape) - 1, 0)
  )


def _text(file: BinaryIO, size: int) -> str:
  code, value = _head(file, size)
  if code != 'text':
    raise ValueError(f'a key is no text but {code}')
  file.seek(value.offset)
  return file.read(value.length).decode()


# Heads that are followed by a number: its format, and what the number means.
_NUMBERS: dict[int, str] = {
  0xCA: '>f',
  0xCB: '>d',
  0xCC: '>B',
  0xCD: '>H',
  0xCE: '>I',
  0xCF: '>Q',
  0xD0: '>b',
  0xD1: '>h',
  0xD2: '>i',
  0xD3: '>q',
}
_LENGTHS: dict[int, tuple[str, str]] = {
  0xC4: ('bytes', '>B'),
  0xC5: ('bytes', '>H'),
  0xC6: ('bytes', '>I'),
  0xC7: ('extension', '>B'),
  0xC8: ('extension', '>H'),
  0xC9: ('extension', '>I'),
  0xD9: ('text', '>B'),
  0xDA: ('text', '>H'),
  0xDB: ('text', '>I'),
  0xDC: ('list', '>H'),
  0xDD: ('list', '>I'),
  0xDE: ('map', '>H'),
  0xDF: ('map', '>I'),
}


def _head(file: BinaryIO, size: int) -> tuple[str, Any]:
  """What comes next, and its value, its length, or where it lies."""
  first = _take(file, '>B')
  if first <= 0x7F:
    return 'number', first
  if first >= 0xE0:
    return 'number', first - 0x100
  if first <= 0x8F:
    return 'map', first & 0x0F
  if first <= 0x9F:
    return 'list', first & 0x0F
  if first <= 0xBF:
    return 'text', _payload(file, size, None, first & 0x1F)
  if first in (0xC0, 0xC2, 0xC3):
    return 'constant', {0xC0: None, 0xC2: False, 0xC3: True}[first]
  if first in _NUMBERS:
    return 'number', _take(file, _NUMBERS[first])
  if first in _LENGTHS:
    code, form = _LENGTHS[first]
    length = _take(file, form)
    if code in ('list', 'map'):
      return code, length
    kind = _take(file, '>b') if code == 'extension' else None
    return code, _payload(file, size, kind, length)
  if 0xD4 <= first <= 0xD8:
    kind = _take(file, '>b')
    return 'extension', _payload(file, size, kind, 1 << (first - 0xD4))
  raise ValueError(f'byte {first:#x} at {file.tell() - 1} means nothing')


def _payload(
  file: BinaryIO, size: int, kind: int | None, length: int
) -> _Payload:
  offset = file.tell()
  if offset + length > size:
    raise ValueError('it breaks off')
  return _Payload(kind, offset, length)


def _take(file: BinaryIO, form: str) -> Any:
  return struct.unpack(form, file.read(struct.calcsize(form)))[0]
