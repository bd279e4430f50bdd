"""Files of PyTorch, read without PyTorch and without running what they say.

`torch.save` and `torch.jit.save` write a zip file:

  NAME/data.pkl: a pickle, in which tensors are views of storages
  NAME/data/KEY: the elements of a storage, not compressed
  NAME/byteorder: 'little'; older files have none

Before version 1.6, `torch.save` wrote pickles one after another (a magic
number, a version, properties of the machine, the content, the keys of the
storages), then for each key the number of elements, int64, and the elements.
`pickle.dump` writes one pickle, in which each storage is such a file.

Source: torch/serialization.py and torch/_utils.py of PyTorch.
"""

from collections.abc import Callable
from collections.abc import Iterator
import io
import math
import os
import pathlib
import re
from typing import Any
from typing import BinaryIO
import zipfile

import numpy as np

from modelstock_jax.formats import pickles
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

INDEX = '.bin.index.json'
SUFFIXES = ('.pt', '.pth', '.bin', '.ckpt')

_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, 'little')
# Members of a state dict, and characters of a name.
_MAX_MEMBERS, _MAX_NAME = 100_000, 500
# Elements of a tensor that repeats those of its storage.
_MAX_EXPANDED = 2**24
# Bytes that are read at once of a pickle.dump, and of a storage in it.
_MAX_READ, _MAX_HEADER = 10_000, 1000
_STATE_DICTS = ('state_dict', 'model_state_dict', 'model')
# How to save the state dict of what torch.save or pickle.dump wrote.
_EXPORT = '\n  model = {}\n  torch.save(model.state_dict(), NEW_FILE)'
_TORCH = _EXPORT.format(
  "torch.load(FILE, map_location='cpu', weights_only=False)"
)
_PICKLE = _EXPORT.format("pickle.load(open(FILE, 'rb'))")
_SAVE_AGAIN = (
  "Save it again: torch.save(torch.load(FILE, map_location='cpu'), NEW_FILE)."
)


# The offset of a storage in the file, in bytes.
_Locate = Callable[[pickles.Storage], int]


# What the reading of a damaged file may raise.
_DAMAGE = (ValueError, LookupError, TypeError, RuntimeError, zipfile.BadZipFile)


class _RefusedError(ValueError):
  """An error that says what to do."""


def read(path: text.PathLike) -> dict[str, tensors_lib.Tensor]:
  """Find the tensors of a file, or of the index of several, and read none.

  The file holds a state dict, or has one under 'state_dict',
  'model_state_dict' or 'model'; nested dicts have their keys joined by dots. Of
  a TorchScript archive or a pickled `torch.nn.Module`, of pickle.dump too, they
  are the parameters and buffers. Nothing that the file names is imported or
  called; what is not in the state dict is passed over.

  Args:
    path: a file of torch.save or torch.jit.save, or a `.bin.index.json`.

  Returns:
    The tensors by name, in the order of the file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or its state dict holds more than tensors.
  """
  path = text.existing_file(path)
  if path.name.endswith(INDEX):
    return safetensors.read_index(
      path, lambda file: safetensors.File(read(file), {})
    ).tensors
  tensors: dict[str, tensors_lib.Tensor] = {}
  export, again = _TORCH, '.'
  try:
    with _File(path) as file:
      begin = file.read(512)
      if begin.startswith(b'PK\3\4'):
        content, locate = _read_zip(file)
      elif _MAGIC in begin[:32]:
        content, locate = _read_legacy(file, 0, path.stat().st_size)
      elif begin[257:262] == b'ustar':
        raise _RefusedError(f'it is a tar file of torch 0.1. {_SAVE_AGAIN}')
      else:
        export, again = _PICKLE, f', if you trust it:{_PICKLE}'
        content, locate = _read_dumped(file)
      for name, view in _views(content, export):
        if name in tensors:
          raise ValueError(f'the name {name} stands twice')
        tensors[name] = _tensor(path, name, view, locate)
      if not tensors:
        raise _RefusedError('it holds no tensor. Give the file of the weights.')
  except _RefusedError as error:
    raise ValueError(f'{path}: {error}') from error
  except _DAMAGE as error:
    cause = text.plain(str(error.args[0] if error.args else error))
    raise ValueError(
      f'{path} is not a whole file of torch.save ({cause}). Get it again, or '
      f'save it again{again}'
    ) from error
  return tensors


class _File(io.FileIO):
  """A file of which no more than the bytes of a pickle are read at once."""

  def read(self, size: int | None = -1, /) -> bytes:
    if size is not None and size > pickles.MAX_BYTES:
      raise ValueError(f'{size} bytes are to be read at once')
    return super().read(size) or b''


