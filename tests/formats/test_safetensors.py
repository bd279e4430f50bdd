"""Safetensors files, against the library that defines the format."""

import json
import struct

import hypothesis
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from modelstock_jax.formats import safetensors as safetensors_lib


def shard(arrays, folder):
  first = {'a': arrays['a']}
  rest = {'b': arrays['b'], 'scalar': arrays['scalar']}
  safetensors.numpy.save_file(first, folder / 'one.safetensors')
  safetensors.numpy.save_file(rest, folder / 'two.safetensors')
  index = folder / 'model.safetensors.index.json'
  files = dict.fromkeys(first, 'one.safetensors')
  files |= dict.fromkeys(rest, 'two.safetensors')
  index.write_text(json.dumps({'metadata': {}, 'weight_map': files}))
  return index


def test_shards(arrays, same, tmp_path):
  same(safetensors_lib.read(shard(arrays, tmp_path)).tensors, arrays)


def test_a_shard_is_missing(arrays, tmp_path):
  index = shard(arrays, tmp_path)
  (tmp_path / 'two.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='two'):
    safetensors_lib.read(index)


def test_an_index_of_more_than_there_is(arrays, tmp_path):
  index = shard(arrays, tmp_path)
  content = json.loads(index.read_text())
  content['weight_map']['c'] = 'one.safetensors'
  index.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"do not hold: \['c'\]"):
    safetensors_lib.read(index)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{', 'not an index'),
    ('{}', 'weight_map'),
    ('{"weight_map": {"a": "../other.safetensors"}}', 'outside its own folder'),
    (f'{{"weight_map": {{"a": "{"x" * 10**4}"}}}}', 'outside its own folder'),
    ('[' * 10**5, 'nested more than 100 deep'),
    ('[]', 'not an index'),
    ('{"weight_map": {"a": 3}}', 'not an index'),
    ('{"weight_map": [1]}', 'not an index'),
    ('{"weight_map": {"a": "x", "a": "y"}}', 'stands twice'),
  ],
)
def test_broken_index(text, message, tmp_path):
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(text)
  with pytest.raises(ValueError, match=message) as caught:
    safetensors_lib.read(index)
  assert len(str(caught.value)) < 700


@pytest.mark.parametrize('name', ['', '..', '\0', '\x1b[2J', '\ud800'])
def test_an_index_of_names_that_no_file_has(name, tmp_path):
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'a': name}}))
  with pytest.raises(FileNotFoundError, match='which is not there') as caught:
    safetensors_lib.read(index)
  assert str(caught.value).isprintable()


def test_truncated_safetensors(arrays, tmp_path):
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(arrays, path)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'not a whole safetensors.*Copy it'):
    safetensors_lib.read(path)


# What the library reads, we read; what it refuses, we refuse.


def _file(path, header, size):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(size))


