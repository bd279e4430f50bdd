"""Pickles of PyTorch, read without running them.

A pickle is a program that names classes and functions, and calls them. Here
nothing is looked up and nothing is called: tensors become a `View`, and what
else a pickle would make by a call becomes an `Object`, which keeps the name,
the arguments and the state. Neither `pickle` nor `copyreg` take part, only the
parser `pickletools`.

Source: torch/_utils.py of PyTorch.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import pickletools
import re
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

from modelstock_jax.formats import tensors as tensors_lib

# Limits of a pickle, which bound the time and the memory that it takes.
MAX_BYTES = 2**23
MAX_OPCODES = 500_000
_MAX_NAME = 1000  # characters of the name of a global


_DTYPES = tensors_lib.DTYPES | {
  'complex128': np.dtype(np.complex128),
  'float8_e4m3fnuz': np.dtype(ml_dtypes.float8_e4m3fnuz),
  'float8_e5m2fnuz': np.dtype(ml_dtypes.float8_e5m2fnuz),
  'float8_e8m0fnu': np.dtype(ml_dtypes.float8_e8m0fnu),
}
# The dtypes of storages, by the names of their classes without 'Storage'.
_STORAGES = {
  'Double': 'float64',
  'Float': 'float32',
  'Half': 'float16',
  'BFloat16': 'bfloat16',
  'Long': 'int64',
  'Int': 'int32',
  'Short': 'int16',
  'Char': 'int8',
  'Byte': 'uint8',
  'Untyped': 'uint8',
  'Bool': 'bool',
  'ComplexFloat': 'complex64',
  'ComplexDouble': 'complex128',
}


class Storage(NamedTuple):
  """A storage as a pickle describes it; `size` counts elements."""

  key: str
  dtype: np.dtype
  size: int


class View(NamedTuple):
  """A tensor as a pickle describes it, which nothing has checked.

  Attributes:
    storage: that holds it.
    offset: elements of the storage before it.
    shape: of the tensor.
    strides: in elements.
    dtype: of its elements.
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: np.dtype


@dataclasses.dataclass
class Bytes:
  """A string of bytes, by its place in the stream."""

  start: int
  size: int

  def __len__(self) -> int:
    return self.size


class Global(NamedTuple):
  """The name of a class or function, such as 'collections.OrderedDict'."""

  name: str


class Object(dict):
  """A stand-in for what a pickle would make by calling a global.

  Its items are those that the pickle sets, as of a subclass of dict.

  Attributes:
    name: of the global.
    args: that it would be called with.
    state: that the result would be given, or None.
  """

  def __init__(self, name: str, args: Sequence[Any] = ()):
    """Keep a name and arguments."""
    super().__init__()
    self.name = name
    self.args = args
    self.state: Any = None


class Key:
  """A stand-in for a key of a dict that is no string, which is not hashed."""


def load(
  stream: Any, load_bytes: Callable[[Bytes], Any] | None = None
) -> tuple[Any, dict[str, Storage]]:
  r"""Read a pickle, and leave the stream behind it.

  Args:
    stream: the pickle, and what follows it; `read` may return long strings of
      bytes as `Bytes`.
    load_bytes: returns the storage in a file of torch.save, which is how
      pickle.dump keeps one.

  Returns:
    What it holds: numbers, strings, `Bytes`, None, tuples, lists (for sets
    too), dicts with keys that are strings or `Key`, `Storage`, `View`, `Global`
    and `Object`. And the storages by their keys.

  Raises:
    ValueError: it is no pickle, a damaged one, or exceeds 500,000 opcodes.

  >>> import io
  >>> load(io.BytesIO(b'cos\nsystem\n(Vls\ntR.'))[0].name
  'os.system'
  """
  machine = _Machine(load_bytes)
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
      if count >= MAX_OPCODES:
        raise ValueError(f'it has more than {MAX_OPCODES} opcodes')
      if isinstance(argument, bytes | Bytes):
        size = len(argument)
        machine.stack.append(Bytes(stream.tell() - size, size))
      elif opcode.name in _CONSTANTS:
        machine.stack.append(argument)
      elif not machine.change(opcode.name, argument):
        value = machine.value(opcode.name, argument)  # which may swap the stack
        machine.stack.append(value)
    return machine.stack[-1], machine.storages
  except (LookupError, TypeError, AttributeError) as error:
    raise ValueError(f'its opcodes make no sense ({error})') from error