def _read_zip(file: _File) -> tuple[Any, _Locate]:
  archive = zipfile.ZipFile(file)
  names = archive.namelist()
  if len(set(names)) < len(names):
    raise ValueError('two of its records have one name')
  pickled = [name for name in names if re.fullmatch(r'[^/]+/data.pkl', name)]
  if len(pickled) != 1:
    raise _RefusedError(
      f'it is a zip file with {len(pickled)} records NAME/data.pkl, not one. '
      + _SAVE_AGAIN
    )
  root = pickled[0].removesuffix('data.pkl')
  order = f'{root}byteorder'
  for name in {order, *pickled}.intersection(names):
    _record_offset(file, archive.getinfo(name), 0)  # and that it is not packed
  if order in names and archive.read(order) != b'little':
    raise _RefusedError(f'its numbers are big-endian. {_SAVE_AGAIN}')

  def locate(storage: pickles.Storage) -> int:
    entry = archive.getinfo(f'{root}data/{storage.key}')
    return _record_offset(file, entry, storage.size * storage.dtype.itemsize)

  return pickles.load(io.BytesIO(archive.read(pickled[0])))[0], locate


def _record_offset(file: _File, entry: zipfile.ZipInfo, size: int) -> int:
  """Return the offset of a record of `size` bytes or more in a zip file."""
  name = text.plain(entry.filename)
  if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
    raise _RefusedError(f'{name} is compressed or encrypted. {_SAVE_AGAIN}')
  end = file.seek(0, os.SEEK_END)
  file.seek(min(max(entry.header_offset, 0), end))
  header = file.read(30)
  lengths = np.frombuffer(header, '<u2', 2, 26)  # of its name and padding
  start = entry.header_offset + 30 + int(lengths.sum())
  if (
    entry.header_offset < 0
    or header[:4] != b'PK\3\4'
    or start + entry.file_size > end
  ):
    raise ValueError(f'{name} is not where it is said to be')
  if entry.file_size < size:
    raise ValueError(f'{name} has {entry.file_size} bytes, not {size}')
  return start


class _Stream:
  """A pickle in a file, of which long strings of bytes are passed over."""

  def __init__(self, file: BinaryIO):
    self.tell, self._file, self._left = file.tell, file, pickles.MAX_BYTES

  def read(self, size: int) -> bytes | pickles.Bytes:
    """Read bytes, or pass over many."""
    if size <= _MAX_READ:
      return self._counted(self._file.read(size))
    if size > os.fstat(self._file.fileno()).st_size:
      raise ValueError('it breaks off')
    return pickles.Bytes(self._file.seek(size, os.SEEK_CUR) - size, size)

  def readline(self) -> bytes:
    """Read a line."""
    return self._counted(self._file.readline(_MAX_READ))

  def _counted(self, data: bytes) -> bytes:
    self._left -= len(data)
    if self._left < 0:
      raise ValueError(f'it has more than {pickles.MAX_BYTES} bytes')
    return data


def _read_dumped(file: _File) -> tuple[Any, _Locate]:
  places: dict[str, tuple[Any, int]] = {}

  def load_bytes(data: pickles.Bytes) -> Any:
    key = str(data.start)
    if key not in places:
      storage, locate = _read_legacy(file, data.start, data.start + data.size)
      offset = 0
      if isinstance(storage, pickles.Storage):  # of a dtype that is read
        storage, offset = storage._replace(key=key), locate(storage)
      places[key] = storage, offset
    return places[key][0]

  with open(file.name, 'rb') as dumped:
    content, _ = pickles.load(_Stream(dumped), load_bytes)
  return content, lambda storage: places[storage.key][1]


def _read_legacy(file: _File, start: int, end: int) -> tuple[Any, _Locate]:
  file.seek(start)
  most = _MAX_HEADER if start else pickles.MAX_BYTES
  stream = io.BytesIO(file.read(min(end - start, most)))
  pickles.load(stream)  # the magic number
  pickles.load(stream)  # the version
  machine, _ = pickles.load(stream)
  if machine['little_endian'] is not True:
    raise _RefusedError(f'its numbers are big-endian. {_SAVE_AGAIN}')
  content, storages = pickles.load(stream)
  keys, _ = pickles.load(stream)
  offsets: dict[str, int] = {}
  offset = start + stream.tell()
  for key in keys:
    storage = storages.get(key)
    if storage is None:  # of a dtype that is not read, nor what follows
      break
    file.seek(offset)
    if int.from_bytes(file.read(8), 'little') != storage.size:
      raise ValueError(f'storage {key} has another size than it should')
    offsets[f'storage {key}'] = offset + 8
    offset += 8 + storage.size * storage.dtype.itemsize
    if offset > end:
      raise ValueError(f'storage {key} reaches beyond the end')
  return content, lambda storage: offsets[f'storage {storage.key}']


