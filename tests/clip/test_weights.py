import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import clip


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  awkward = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
  return {
    'image': {
      'kernel': rng.normal(size=(3, 4)).astype(np.float32),
      'half': jnp.asarray(rng.normal(size=(2, 2)), jnp.bfloat16),
      'awkward': awkward,
    },
    'logit_scale': jnp.asarray(2.5, jnp.float32),
    'step': np.arange(3, dtype=np.int32),
    'transposed': rng.normal(size=(2, 5)).astype(np.float32).T,
  }


def same_bits(a, b):
  a, b = np.asarray(a), np.asarray(b)
  return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_round_trip_is_bit_exact(params, tmp_path):
  path = tmp_path / 'w.safetensors'
  clip.save_safetensors(params, path)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  restored = clip.load_safetensors(path, like)
  assert jax.tree.structure(restored) == jax.tree.structure(params)
  assert all(jax.tree.leaves(jax.tree.map(same_bits, params, restored)))
  assert [file.name for file in tmp_path.iterdir()] == ['w.safetensors']


def test_other_readers_see_flat_names(params, tmp_path):
  path = tmp_path / 'w.safetensors'
  clip.save_safetensors(params, path)
  tensors = safetensors.numpy.load_file(path)
  assert set(tensors) == {
    'image/kernel',
    'image/half',
    'image/awkward',
    'logit_scale',
    'step',
    'transposed',
  }
  assert tensors['image/half'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(tensors['transposed'], params['transposed'])


def test_model_parameters_survive(tiny, randomize, tmp_path):
  like = jax.eval_shape(clip.create(tiny).init, jax.random.key(0))
  params = randomize(like)
  clip.save_safetensors(params, tmp_path / 'w.safetensors')
  restored = clip.load_safetensors(tmp_path / 'w.safetensors', like)
  assert all(jax.tree.leaves(jax.tree.map(same_bits, params, restored)))


def test_leaves_go_where_like_says(tmp_path):
  path = tmp_path / 'w.safetensors'
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  spec = jax.sharding.PartitionSpec('data')
  sharding = jax.sharding.NamedSharding(mesh, spec)
  value = np.arange(2.0 * mesh.size, dtype=np.float32)
  clip.save_safetensors({'a': value}, path)
  leaf = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
  restored = clip.load_safetensors(path, {'a': leaf})
  assert restored['a'].sharding == sharding
  np.testing.assert_array_equal(restored['a'], value)


def test_every_difference_is_listed_at_once(tmp_path):
  path = tmp_path / 'w.safetensors'
  stored = {
    'a': {'wide': np.zeros((2, 3), np.float32), 'extra': np.zeros(1, bool)},
    'half': np.zeros(4, np.float16),
  }
  clip.save_safetensors(stored, path)
  like = {
    'a': {'wide': np.zeros((2, 5), np.float32)},
    'half': np.zeros(4, np.float32),
    'missing': np.zeros((), np.float32),
  }
  with pytest.raises(ValueError, match='does not fit') as info:
    clip.load_safetensors(path, like)
  message = str(info.value)
  assert str(path) in message
  assert message.splitlines()[1:] == [
    '  extra a/extra: bool[1]',
    '  a/wide: file has float32[2, 3], the model takes float32[2, 5]',
    '  half: file has float16[4], the model takes float32[4]',
    '  missing missing: float32[]',
  ]


@pytest.mark.parametrize('keep', [0, 5, 60, -1])
def test_truncated_file(params, tmp_path, keep):
  path = tmp_path / 'w.safetensors'
  clip.save_safetensors(params, path)
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r'w\.safetensors is not a whole'):
    clip.load_safetensors(path, params)
  with pytest.raises(ValueError, match=r'w\.safetensors is not a whole'):
    clip.read_metadata(path)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'none\.safetensors'):
    clip.load_safetensors(tmp_path / 'none.safetensors', {})
  with pytest.raises(FileNotFoundError, match=r'none\.safetensors'):
    clip.read_metadata(tmp_path / 'none.safetensors')


def test_metadata(params, tmp_path):
  path = tmp_path / 'w.safetensors'
  clip.save_safetensors(params, path)
  assert clip.read_metadata(path) == {}
  clip.save_safetensors(params, path, {'source': 'glyphs', 'step': '500'})
  assert clip.read_metadata(path) == {'source': 'glyphs', 'step': '500'}
  wrong = {'step': 500}
  with pytest.raises(ValueError, match=r"metadata \['step'\] must be strings"):
    clip.save_safetensors(params, path, wrong)  # pyright: ignore[reportArgumentType]