# Opcodes that bring a value along: numbers, strings and bytes.
_CONSTANTS = {
  opcode.name
  for opcode in pickletools.opcodes
  if opcode.arg is not None
  and opcode.stack_after
  and opcode.stack_after != [pickletools.anyobject]
}
_VALUES = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Machine:
  """The stack and the memo while a pickle is read."""

  def __init__(self, load_bytes: Callable[[Bytes], Any] | None):
    self._load_bytes = load_bytes
    self.stack: list[Any] = []
    self.storages: dict[str, Storage] = {}
    self._below: list[list[Any]] = []  # the stacks below the marks
    self._memo: dict[int, Any] = {}

  def change(self, name: str, argument: Any) -> bool:
    """Do what an opcode says; return False for one that pushes a value."""
    match name:
      case 'PROTO' | 'FRAME' | 'STOP':
        pass
      case 'MARK':
        self._below.append(self.stack)
        self.stack = []
      case 'POP' if self.stack:
        self.stack.pop()
      case 'POP' | 'POP_MARK':
        self._pop_mark()
      case 'PUT' | 'BINPUT' | 'LONG_BINPUT' | 'MEMOIZE':
        index = len(self._memo) if name == 'MEMOIZE' else argument
        if index > MAX_OPCODES:
          raise ValueError(f'its memo has a place {index}')
        self._memo[index] = self.stack[-1]
      case 'APPEND' | 'APPENDS' | 'ADDITEMS':
        items = self._pop(1) if name == 'APPEND' else self._pop_mark()
        if isinstance(self.stack[-1], list):
          self.stack[-1].extend(items)
      case 'SETITEM' | 'SETITEMS':
        items = self._pop(2) if name == 'SETITEM' else self._pop_mark()
        if isinstance(self.stack[-1], dict):
          _fill(self.stack[-1], items)
      case 'BUILD':
        state = self.stack.pop()
        if isinstance(self.stack[-1], Object):
          self.stack[-1].state = state
      case _:
        return False
    return True

  def value(self, name: str, argument: Any) -> Any:
    """Return the value that an opcode pushes."""
    match name:
      case 'BINGET' | 'LONG_BINGET' | 'GET':
        return self._memo[argument]
      case 'DUP':
        return self.stack[-1]
      case 'GLOBAL':
        return Global(argument.replace(' ', '.'))
      case 'REDUCE' | 'NEWOBJ':
        function, args = self._pop(2)
        # What pickle.dump has torch call for a storage.
        if self._load_bytes and function == ('torch.storage._load_from_bytes',):
          return self._load_bytes(*args)
        return _made(function, args)
      case 'EMPTY_TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        return tuple(self._pop(_TUPLES[name]))
      case 'TUPLE':
        return tuple(self._pop_mark())
      case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
        return _VALUES[name]
      case 'EMPTY_DICT':
        return {}
      case 'DICT':
        return _fill({}, self._pop_mark())
      case 'EMPTY_LIST' | 'EMPTY_SET':
        return []
      case 'LIST' | 'FROZENSET':
        return self._pop_mark()
      case 'PERSID' | 'BINPERSID':
        binary = name == 'BINPERSID'
        return self._persistent(self.stack.pop() if binary else argument)
      case 'STACK_GLOBAL':
        names = self._pop(2)
        # Strings of the memo may stand in many globals.
        if sum(map(len, names)) > _MAX_NAME:
          raise ValueError('the name of a global is too long')
        return Global('.'.join(names))
      case 'EXT1' | 'EXT2' | 'EXT4':
        return Global(f'copyreg.extension_{argument}')
      case 'NEWOBJ_EX':
        return _made(*self._pop(3)[:2])
      case 'INST':
        return _made(Global(argument.replace(' ', '.')), self._pop_mark())
      case 'OBJ':
        function, *args = self._pop_mark()
        return _made(function, args)
    raise ValueError(f'its opcode {name} is not read')

  def _persistent(self, identity: Any) -> Any:
    """Return the `Storage` that a persistent id means, else an `Object`."""
    match identity:
      case ('module', Global() as module, *_):  # and its source
        return module
      case ('storage', Global(kind), str(key), _, int(size), *view):
        name = re.fullmatch(r'torch\.(cuda\.|storage\.)?(\w+)Storage', kind)
        if name and name[2] in _STORAGES and not any(view):
          storage = Storage(key, _DTYPES[_STORAGES[name[2]]], size)
          self.storages[key] = storage
          return storage
        return Object(kind)
    return Object('a persistent id')

  def _pop(self, count: int) -> list[Any]:
    start = len(self.stack) - count
    if start < 0:
      raise IndexError('the stack is empty')
    items = self.stack[start:]
    del self.stack[start:]
    return items

  def _pop_mark(self) -> list[Any]:
    items, self.stack = self.stack, self._below.pop()
    return items


def _fill(target: dict[Any, Any], items: Iterable[Any]) -> dict[Any, Any]:
  """Add keys and values, by turns, to a dict, and return it."""
  pairs = iter(items)
  for key, value in zip(pairs, pairs, strict=True):
    name = key if isinstance(key, str) else Key()
    if name in target:
      raise ValueError(f'the key {key[:80]!r} stands twice')
    target[name] = value
  return target


def _made(function: Any, args: Any) -> Any:
  """Return the dict or `View` that a call would make, else an `Object`."""
  if not isinstance(function, Global) or not isinstance(args, tuple | list):
    return Object('the result of a call')
  name = function.name
  if name == 'torch._tensor._rebuild_from_type_v2':  # a subclass of tensors
    name, args = args[0].name, args[2]
  if name == 'collections.OrderedDict' and not args:
    return {}
  kind = name.removeprefix('torch._utils._rebuild_')
  if kind in ('parameter', 'parameter_with_state'):
    return args[0]
  if kind in ('tensor', 'tensor_v2', 'tensor_v3') and type(args[0]) is Storage:
    storage, offset, shape, strides, *rest = args
    dtype = storage.dtype
    if kind == 'tensor_v3':
      dtype = _DTYPES.get(rest.pop(2).name.removeprefix('torch.'))
    # What follows requires_grad and hooks marks conjugates and negatives.
    axes = isinstance(shape, tuple) and isinstance(strides, tuple)
    if axes and dtype is not None and not any(rest[2:]):
      return View(storage, offset, shape, strides, dtype)
  return Object(name, args)