def _library(path):
  """Return what the library reads, or None if it rejects the file."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      names = file.keys()
      shapes = {name: file.get_slice(name).get_shape() for name in names}
      return shapes, file.metadata() or {}
  except safetensors.SafetensorError:
    return None


def _ours(path):
  try:
    tensors, metadata = safetensors_lib.read(path)
  except ValueError as error:
    assert '\n' not in str(error)  # noqa: PT017
    return None
  return {name: list(t.shape) for name, t in tensors.items()}, metadata


def _entry(begin=0, end=4, shape=(1,), dtype='F32', **more):
  offsets = [begin, end]
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets, **more}


TWICE = b'{"w":%s,"w":%s}' % ((json.dumps(_entry()).encode(),) * 2)


@pytest.mark.parametrize(
  ('header', 'size'),
  [
    ({'w': _entry(), 'v': _entry(0, 4)}, 4),  # overlapping
    ({'w': _entry(), 'v': _entry(8, 12)}, 12),  # a gap between
    ({'w': _entry(4, 8)}, 8),  # a gap before
    ({'w': _entry()}, 5),  # bytes behind
    ({'w': _entry()}, 3),
    ({'w': _entry(4, 0)}, 4),
    ({'w': _entry(-4, 0)}, 0),
    ({'w': _entry(0, 4, shape=[True])}, 4),
    ({'w': _entry(True, 5)}, 5),
    ({'w': _entry(0, '4')}, 4),
    ({'w': _entry(0.0, 4)}, 4),
    ({'w': _entry(0, 2**70)}, 4),
    ({'w': _entry(0, 0, shape=[2**70, 0])}, 0),
    ({'w': _entry(shape=[1.0])}, 4),
    ({'w': _entry(shape=None)}, 4),
    ({'w': _entry(shape=[2])}, 4),
    ({'w': _entry(shape=[-1], end=-4)}, 0),
    ({'w': _entry(dtype='F99')}, 4),
    ({'w': _entry(dtype=['F32'])}, 4),
    ({'w': {'dtype': 'F32', 'shape': [1]}}, 4),
    ({'w': 'F32'}, 4),
    ({'w': None}, 0),
    ({'__metadata__': {'step': 500}}, 0),
    ({'__metadata__': {'step': None}}, 0),
    ({'__metadata__': 'text'}, 0),
    ({'__metadata__': []}, 0),
    ({'__metadata__': ''}, 0),
    ({'__metadata__': 0}, 0),
    ({'__metadata__': ['text']}, 0),
    (b'[]', 0),
    (b'""', 0),
    (b'nothing', 0),
    (b' ' + json.dumps({'w': _entry()}).encode() + b'\0', 4),
    (b'{"w":' + b'[' * 100_000 + b']' * 100_000 + b'}', 0),
    (json.dumps({'w': _entry()}).encode('utf-16'), 4),
    (b'{"\xff":' + json.dumps(_entry()).encode() + b'}', 4),
    (b'{"\\ud800":' + json.dumps(_entry()).encode() + b'}', 4),
    (json.dumps({'w': _entry()}).replace('[1]', '[-0]').encode(), 0),
    (json.dumps({'w': _entry()}).replace('[1]', '[NaN]').encode(), 4),
  ],
)
def test_malformed_headers(header, size, tmp_path):
  path = tmp_path / 'w.safetensors'
  _file(path, header, size)
  assert _library(path) is None
  with pytest.raises(ValueError, match='is not a whole safetensors file'):
    safetensors_lib.read(path)


def test_a_name_that_stands_twice(tmp_path):
  """The library takes the last one; nobody means that."""
  path = tmp_path / 'w.safetensors'
  _file(path, TWICE, 4)
  with pytest.raises(ValueError, match="the key 'w' stands twice") as error:
    safetensors_lib.read(path)
  assert 'Copy it again' not in str(error.value)  # it is complete


def test_a_dtype_of_newer_files(tmp_path):
  path = tmp_path / 'w.safetensors'
  _file(path, {'w': _entry() | {'dtype': 'F4', 'shape': [8]}}, 4)
  if _library(path) is None:
    pytest.skip('this version of the library does not know it')
  with pytest.raises(
    ValueError, match=r"w has the dtype 'F4', not one of .*quantised"
  ) as error:
    safetensors_lib.read(path)
  assert 'whole' not in str(error.value)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'lfs pull'),
    (b'<!DOCTYPE html><html>restricted</html>', 'a web page'),
    (b'PK\3\4' + bytes(60), r'let its name end with \.pt'),  # of torch.save
    (b'PK\3\4' + bytes(60), r'end with \.pt'),
  ],
)
def test_what_is_not_weights(tmp_path, content, message):
  path = tmp_path / 'w.safetensors'
  path.write_bytes(content)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text('{"weight_map": {"w": "w.safetensors"}}')
  for file in (path, index):
    with pytest.raises(ValueError, match=message):
      safetensors_lib.read(file)


_SIZES = st.one_of(
  st.integers(0, 12), st.sampled_from([-4, 2**64, 4.0, True, '4', None])
)
_ENTRIES = st.builds(
  _entry,
  _SIZES,
  _SIZES,
  st.lists(st.one_of(st.just(1), _SIZES), max_size=3),
  st.sampled_from(['F32', 'BF16', 'U8', 'I64', 'F99']),
)
_HEADERS = st.dictionaries(
  st.sampled_from(['', 'a', 'b/c', '\x1b', 'é']), _ENTRIES, max_size=3
)


@hypothesis.settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(_HEADERS, st.integers(0, 12))
def test_headers_of_all_kinds(tmp_path, header, size):
  path = tmp_path / 'w.safetensors'
  _file(path, header, size)
  theirs = _library(path)
  assert _ours(path) in ([None] if theirs is None else [theirs])


_DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16, np.int8, np.bool_]


@hypothesis.settings(
  max_examples=40,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  st.dictionaries(
    st.text(st.characters(codec='utf-8'), max_size=4),
    st.tuples(
      st.sampled_from(_DTYPES), st.lists(st.integers(0, 3), max_size=3)
    ),
    max_size=4,
  ),
  st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
def test_the_library_reads_what_is_written(tmp_path, same, kinds, metadata):
  path = tmp_path / 'w.safetensors'
  rng = np.random.default_rng(0)
  arrays = {
    name: np.asarray(rng.normal(size=shape)).astype(dtype)
    for name, (dtype, shape) in kinds.items()
  }
  try:
    safetensors_lib.write(path, arrays, metadata)
  except ValueError:  # half of a surrogate pair
    text = ''.join([*metadata, *metadata.values()])
    assert text.encode(errors='ignore').decode() != text
    return
  theirs = safetensors.numpy.load_file(path)
  assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in theirs.items()} == {
    n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()
  }
  with safetensors.safe_open(path, framework='numpy') as file:
    assert (file.metadata() or {}) == metadata
  same(safetensors_lib.read(path).tensors, arrays)


@pytest.mark.parametrize(
  ('arrays', 'metadata', 'message'),
  [
    ({'w': np.zeros(1)}, {'step': 1}, r"metadata \['step'\] must be strings"),
    ({'w': np.zeros(1)}, {1: 'x'}, 'must be strings'),
    ({'w': np.array('text')}, {}, 'w: <U4 is not among the dtypes'),
    ({'__metadata__': np.zeros(1)}, {}, 'cannot name a tensor'),
    ({'\ud800': np.zeros(1)}, {}, 'surrogates not allowed'),
  ],
)
def test_what_cannot_be_written(arrays, metadata, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    safetensors_lib.write(tmp_path / 'w.safetensors', arrays, metadata)
  assert not list(tmp_path.iterdir())
