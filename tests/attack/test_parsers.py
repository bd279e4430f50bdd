"""Seeded mutations of files and settings: refused in words, or read right."""

import ast
import collections
import io
import json
import math
import os
import pickle
import pickletools
import struct
import zipfile

from flax import serialization
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import yaml

from modelstock_jax.files import mergekit
from modelstock_jax.formats import flax
from modelstock_jax.formats import npy
from modelstock_jax.formats import orbax
from modelstock_jax.formats import safetensors as safetensors_lib
from modelstock_jax.formats import text
from modelstock_jax.formats import torch
from modelstock_jax.training import changes
from modelstock_jax.training import config as config_lib

pytestmark = pytest.mark.attack

# What numbers, names and lists of a JSON document are replaced by.
ODD = (
  *(0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e18, 1.5, -0.0, math.nan, math.inf),
  *(True, False, None, '', 'x', '\x1b[2J', '\0', 'é' * 300, '44', '../up'),
  *([], [1] * 65, [0] * 65, [[]], {}, {'a': {}}, ['F32'], [1, 2, 3]),
)


def mutated(data, rng):
  """Bytes with a few of them changed, cut out, repeated or put in."""
  data = bytearray(data)
  for _ in range(rng.integers(1, 5)):
    at = int(rng.integers(len(data) + 1))
    size = int(rng.integers(1, 9))
    match rng.integers(5):
      case 0:
        data[at : at + 1] = bytes([rng.integers(256)])
      case 1:
        del data[at : at + size]
      case 2:
        data[at:at] = data[at : at + size] * int(rng.integers(1, 4))
      case 3:
        data[at:at] = rng.bytes(size)
      case 4 if at < len(data):
        data[at] ^= 1 << int(rng.integers(8))
  return bytes(data)


def changed(value, rng):
  """A JSON value with one place of it replaced."""
  if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
    return ODD[rng.integers(len(ODD))]
  if isinstance(value, list):
    at = int(rng.integers(len(value)))
    return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
  key = [*value][rng.integers(len(value))]
  odd = (key, '', '\x1b[2J', '__metadata__', 'n' * 500)
  name = odd[rng.integers(len(odd))] if rng.random() < 0.3 else key
  rest = {k: v for k, v in value.items() if k != key}
  return rest | {name: changed(value[key], rng)}


def document(value, rng):
  """The bytes of a changed JSON value, or of one that is no JSON."""
  if rng.random() < 0.6:
    for _ in range(rng.integers(1, 4)):
      value = changed(value, rng)
    return json.dumps(value).encode()
  data = mutated(json.dumps(value).encode(), rng)
  if rng.random() < 0.1:
    depth = int(10 ** rng.uniform(1, 5))
    data = data.replace(b'[', b'[' * depth, 1)
  return data


def test_safetensors(attack):
  entries = {'__metadata__': {'format': 'pt'}}
  arrays = {'a': np.arange(6, dtype=np.float32), 'b': np.arange(4, dtype=int)}
  end = 0
  for name, array in arrays.items():
    offsets = [end, end := end + array.nbytes]
    kind = {'float32': 'F32', 'int64': 'I64'}[array.dtype.name]
    shape = [2, array.size // 2]
    entries[name] = {'dtype': kind, 'shape': shape, 'data_offsets': offsets}
  elements = b''.join(array.tobytes() for array in arrays.values())
  path = attack.file.with_suffix('.safetensors')

  def case(number):
    rng = np.random.default_rng((1, number))
    header = document(entries, rng)
    length = len(header) if rng.random() < 0.9 else int(rng.integers(2**60))
    data = mutated(elements, rng) if rng.random() < 0.1 else elements
    path.write_bytes(struct.pack('<Q', length) + header + data)

    def read():
      tensors, metadata = safetensors_lib.read(path)
      return {name: t.load() for name, t in tensors.items()}, metadata

    return read

  def right(number, value):
    loaded, metadata = value
    with safetensors.safe_open(path, framework='numpy') as file:
      if {*file.keys()} != loaded.keys() or (file.metadata() or {}) != metadata:
        return False
      return all(
        file.get_tensor(name).tobytes() == array.tobytes()
        and file.get_slice(name).get_shape() == [*array.shape]
        for name, array in loaded.items()
        if array.dtype.isbuiltin
      )

  attack('safetensors', 5000, case, right)


def test_msgpack(attack, monkeypatch):
  state = {
    'params': {'block.0': {'kernel': np.arange(12.0).reshape(3, 4)}},
    'model_state': {'mean': np.ones(4, np.float16)},
    'rng': np.array([0, 2**32 - 1], np.uint32),
    'metadata': {'lr': 1e-3, 'none': None, 'text': 'x' * 300},
    'list': [1, -70_000, 2**40, 2.5, np.int32(3)],
  }
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 32)  # w in pieces
  full = serialization.msgpack_serialize(state)
  path = attack.file.with_name('checkpoint_1')

  def case(number):
    path.write_bytes(mutated(full, np.random.default_rng((2, number))))
    return lambda: {n: t.load() for n, t in flax.read(path).items()}

  def right(number, value):
    try:
      tree = serialization.msgpack_restore(path.read_bytes())
    except Exception:  # a text or number that no array needs
      return True
    wanted = {}
    todo = [('', tree)]
    while todo:
      name, node = todo.pop()
      if isinstance(node, dict | list):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        todo += [(f'{name}/{k}' if name else str(k), v) for k, v in pairs]
      elif isinstance(node, np.ndarray):
        wanted[name] = node
    return all(
      name in value and value[name].tobytes() == array.tobytes()
      for name, array in wanted.items()
    )

  attack('msgpack', 2000, case, right)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(attack, save):
  path = attack.file.with_suffix('.npz')
  save(path, a=np.arange(12.0).reshape(3, 4), b=np.ones(3, np.float16))
  full = path.read_bytes()

  def case(number):
    path.write_bytes(mutated(full, np.random.default_rng((3, number))))
    return lambda: {n: t.load() for n, t in npy.read_archive(path).items()}

  def right(number, value):
    with np.load(path) as arrays:
      return all(value[n].tobytes() == arrays[n].tobytes() for n in value)

  attack(f'npz {save.__name__}', 2000, case, right)


