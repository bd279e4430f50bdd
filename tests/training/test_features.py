import functools
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import probe
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import features as features_lib
from modelstock_jax.training import sharding

ROOT = pathlib.Path(__file__).parents[2]


def _benchmark(split):
  return data.Benchmark(split, 'digits', split)


@pytest.fixture(scope='module')
def config():
  return config_lib.load(ROOT / 'configs' / 'digits.py', [])


@pytest.fixture(scope='module')
def preprocess(config):
  return functools.partial(
    data.normalize, mean=config.data.mean, std=config.data.std
  )


@pytest.fixture(scope='module')
def placement():
  return sharding.place(stock=2, num_models=2, batch_size=8)


@pytest.fixture(scope='module')
def mini_clip(config, placement):
  """The CLIP that ships: its functions, and its weights on every device."""
  model = clip.create(anchor_lib.network_config(config))
  like = jax.eval_shape(model.init, jax.random.key(0))
  params = clip.load_safetensors(anchor_lib.weights_path(config), like)
  return model, jax.device_put(params, placement.replicated)


@pytest.mark.parametrize('batch_size', [16, 37, 100])
def test_features_of_mini_clip(mini_clip, preprocess, placement, batch_size):
  model, params = mini_clip
  found = features_lib.image_features(
    model.encode_image,
    preprocess,
    params,
    placement,
    _benchmark('train[:37]'),
    image_size=8,
    batch_size=batch_size,
  )
  source = data.open_source('digits', 'train[:37]')
  images = np.stack([data.decode(record['image']) for record in source])
  with jax.disable_jit():
    params = jax.device_get(params)
    expected = model.encode_image(params, preprocess(jnp.asarray(images)))
  expected = np.float64(expected)
  expected /= np.sqrt((expected**2).sum(1, keepdims=True))

  assert found.features.dtype == np.float32
  np.testing.assert_allclose(found.features, expected, atol=1e-5)
  assert found.labels.dtype == np.int32
  assert found.labels.tolist() == [record['label'] for record in source]


def test_one_program_for_all_splits(placement):
  traced = []

  def encode(params, images):
    traced.append(images.shape)
    return jnp.reshape(images, (16, -1)) + params[None]

  def preprocess(images):
    return images.astype(jnp.float32)

  for split in ('train[:5]', 'validation[:20]'):
    features_lib.image_features(
      encode,
      preprocess,
      jax.device_put(jnp.ones(64), placement.replicated),
      placement,
      _benchmark(split),
      image_size=8,
      batch_size=10,
    )
  assert traced == [(16, 8, 8, 1)]  # 10 rounded up to a multiple of 8 devices


def test_a_probe_as_the_head_of_a_classifier(
  config, mini_clip, preprocess, placement
):
  model, params = mini_clip
  validation = _benchmark('validation')
  embed = functools.partial(
    features_lib.image_features,
    model.encode_image,
    preprocess,
    params,
    placement,
    image_size=8,
    batch_size=200,
  )
  found = probe.linear_probe(
    embed(_benchmark('train[:200]')),
    embed(validation),
    num_classes=10,
    strengths=[1e-1, 1e-3],
    sharding=placement.examples,
  )
  evaluate = evaluation.evaluator(
    clip_task.task(config, 10),
    placement,
    batch_size=200,
  )
  classifier = jax.device_put(
    {'image': params['image'], 'head': found.head}, placement.replicated
  )
  [score] = evaluate([classifier], validation)
  assert score.n == 400
  # One image may be as near to two classes as float32 can tell.
  assert abs(score.accuracy - found.accuracy) <= 1 / 400
  assert found.accuracy > 0.5  # chance is 0.1


def test_missing_data_is_named(placement):
  with pytest.raises(FileNotFoundError, match="'digits' in /nowhere"):
    features_lib.image_features(
      lambda params, images: images,
      lambda images: images,
      {},
      placement,
      _benchmark('train'),
      image_size=8,
      batch_size=8,
      data_dir='/nowhere',
    )


