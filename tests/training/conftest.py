"""A network that compiles in seconds, and runs of three epochs with it."""

import json
import pathlib

import jax
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]

# 32 digits in batches of 8 are 4 steps an epoch, 12 in all.
_TINY = {
  'model.embed_dim': 8,
  'model.image.width': 8,
  'model.image.depth': 1,
  'model.image.heads': 2,
  'model.text.width': 8,
  'model.text.heads': 2,
  'data.train': 'train[:32]',
  'data.validation': 'validation[:48]',
  'train.epochs': 3,
  'train.batch_size': 8,
  'train.learning_rate': 3e-2,
  'train.warmup_steps': 2,
  'evaluate.batch_size': 48,
  'evaluate.every_epochs': 1,
  'checkpoint.every_merges': 1,
  'checkpoint.every_steps': 0,
  'log.every_steps': 2,
}


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
  """A file with the untrained weights of the tiny CLIP."""
  path = tmp_path_factory.mktemp('anchor') / 'tiny.safetensors'
  config = config_lib.load(ROOT / 'configs' / 'digits.py', _flags(_TINY))
  model = clip.create(anchor_lib.network_config(config))
  clip.save_safetensors(
    model.init(jax.random.key(7)), path, {'model': config.model.to_json()}
  )
  return path


@pytest.fixture(scope='session')
def tiny_flags(weights):
  """What makes the demo's config tiny, as flags, with changes."""

  def tiny(changes=()):
    values = {**_TINY, 'anchor.weights': weights, **dict(changes)}
    return _flags(values)

  return tiny


@pytest.fixture(scope='session')
def tiny_config(tiny_flags):
  """The demo's config made tiny, with changes: {'train.epochs': 2, ...}."""

  def tiny(changes=()):
    return config_lib.load(ROOT / 'configs' / 'digits.py', tiny_flags(changes))

  return tiny


@pytest.fixture(scope='session')
def prepare_on():
  """Prepares a run on the first few devices: eight cost time to compile."""

  def prepare(number, config):
    devices = jax.devices()[:number]
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, 'devices', lambda: devices)
      return loop.prepare(config)

  return prepare


@pytest.fixture(scope='session')
def setup(prepare_on, tiny_config):
  """Compiled once for all runs that differ in when things happen."""
  return prepare_on(2, tiny_config())


@pytest.fixture(scope='session')
def read_run():
  """All that a finished run leaves, as one flat dict of numpy arrays."""

  def read(config, workdir, setup):
    checkpoint = loop.restore(config, workdir, setup)
    leaves = jax.tree_util.tree_flatten_with_path(checkpoint)[0]
    found = {jax.tree_util.keystr(path): _host(leaf) for path, leaf in leaves}
    found['metrics'] = np.array(_untimed(workdir))
    return found

  return read


@pytest.fixture(scope='session')
def assert_identical():
  """Two dicts of arrays hold the same bits."""

  def check(found, expected):
    assert found.keys() == expected.keys()
    different = [
      name
      for name, value in expected.items()
      if value.dtype != found[name].dtype
      or value.tobytes() != found[name].tobytes()
    ]
    assert not different

  return check


@pytest.fixture(scope='session')
def apart():
  """How far two models are apart, in units of how far one of them went.

  But for the biases of keys, which add the same to all of a query's logits: a
  softmax takes no notice, their gradient is 0, and Adam makes steps of its
  rounding.
  """

  def measure(found, expected, anchor):
    paths, start = zip(
      *jax.tree_util.tree_leaves_with_path(anchor), strict=True
    )
    names = [jax.tree_util.keystr(path) for path in paths]
    counts = ["['key']['bias']" not in name for name in names]
    assert not all(counts)
    distance, moved = (
      sum(
        np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
        for a, b, taken in zip(x, y, counts, strict=True)
        if taken
      )
      for x, y in ((found, expected), (expected, start))
    )
    assert moved > 0
    return np.sqrt(distance / moved)

  return measure


def _flags(values):
  return [f'--config.{key}={value}' for key, value in values.items()]


def _host(leaf):
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.array(leaf)


def _untimed(workdir):
  """The text lines of metrics.jsonl without what a clock decides."""
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  for record in records:
    record.pop('images_per_second', None)
  return [json.dumps(record) for record in records]