def _views(content: Any, export: str) -> Iterator[tuple[str, pickles.View]]:
  """Yield the names and tensors of a state dict; errors end with `export`."""
  for key in 2 * _STATE_DICTS:  # one may hold another
    if isinstance(content, dict) and isinstance(content.get(key), dict):
      content = content[key]
  todo = [('', content)]
  known: dict[int, dict[str, Any]] = {}  # no object is looked through twice
  for _ in range(_MAX_MEMBERS):
    if not todo:
      return
    name, value = todo.pop()
    if len(name) > _MAX_NAME or len(todo) > _MAX_MEMBERS:
      break
    if name and isinstance(value, pickles.View):
      yield name, value
      continue
    if id(value) not in known:
      known[id(value)] = _members(name, value, export)
    prefix = f'{name}.' if name else ''
    todo += [(prefix + key, x) for key, x in reversed(known[id(value)].items())]
  raise ValueError(
    f'its state dict has more than {_MAX_MEMBERS} members, or names of more '
    f'than {_MAX_NAME} characters'
  )


def _members(name: str, value: Any, export: str) -> dict[str, Any]:
  """Return the members of a dict or module; raise for anything else."""
  kind = f'of type {type(value).__name__}'
  if isinstance(value, pickles.Object):
    kind = f'made by {text.plain(value.name)}, which is not called'
    if isinstance(value.state, dict):
      if _is_scripted(value):
        return {
          key: member
          for key, member in value.state.items()
          if isinstance(member, pickles.View) or _is_scripted(member)
        }
      if '_parameters' in value.state:
        return _members_of_module(value.state)
  elif isinstance(value, dict):
    if not any(isinstance(key, pickles.Key) for key in value):
      return value
    kind = 'a dict with keys that are no strings'
  elif isinstance(value, pickles.View):
    kind = 'a tensor without a name'
  raise _RefusedError(
    f'{text.plain(name) or "its content"} is {kind}. It takes '
    "tensors in dicts, at the root or under 'state_dict' or 'model'. If you "
    f'trust the file, save such a one with torch:{export}'
  )


def _members_of_module(state: dict[str, Any]) -> dict[str, Any]:
  """Return the members of a `torch.nn.Module`, from its attributes."""
  hidden = state.get('_non_persistent_buffers_set', ())
  if isinstance(hidden, pickles.Object):  # set([...])
    [hidden] = hidden.args
  skipped = {name for name in hidden if isinstance(name, str)}
  members = state['_parameters'] | state['_buffers'] | state['_modules']
  return {
    name: member
    for name, member in members.items()
    if member is not None and name not in skipped
  }


def _is_scripted(value: Any) -> bool:
  """Return True for a module of TorchScript."""
  return isinstance(value, pickles.Object) and bool(
    re.match(r'__torch__\.(?!torch\.classes\.)', value.name)
  )


def _tensor(
  path: pathlib.Path, name: str, view: pickles.View, locate: _Locate
) -> tensors_lib.Tensor:
  """Check that a view lies in its storage, and return it as a tensor."""
  storage, offset, shape, strides, dtype = view
  stored = storage.size * storage.dtype.itemsize // dtype.itemsize

  def problem() -> ValueError:
    return ValueError(
      f'{name} has shape {text.shown(shape)}, strides {text.shown(strides)} '
      f'and offset {text.shown(offset)} in {text.shown(stored)} elements'
    )

  if len(shape) != len(strides) or len(shape) > tensors_lib.MAX_RANK:
    raise problem()
  for number in (offset, *shape, *strides):
    if type(number) is not int or not 0 <= number < 2**62:
      raise problem()
  size = math.prod(shape)
  axes = list(zip(shape, strides, strict=True))
  span = 1 + sum((n - 1) * stride for n, stride in axes)
  if (size and offset + span > stored) or size > max(stored, _MAX_EXPANDED):
    raise problem()
  begin = locate(storage) + (offset * dtype.itemsize if size else 0)
  dense = 1
  for n, stride in reversed(axes):
    if size and n != 1 and stride != dense:
      flat = tensors_lib.in_file(path, begin, dtype, (span,))
      return tensors_lib.strided(flat, shape, strides)
    dense *= n
  return tensors_lib.in_file(path, begin, dtype, shape)