class TestCache:
  FEATURES = features_lib.Features(
    np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
    np.arange(5, dtype=np.int32),
  )

  def cached(self, path, key='key', change=0):
    """What is found, and how often it was computed for that."""
    calls = []

    def compute():
      calls.append(key)
      return self.FEATURES._replace(features=self.FEATURES.features + change)

    found = features_lib.cached_features(path, key, compute)
    for name, array in found._asdict().items():
      assert array.dtype == getattr(self.FEATURES, name).dtype
    return found, len(calls)

  def test_a_second_call_reads(self, tmp_path, caplog):
    path = tmp_path / 'train.npz'
    first, computed = self.cached(path)
    assert computed == 1
    assert list(tmp_path.iterdir()) == [path]
    again, computed = self.cached(path, change=np.float32(1))
    assert computed == 0
    for found in (first, again):
      jax.tree.map(np.testing.assert_array_equal, found, self.FEATURES)
    assert not caplog.records

  def test_another_key_is_computed(self, tmp_path, caplog):
    path = tmp_path / 'features'  # not every name ends as numpy would have it
    self.cached(path)
    found, computed = self.cached(path, key='other', change=np.float32(1))
    assert computed == 1
    np.testing.assert_array_equal(
      found.features, self.FEATURES.features + np.float32(1)
    )
    assert self.cached(path, key='other')[1] == 0
    assert self.cached(path)[1] == 1
    assert not caplog.records

  @pytest.mark.parametrize(
    'damage',
    [
      lambda file: file.truncate(0),
      lambda file: file.truncate(300),
      lambda file: file.truncate(0) or file.write(b'\x80\x04K\x01.'),
      lambda file: np.save(file, np.zeros(3)),
      lambda file: np.savez(file, key='key'),
      lambda file: np.savez(file, key=np.array(['key'], object)),
    ],
    ids=['empty', 'truncated', 'pickle', 'array', 'missing', 'object'],
  )
  def test_damage_is_computed_again(self, tmp_path, caplog, damage):
    path = tmp_path / 'train.npz'
    self.cached(path)
    with path.open('r+b') as file:
      damage(file)
      file.truncate()
    assert self.cached(path)[1] == 1
    [record] = caplog.records
    assert f'{path} cannot be read' in record.getMessage()
    assert self.cached(path)[1] == 0

  def test_a_flipped_bit_is_found(self, tmp_path, caplog):
    path = tmp_path / 'train.npz'
    self.cached(path)
    content = bytearray(path.read_bytes())
    place = content.index(self.FEATURES.features.tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    found, computed = self.cached(path)
    assert computed == 1
    assert len(caplog.records) == 1
    jax.tree.map(np.testing.assert_array_equal, found, self.FEATURES)

  def test_a_write_that_fails_leaves_what_was_there(
    self, tmp_path, monkeypatch
  ):
    path = tmp_path / 'train.npz'
    self.cached(path)
    before = path.read_bytes()

    def full(file, **arrays):
      file.write(b'half')
      raise OSError('disk full')

    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(OSError, match='disk full'):
      self.cached(path, key='other')
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_digest_sees_every_difference():
  params = {'a': np.arange(4, dtype=np.float32), 'b': np.zeros(2, np.float32)}
  other = [
    {**params, 'a': np.nextafter(params['a'], np.float32(9))},
    {**params, 'a': params['a'].reshape(2, 2)},
    {**params, 'a': params['a'].view(np.int32)},
    {'a': params['a'], 'c': params['b']},
  ]
  keys = [features_lib.digest(tree, _benchmark('train')) for tree in other]
  keys += [
    features_lib.digest(params, _benchmark('train')),
    features_lib.digest(params, _benchmark('train[:200]')),
    features_lib.digest(params, _benchmark('train'), (0.3,)),
  ]
  assert len(set(keys)) == len(keys)
  placed = jax.tree.map(jnp.asarray, params)
  assert features_lib.digest(placed, _benchmark('train')) == keys[4]