ARRAYS = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.ones(4)}


@pytest.fixture(scope='module')
def item(tmp_path_factory):
  """An item whose arrays are files without compression."""
  folder = tmp_path_factory.mktemp('orbax') / 'item'
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
    writer.save(folder, args=ocp.args.PyTreeSave({'params': ARRAYS}))
  for name, array in ARRAYS.items():
    path = folder / f'params.{name}'
    described = json.loads((path / '.zarray').read_text())
    (path / '.zarray').write_text(json.dumps({**described, 'compressor': None}))
    (path / '.'.join('0' * array.ndim)).write_bytes(array.tobytes())
  return folder


def stored(folder):
  """The first elements of an array of one chunk, by the specification."""
  described = json.loads((folder / '.zarray').read_text())
  shape, chunks = described['shape'], described['chunks']
  if chunks != [max(size, 1) for size in shape] or described['order'] != 'C':
    return None
  data = (folder / ('.'.join('0' * len(shape)) or '0')).read_bytes()
  return np.frombuffer(data, described['dtype'])[: math.prod(shape)][:1000]


def test_orbax(attack, item):
  files = ['_METADATA', 'params.a/.zarray', 'params.b/.zarray', 'params.a/0.0']
  whole = {name: (item / name).read_bytes() for name in files}

  def case(number):
    rng = np.random.default_rng((7, number))
    for name, data in whole.items():
      (item / name).write_bytes(data)
    name = files[rng.integers(len(files))]
    if name.endswith('0.0'):
      data = mutated(whole[name], rng)
    else:
      data = document(json.loads(whole[name]), rng)
    (item / name).write_bytes(data)

    def read():
      return {
        name: tensor.read(0, min(tensor.size, 1000))
        for name, tensor in orbax.read(item).items()
      }

    return read

  def right(number, value):
    for name, elements in value.items():
      expected = stored(item / name.replace('/', '.'))
      if expected is not None and expected.tobytes() != elements.tobytes():
        return False
    return True

  attack('Orbax', 1000, case, right)


def test_json(attack):
  value = {'weight_map': {'a': 'x', 'b': 'y'}, 'sizes': [1, 2.5, None, [True]]}

  def data(number):
    return document(value, np.random.default_rng((3, number)))

  def right(number, result):
    return repr(result) == repr(json.loads(data(number).decode('utf-8-sig')))

  def case(number):
    document = data(number)
    return lambda: text.parse_json(document)

  attack('JSON', 500, case, right)


RECIPE = """
merge_method: model_stock
base_model: &base some/base
models:
  - model: *base
  - model: some/a
  - model: {model: {path: some/b}}
parameters: {filter_wise: true}
dtype: bfloat16
"""
# Put into the recipe, at the beginning of a line.
LINES = (
  'x: &x [1]\n',
  'a0: &a0 [1]\n'
  + ''.join(f'a{i}: &a{i} [{f"*a{i - 1}, " * 10}]\n' for i in range(1, 9)),
  'a0: &a0 {x: 1}\n'
  + ''.join(
    f'a{i}: &a{i} {{<<: [{f"*a{i - 1}, " * 9}]}}\n' for i in range(1, 9)
  ),
  'dtype: float16\n',
  'x: ' + '[' * 3000 + '\n',
  'x: ' + '9' * 5000 + '\n',
  'x: !!timestamp no\n',
  'x: !!bool no way\n',
  'x: !!python/object/apply:os.system ["touch acted"]\n',
  '? [1]\n: 2\n',
  '---\n',
  'x: "\\e[2J"\n',
  '\x1b[2J: 1\n',
  'name: ' + 'n' * 60_000 + '\n',
  'x: 2001-99-99\n',
  '&r r: [*r]\n',
)


