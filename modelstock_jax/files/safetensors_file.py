"""The safetensors format: where the tensors of a file are, and a file for some.

  8 bytes: n, little-endian
  n bytes: JSON, {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...,
    "__metadata__": {text: text}}
  tensors, without gaps; offsets count from here

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from collections.abc import Mapping
import json
import math
import pathlib
import struct

import numpy as np

from modelstock_jax.files import stored as stored_lib

# The format's own limit on its header.
MOST_HEADER = 100_000_000


def read(
  path: pathlib.Path,
) -> tuple[dict[str, stored_lib.Stored], dict[str, str]]:
  """The tensors of a file, by name, and its metadata.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a safetensors file, or not a whole one.
  """
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such file.')
  size = path.stat().st_size
  with path.open('rb') as file:
    head = file.read(8)
    length = struct.unpack('<Q', head)[0] if len(head) == 8 else -1
    if not 2 <= length <= min(size - 8, MOST_HEADER):
      raise _broken(path, 'its header is not whole')
    try:
      entries = json.loads(file.read(length))
      metadata = entries.pop('__metadata__', {})
      tensors = {
        name: _tensor(path, name, 8 + length, entry)
        for name, entry in entries.items()
      }
      ends = {name: e['data_offsets'][1] for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise _broken(path, f'{type(error).__name__}: {error}') from error
  wanted = 8 + length + max(ends.values(), default=0)
  if size != wanted:
    raise _broken(path, f'it has {size} bytes, its header says {wanted}')
  return tensors, metadata


def _tensor(path, name, start, entry) -> stored_lib.Stored:
  dtype = stored_lib.CODES[entry['dtype']]
  shape = tuple(map(int, entry['shape']))
  begin, end = entry['data_offsets']
  if min((0, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(f'{entry} does not agree with itself')
  if begin < 0:
    raise ValueError(f'{entry} lies before the file')
  # Trees of Flax, flattened: their kernels are [in, out], PyTorch's [out, in].
  filters = max(len(shape) - 1, 0) if '/' in name else 0
  return stored_lib.in_file(path, start + begin, dtype, shape, filters=filters)


def _broken(path: pathlib.Path, why: str) -> ValueError:
  return ValueError(
    f'{path} is not a whole safetensors file ({why}). Copy it again.'
  )


def header(
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  metadata: Mapping[str, str],
) -> tuple[bytes, dict[str, int]]:
  """The beginning of a file, and where in it each tensor begins.

  Args:
    tensors: dtype and shape by name, in the order in which they will lie.
    metadata: texts to keep in the file.

  Returns:
    Its first bytes, and the offset of each tensor; the last one, under '', is
    the size of the whole file.

  >>> first, at = header({'w': (np.dtype('float32'), (2, 3))}, {})
  >>> len(first) % 8, at == {'w': len(first), '': len(first) + 24}
  (0, True)
  """
  entries: dict[str, object] = {}
  if metadata:
    entries['__metadata__'] = dict(metadata)
  begins, end = {}, 0
  for name, (dtype, shape) in tensors.items():
    begins[name] = end
    end += math.prod(shape) * dtype.itemsize
    entries[name] = {
      'dtype': stored_lib.CODE_OF[dtype],
      'shape': list(shape),
      'data_offsets': [begins[name], end],
    }
  text = json.dumps(entries, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  start = 8 + len(text)
  offsets = {name: start + begin for name, begin in begins.items()}
  return struct.pack('<Q', len(text)) + text, {**offsets, '': start + end}
