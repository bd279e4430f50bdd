"""The safetensors format, as strict as the `safetensors` library.

  8 bytes: n, little-endian
  n bytes: JSON, {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...,
    "__metadata__": {text: text}}
  tensors, without gaps; offsets count from here

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from collections.abc import Callable
from collections.abc import Mapping
import json
import math
import pathlib
import struct
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text
from modelstock_jax.formats import write as write_lib

INDEX = '.safetensors.index.json'

_METADATA = '__metadata__'
_CODES = dict(
  zip(
    (
      *('F64', 'F32', 'F16', 'BF16', 'F8_E4M3', 'F8_E5M2'),
      *('I64', 'I32', 'I16', 'I8', 'U64', 'U32', 'U16', 'U8'),
      *('BOOL', 'C64'),
    ),
    tensors_lib.DTYPES.values(),
    strict=True,
  )
)
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}


class File(NamedTuple):
  """A file, or the files of an index: tensors by name, and metadata."""

  tensors: dict[str, tensors_lib.Tensor]
  metadata: dict[str, str]


def read(path: text.PathLike) -> File:
  """Find the tensors of a file, or of the index of several, and read none.

  Args:
    path: a `.safetensors` file or a `.safetensors.index.json`.

  Returns:
    The tensors in the order of the files; the metadata of the first.

  Raises:
    FileNotFoundError: there is no such file, or none that the index names.
    ValueError: a file is damaged, or the index names tensors that are not in
      its files, or files elsewhere.
  """
  import safetensors

  path = text.existing_file(path)
  if path.suffix == '.json':
    return read_index(path, read)
  try:
    # The library checks the header; it does not tell where tensors lie.
    with safetensors.safe_open(path, framework='numpy'):
      pass
    with path.open('rb') as file:
      (length,) = struct.unpack('<Q', file.read(8))
      entries = text.parse_json(file.read(length), text.MANY_VALUES)
    metadata = entries.pop(_METADATA, None) or {}
    tensors = {
      name: _tensor(path, 8 + length, name, entry)
      for name, entry in entries.items()
    }
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is not a whole safetensors file ({text.plain(str(error))}). '
      'Copy it again, or save it again with the library safetensors. If '
      'torch.save wrote it, let its name end with .pt.'
    ) from error
  except ValueError as error:  # of a complete file
    raise ValueError(
      f'{path} has what is not read here: {text.plain(str(error))}.'
    ) from error
  return File(tensors, metadata)


def _tensor(
  path: pathlib.Path, start: int, name: str, entry: Mapping[str, Any]
) -> tensors_lib.Tensor:
  """Return the tensor of an entry of a header that ends at byte `start`."""
  code, shape = entry['dtype'], tuple(entry['shape'])
  if code not in _CODES:
    raise ValueError(
      f'{text.plain(name)} has the dtype {text.shown(code)}, not one of '
      f'{[*_CODES]}. Of quantised weights, take the checkpoint from before'
    )
  return tensors_lib.in_file(
    path,
    start + entry['data_offsets'][0],
    _CODES[code],
    shape,
    # Trees of Flax, flattened, have kernels [in, out]; PyTorch's are [out, in].
    filter_axis=tensors_lib.last_axis(shape) if '/' in name else 0,
  )


def read_index(
  path: pathlib.Path, read_file: Callable[[pathlib.Path], File]
) -> File:
  """Find the tensors of the files that an index names.

  Args:
    path: the index.
    read_file: reads one of them.

  Raises:
    FileNotFoundError, ValueError: as `read`.
  """
  try:
    files = text.read_json(path, text.MANY_VALUES)['weight_map']
    away = sorted(
      file
      for file in files.values()
      if pathlib.PurePath(file).name != file or len(file) > 255
    )
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ValueError(
      f"{path} is not an index of weights: it takes 'weight_map', names "
      f'of tensors to files ({text.shown(error)}).'
    ) from error
  if away:
    raise ValueError(
      f'{path} names files outside its own folder: {text.listed(away)}. Do not '
      'use it unless you know who wrote it.'
    )
  tensors: dict[str, tensors_lib.Tensor] = {}
  metadata: dict[str, str] = {}
  for file in sorted(set(files.values())):
    if not (path.parent / file).is_file():
      raise FileNotFoundError(
        f'{path} names {text.plain(file)}, which is not there. Copy the '
        'checkpoint again.'
      )
    part = read_file(check_inside(path.parent / file))
    metadata = metadata or part.metadata
    tensors |= {n: t for n, t in part.tensors.items() if files.get(n) == file}
  absent = sorted(files.keys() - tensors.keys())
  if absent:
    raise ValueError(
      f'{path} names tensors that its files do not hold: '
      f'{text.listed(absent)}. Copy the checkpoint again.'
    )
  return File(tensors, metadata)


def check_inside(file: pathlib.Path) -> pathlib.Path:
  """Return a file that lies in its folder, or in the cache that links to it.

  Raises:
    ValueError: it is a link to a place outside.
  """
  target, home = file.resolve(), file.parent.resolve()
  # <cache>/models--a--b/snapshots/<commit> links to <cache>/models--a--b/blobs.
  cached = any(
    folder.name == 'snapshots' and target.parent == folder.parent / 'blobs'
    for folder in home.parents
  )
  if target.parent != home and not cached:
    raise ValueError(
      f'{file} is a link to {target}, outside its folder. Put the file itself '
      'there if you trust it.'
    )
  return file


class Header(NamedTuple):
  """The first bytes of a file; where each tensor begins; bytes in all."""

  data: bytes
  offsets: dict[str, int]
  size: int


def header(
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  metadata: Mapping[str, str],
) -> Header:
  """Lay out a file.

  Args:
    tensors: dtype and shape by name, in the order in which they will lie.
    metadata: texts to keep in the file.

  Raises:
    ValueError: the format cannot hold such a dtype, name or metadata.

  >>> head = header({'w': (np.dtype('float32'), (2, 3))}, {})
  >>> len(head.data) % 8, head.size - len(head.data), head.offsets['w'] % 8
  (0, 24, 0)
  """
  wrong = [
    key
    for key, value in metadata.items()
    if not (isinstance(key, str) and isinstance(value, str))
  ]
  if wrong:
    raise ValueError(
      f'metadata {text.shown(wrong)} must be strings. Use str().'
    )
  if _METADATA in tensors:
    raise ValueError(f'{text.shown(_METADATA)} cannot name a tensor.')
  entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
  begins, end = {}, 0
  for name, (dtype, shape) in tensors.items():
    if dtype not in _CODE_OF:
      raise ValueError(
        f'{text.plain(name)}: {dtype} is not among the dtypes of safetensors, '
        f'{[*_CODES]}.'
      )
    begins[name] = end
    end += math.prod(shape) * dtype.itemsize
    entries[name] = {
      'dtype': _CODE_OF[dtype],
      'shape': list(shape),
      'data_offsets': [begins[name], end],
    }
  data = json.dumps(entries, ensure_ascii=False, separators=(',', ':')).encode()
  data += b' ' * (-len(data) % 8)
  start = 8 + len(data)
  offsets = {name: start + begin for name, begin in begins.items()}
  return Header(struct.pack('<Q', len(data)) + data, offsets, start + end)


def write(
  path: text.PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
  """Write arrays to a file, which appears whole or not at all.

  Args:
    path: the file to write. Its folder exists; an older file is replaced.
    arrays: numpy or jax arrays by name, brought to the host one at a time.
    metadata: texts to keep in the file.

  Raises:
    ValueError: as `header`.
  """
  # Large elements first, so that each tensor lies at a multiple of its own.
  names = sorted(arrays, key=lambda n: (-arrays[n].dtype.itemsize, n))
  try:
    head = header(
      {n: (np.dtype(arrays[n].dtype), arrays[n].shape) for n in names}, metadata
    )
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  with write_lib.replacing(path) as temporary, temporary.open('wb') as file:
    file.write(head.data)
    for name in names:
      # order='C': the file holds an array's memory, which may be transposed.
      array = np.asarray(arrays[name], order='C')
      file.write(array.reshape(-1).view(np.uint8).data)