def test_yaml(attack):
  path = attack.file.with_suffix('.yaml')

  def case(number):
    rng = np.random.default_rng((4, number))
    data = RECIPE.encode()
    if rng.random() < 0.5:
      lines = RECIPE.splitlines(keepends=True)
      lines.insert(
        int(rng.integers(len(lines))), LINES[rng.integers(len(LINES))]
      )
      data = ''.join(lines).encode()
    if rng.random() < 0.6:
      data = mutated(data, rng)
    path.write_bytes(data)
    return lambda: mergekit.read_recipe(path)

  def name(value):
    while isinstance(value, dict):
      (value,) = value.values()
    return os.path.normpath(value)

  def right(number, recipe):
    stated = yaml.safe_load(path.read_bytes())
    models = [name(entry) for entry in stated['models']]
    base = name(stated['base_model'])
    return (
      recipe['anchor'] == base
      and recipe['models'] == [m for m in models if m != base]
      and recipe['dtype'] == (stated.get('out_dtype') or stated.get('dtype'))
    )

  attack('YAML', 500, case, right)


class _Oracle(pickle._Unpickler):
  """The pickles of state dicts as Python reads them, calling next to nothing.

  It is the one in Python: that in C would allocate what a memo index says.
  """

  def __init__(self, archive):
    (name,) = [n for n in archive.namelist() if n.endswith('/data.pkl')]
    super().__init__(io.BytesIO(archive.read(name)))
    self._archive, self._root = archive, name.removesuffix('data.pkl')

  def find_class(self, module, name):
    known = {
      'collections.OrderedDict': collections.OrderedDict,
      'torch._utils._rebuild_tensor_v2': self._rebuild,
    }
    if f'{module}.{name}' in known:
      return known[f'{module}.{name}']
    if module == 'torch' and name.endswith('Storage'):
      return name
    raise pickle.UnpicklingError(f'{module}.{name}')

  def persistent_load(self, pid):
    _, kind, key, _, size = pid
    dtype = {'FloatStorage': np.float32, 'LongStorage': np.int64}[kind]
    data = self._archive.read(f'{self._root}data/{key}')
    return np.frombuffer(data, dtype, size)

  @staticmethod
  def _rebuild(storage, offset, shape, strides, *_):
    steps = [stride * storage.itemsize for stride in strides]
    part = storage[offset:]
    return np.lib.stride_tricks.as_strided(part, shape, steps)


# Pickles that act where they are run; what they touch is in the folder.
MALICIOUS = (
  b'cos\nsystem\n(Vtouch acted\ntR',
  b'(Vtouch acted\nios\nsystem\n',
  b'(cos\nsystem\nVtouch acted\no',
  b'cos\nmkdir\nVacted\n\x85\x81',
  b'Vos\nVmkdir\n\x93Vacted\n\x85R',
  b'cbuiltins\nexec\n(Vopen("acted", "w")\ntR',
  b'cbuiltins\neval\n(Vopen("acted", "w")\ntR',
  b'cbuiltins\nopen\n(Vacted\nVw\ntR',
  b'c__torch__.M\nM\n)\x81(Vacted\ntb',
  b'cpathlib\nPath.touch\n(cpathlib\nPath\n(Vacted\ntRtR',
)


def opcode(rng):
  """Bytes of a random opcode, and of an argument that it may take."""
  code = pickletools.opcodes[rng.integers(len(pickletools.opcodes))]
  argument = b''
  if code.arg is not None:
    size = code.arg.n
    texts = (b'a\n', b'-7\n', b'os\nsystem\n', b"'a'\n", b'9' * 30 + b'\n')
    argument = texts[rng.integers(5)] if size < 0 else rng.bytes(min(size, 8))
    if size in (-3, -4, -5):  # a length, then as many bytes or others
      argument = (
        bytes([rng.integers(4), 0, 0, 0])[: rng.integers(1, 5)] + b'abc'
      )
  return code.code.encode('latin-1') + argument


