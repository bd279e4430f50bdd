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
from modelstock_jax.training import sharding

ROOT = pathlib.Path(__file__).parents[2]


def _benchmark(split):
  return data.Benchmark(split, 'digits', split)


def _opened(split):
  """The source of a split, and how it is read."""
  benchmark = _benchmark(split)
  source = data.open_benchmark(benchmark, None)
  return source, data.benchmark_reader(benchmark, source, 8)


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
  return sharding.place(stock=2, batch_size=8)


@pytest.fixture(scope='module')
def mini_clip(config, placement):
  """The CLIP that ships: its functions, and its weights on every device."""
  model = clip.create(config.model.network())
  like = jax.eval_shape(model.init, jax.random.key(0))
  params = clip.load_safetensors(
    anchor_lib.weights_path(config.anchor.weights), like
  )
  return model, jax.device_put(params, placement.replicated)


@pytest.mark.parametrize('batch_size', [16, 37, 100])
def test_features_of_mini_clip(mini_clip, preprocess, placement, batch_size):
  model, params = mini_clip
  features, labels = evaluation.image_features(
    model.encode_image,
    preprocess,
    params,
    placement,
    *_opened('train[:37]'),
    batch_size=batch_size,
  )
  source = data.open_source('digits', 'train[:37]')
  images = np.stack([data.decode(record['image']) for record in source])
  with jax.disable_jit():
    params = jax.device_get(params)
    expected = model.encode_image(params, preprocess(jnp.asarray(images)))
  expected = np.float64(expected)
  expected /= np.sqrt((expected**2).sum(1, keepdims=True))

  assert features.dtype == np.float32
  np.testing.assert_allclose(features, expected, atol=1e-5)
  assert labels.dtype == np.int32
  assert labels.tolist() == [record['label'] for record in source]


def test_one_program_for_all_splits(placement):
  traced = []

  def encode(params, images):
    traced.append(images.shape)
    return jnp.reshape(images, (16, -1)) + params[None]

  def preprocess(images):
    return images.astype(jnp.float32)

  for split in ('train[:5]', 'validation[:20]'):
    evaluation.image_features(
      encode,
      preprocess,
      jax.device_put(jnp.ones(64), placement.replicated),
      placement,
      *_opened(split),
      batch_size=10,
    )
  assert traced == [(16, 8, 8, 1)]  # 10 rounded up to a multiple of 8 devices


def test_a_probe_as_the_head_of_a_classifier(
  config, mini_clip, preprocess, placement
):
  model, params = mini_clip
  validation = _benchmark('validation')
  embed = functools.partial(
    evaluation.image_features,
    model.encode_image,
    preprocess,
    params,
    placement,
    batch_size=200,
  )
  actual = probe.linear_probe(
    embed(*_opened('train[:200]')),
    embed(*_opened('validation')),
    num_classes=10,
    strengths=[1e-1, 1e-3],
    sharding=placement.examples,
  )
  evaluate = evaluation.Evaluator(
    clip_task.task(config, 10),
    placement,
    batch_size=200,
  )
  classifier = jax.device_put(
    {'image': params['image'], 'head': actual.head}, placement.replicated
  )
  [score] = evaluate([classifier], validation)
  assert score.n == 400
  # One image may be as near to two classes as float32 can tell.
  assert abs(score.accuracy - actual.accuracy) <= 1 / 400
  assert actual.accuracy > 0.5  # chance is 0.1


def test_digest_sees_every_difference():
  params = {'a': np.arange(4, dtype=np.float32), 'b': np.zeros(2, np.float32)}
  other = [
    {**params, 'a': np.nextafter(params['a'], np.float32(9))},
    {**params, 'a': params['a'].reshape(2, 2)},
    {**params, 'a': params['a'].view(np.int32)},
    {'a': params['a'], 'c': params['b']},
  ]
  keys = [anchor_lib.digest(tree, _benchmark('train')) for tree in other]
  keys += [
    anchor_lib.digest(params, _benchmark('train')),
    anchor_lib.digest(params, _benchmark('train[:200]')),
    anchor_lib.digest(params, _benchmark('train'), (0.3,)),
  ]
  assert len(set(keys)) == len(keys)
  placed = jax.tree.map(jnp.asarray, params)
  assert anchor_lib.digest(placed, _benchmark('train')) == keys[4]
