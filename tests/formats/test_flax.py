"""Files that Flax wrote: what is found in them, and what is refused."""

from flax import serialization
import numpy as np
import pytest

from modelstock_jax import files
from modelstock_jax.formats import flax


def _state():
  """A dict as Scenic's TrainState becomes one: every kind of msgpack."""
  return {
    'params': {'block.0': {'kernel': np.ones((5, 7), np.float32)}},
    'model_state': {'mean': np.ones(4, np.float16)},
    'rng': np.array([0, 2**32 - 1], np.uint32),
    'metadata': {'lr': 1e-3, 'none': None, 'flag': True, 'text': 'x' * 300},
    'many': {str(i): -i for i in range(20)},
    'list': [1, -70_000, 2**40, 2.5, np.int32(3)],
  }


def test_every_beginning_of_a_file_is_refused(tmp_path):
  path = tmp_path / 'checkpoint_1'
  data = serialization.msgpack_serialize(_state())
  path.write_bytes(data)
  full = flax.read(path)
  assert full['params/block.0/kernel'].shape == (5, 7)
  for stop in range(len(data)):
    path.write_bytes(data[:stop])
    with pytest.raises(ValueError, match='is not a whole checkpoint of Flax'):
      flax.read(path)
  path.write_bytes(data + b'\x00')
  with pytest.raises(ValueError, match='1 bytes too many'):
    flax.read(path)


@pytest.mark.parametrize('seed', range(5))
def test_noise_is_refused_or_read(tmp_path, seed):
  """Whatever the bytes are, it ends, and with nothing but a ValueError."""
  rng = np.random.default_rng(seed)
  path = tmp_path / 'checkpoint_1'
  data = bytearray(serialization.msgpack_serialize(_state()))
  for _ in range(200):
    changed = data.copy()
    for at in rng.integers(len(data), size=3):
      changed[at] = rng.integers(256)
    path.write_bytes(changed)
    try:
      actual = flax.read(path)
    except ValueError as error:
      assert 'checkpoint of Flax' in str(error)  # noqa: PT017
    else:
      for tensor in actual.values():
        assert tensor.read(0, tensor.size).size == tensor.size


@pytest.fixture
def pieces(monkeypatch):
  """Lets Flax cut what it cuts at 1 GiB at 16 bytes."""
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 16)


@pytest.mark.parametrize('dtype', ['float64', 'bfloat16'])
def test_arrays_in_pieces(tmp_path, pieces, dtype):
  """Windows from and to each element are those of the array that was saved."""
  array = np.arange(39).reshape(3, 13).astype(dtype)
  state = {'params': {'w': array, 'small': array[0, :2]}, 'step': 7}
  path = tmp_path / 'model.msgpack'
  path.write_bytes(serialization.to_bytes(state))
  actual = flax.read(path)
  assert actual.keys() == {'params/w', 'params/small'}
  tensor = actual['params/w']
  assert (tensor.shape, tensor.dtype) == ((3, 13), array.dtype)
  assert tensor.filter_axis == 1
  np.testing.assert_array_equal(tensor.load(), array)
  for start in range(40):
    for stop in range(start, 40):
      expected = array.reshape(-1)[start:stop]
      np.testing.assert_array_equal(tensor.read(start, stop), expected)


@pytest.mark.parametrize(
  'change',
  [
    lambda w: w['chunks'].pop('1'),
    lambda w: w['chunks'].update({'1': np.zeros(2, np.float32)}),
    lambda w: w['shape'].update({'0': 4}),
    lambda w: w['shape'].update({'0': 3.0}),
    lambda w: w.update(shape={'0': -3, '1': -2}),
    lambda w: w.update(chunks={}),
    lambda w: w.pop('shape'),
  ],
)
def test_pieces_that_do_not_fit(tmp_path, change):
  pieces = {str(i): np.zeros(2) for i in range(3)}
  w = {'__msgpack_chunked_array__': True, 'shape': {'0': 3, '1': 2}}
  w['chunks'] = pieces
  path = tmp_path / 'model.msgpack'
  path.write_bytes(serialization.msgpack_serialize({'w': w}))
  assert flax.read(path)['w'].shape == (3, 2)
  change(w)
  path.write_bytes(serialization.msgpack_serialize({'w': w}))
  with pytest.raises(ValueError, match=r'pieces of w do not|array has the s'):
    flax.read(path)


def test_the_merge_of_arrays_in_pieces(tmp_path, monkeypatch):
  """It has the bytes of the merge of arrays that are not cut."""
  rng = np.random.default_rng(0)
  trees = [{'params': {'w': rng.normal(size=(6, 5))}} for _ in range(3)]
  merged = []
  for limit in (2**30, 64):
    monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', limit)
    paths = [tmp_path / f'{limit}_{name}.msgpack' for name in 'abc']
    for path, tree in zip(paths, trees, strict=True):
      path.write_bytes(serialization.msgpack_serialize(tree))
    out = tmp_path / f'{limit}.safetensors'
    files.merge(paths[0], paths[1:], out)
    merged.append(out.read_bytes())
  assert merged[0] == merged[1]

  scenic = [tmp_path / f'checkpoint_{number}' for number in range(3)]
  for path, name in zip(paths, scenic, strict=True):
    path.rename(name)
  with pytest.raises(ValueError, match=r'Give copies named X\.msgpack'):
    files.merge(scenic[0], scenic[1:], tmp_path / 'out')