# The standard library warns of escapes in strings that no file of torch has.
@pytest.mark.filterwarnings('ignore:invalid escape:DeprecationWarning')
def test_torch(attack, save_torch):
  base = attack.file.with_name('base.pt')
  arrays = {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3),
    'b': np.arange(4),
  }
  save_torch(base, arrays)
  full = base.read_bytes()
  with zipfile.ZipFile(base) as archive:
    records = {name: archive.read(name) for name in archive.namelist()}
  path = attack.file.with_suffix('.pt')

  def case(number):
    rng = np.random.default_rng((5, number))
    if rng.random() < 0.25:
      path.write_bytes(mutated(full, rng))
      return lambda: {n: t.load() for n, t in torch.read(path).items()}
    content = records['archive/data.pkl']
    kind = rng.integers(4)
    at = int(rng.integers(2, len(content)))
    if kind == 0:
      content = mutated(content, rng)
    elif kind == 1:
      codes = b''.join(opcode(rng) for _ in range(rng.integers(1, 4)))
      content = content[:at] + codes + content[at:]
    elif kind == 2:
      codes = [opcode(rng) for _ in range(rng.integers(1, 40))]
      content = b'\x80\2' + b''.join(codes) + b'.'
    else:
      code = MALICIOUS[rng.integers(len(MALICIOUS))]
      bodies = (code, b'}(Va\n' + code + b'u', content[2:at] + code)
      content = b'\x80\2' + bodies[rng.integers(3)] + b'.'
    with zipfile.ZipFile(path, 'w') as archive:
      for name, data in (records | {'archive/data.pkl': content}).items():
        archive.writestr(name, data)
      archive.writestr('archive/code/__torch__/M.py', 'def __setstate__(): ...')
    return lambda: {n: t.load() for n, t in torch.read(path).items()}

  def right(number, value):
    try:
      with zipfile.ZipFile(path) as archive:
        tree = _Oracle(archive).load()
    except Exception:  # what is no part of the tensors, such as its hooks
      stored = {*arrays['a'].ravel(), *arrays['b']}
      full = [a for a in value.values() if a.dtype in (np.float32, np.int64)]
      return all(set(a.ravel().tolist()) <= stored for a in full) or (
        number_of_elements_changed(path, records)
      )
    for key in ('state_dict', 'model'):
      if isinstance(tree, dict) and isinstance(tree.get(key), dict):
        tree = tree[key]
        break
    flat, todo = {}, [('', tree)]
    while todo:
      name, node = todo.pop()
      if isinstance(node, dict):
        todo += [(f'{name}.{k}' if name else k, v) for k, v in node.items()]
      else:
        flat[name.removeprefix('module.')] = node
    return flat.keys() == value.keys() and all(
      flat[name].shape == array.shape
      and flat[name].tobytes() == array.tobytes()
      for name, array in value.items()
    )

  attack('torch', 1000, case, right)


def number_of_elements_changed(path, records):
  """True if a mutation was of the elements, which nothing protects."""
  data = path.read_bytes()
  return any(records[name] not in data for name in records if '/data/' in name)


NUMBERS = ('0', '-1', '1', '2', '3.0', '1e3', '0.5', '1e-300', '1e999', 'nan')
VALUES = (
  *NUMBERS,
  *('4294967296', '9' * 30, '9' * 5000, 'inf', '-inf', 'true', 'True', 'None'),
  *("('a','b')", '(1,)', '(0.1, 0.9)', '[0.5, 0.5, 0.5]', '(1e999,)', '{}'),
  *('epoch', 'end', 'x', '', "'", '\\', '\x1b[2J', '\0', '(' * 300, '-' * 5000),
  *("__import__('os').mkdir('acted')", '1+1', '1' + '+1' * 3000, '1_0', '0x10'),
)


def test_overrides(attack):
  usual = config_lib.validate(config_lib.defaults())
  known = dict(changes.flatten(usual))
  keys = [*known, 'train', 'train.epoch', '', '.', '\x1b[2J', 'hooks.x']

  def flags(number):
    rng = np.random.default_rng((6, number))
    picked = rng.integers(len(keys), size=rng.integers(1, 3))
    pairs = [(keys[k], VALUES[rng.integers(len(VALUES))]) for k in picked]
    return [f'--config.{key}={value}' for key, value in pairs]

  def right(number, config):
    asked = dict(f[len('--config.') :].split('=', 1) for f in flags(number))
    now = dict(changes.flatten(config))
    for key, value in now.items():
      wanted = known[key]
      if key in asked:
        wanted = asked[key]
        if not isinstance(known[key], str) or key == 'merge.every':
          literal = {'true': 'True', 'false': 'False'}.get(wanted, wanted)
          try:
            wanted = ast.literal_eval(literal)
          except (ValueError, SyntaxError, RecursionError, MemoryError):
            wanted = literal
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
      numbers = value if isinstance(value, list) else [value]
      finite = all(
        math.isfinite(x) for x in numbers if isinstance(x, int | float)
      )
      if value != wanted or not finite:
        return False
    again = config_lib.override(config_lib.defaults(), config.to_flags())
    return again == config

  def case(number):
    return lambda: config_lib.override(usual, flags(number))

  attack('overrides', 1000, case, right)
