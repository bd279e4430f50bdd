"""Files that Flax wrote: what is found in them, and what is refused."""

from flax import serialization
import numpy as np
import pytest

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


def test_arrays_in_pieces(tmp_path, monkeypatch):
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 16)
  path = tmp_path / 'checkpoint_1'
  data = serialization.msgpack_serialize({'params': {'w': np.arange(100.0)}})
  path.write_bytes(data)
  with pytest.raises(
    ValueError, match='params/w is larger than 1 GiB'
  ) as error:
    flax.read(path)
  assert 'again' not in str(error.value)  # the copy is complete
