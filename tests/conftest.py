"""What every test runs under: eight CPU devices, and jax at its strictest.

Programs are compiled without optimization, which takes half the time, and kept
between runs: what they compute is held to the same tolerances.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib

# Read by jax when it starts its backend, so set before anyone imports it.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    *os.environ.get('XLA_FLAGS', '').split(),
    '--xla_force_host_platform_device_count=8',
  ]
)

# Processes that a test starts inherit these.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(
  pathlib.Path(__file__).parents[1] / 'build' / 'programs'
)

import jax
import pytest

# No silent float32 of a bfloat16 and a float32, no silent new axes.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

ORACLES = pathlib.Path(__file__).parent / 'oracles'


@pytest.fixture(scope='module', autouse=True)
def release_programs():
  """Releases compiled programs after each file, or a worker grows to 3 GB."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def make_imagenet():
  """The module that has made, and describes, the tiny ImageNet."""
  path = pathlib.Path(__file__).parent / 'data' / 'make_imagenet.py'
  spec = importlib.util.spec_from_file_location('make_imagenet', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='session')
def imagenet(make_imagenet, tmp_path_factory):
  """The data directory of a tiny ImageNet with all its shifts: to read."""
  folder = tmp_path_factory.mktemp('imagenet')
  make_imagenet.unpack(folder)
  make_imagenet.spread_corruption(folder)
  make_imagenet.write_objectnet(folder / 'objectnet-1.0')
  return folder


@pytest.fixture(scope='session')
def imagenet_run(imagenet):
  """Writes what a run on the tiny ImageNet takes: two steps from scratch.

  A CLIP of random weights as a Hugging Face folder, names of the classes, and
  a config that starts from them.
  """

  def write(folder, sizes):
    from modelstock_jax import clip
    from modelstock_jax.data import sources

    model = clip.create(sizes)
    params = jax.jit(model.init)(jax.random.key(0))
    clip.save_pretrained(params, folder / 'clip', config=sizes)
    wnids = sources.imagenet_wnids()
    prompts = dict(
      names=[f'thing number {i}' for i in range(1000)],
      templates=['a photo of a {}.'],
      labels=list(wnids),
    )
    (folder / 'prompts.json').write_text(json.dumps(prompts))
    values = {
      'model.embed_dim': sizes.embed_dim,
      'model.dtype': 'float32',
      'anchor.weights': str(folder / 'clip'),
      'anchor.prompts': str(folder / 'prompts.json'),
      'data.dataset': 'imagenet2012',
      'data.data_dir': str(imagenet),
      'augment.crop_scale': (0.5, 1.0),
      'augment.flip': 0.5,
      'train.epochs': 1,
      'train.batch_size': 6,  # of 15 images
      'train.learning_rate': 1e-3,
      'train.warmup_steps': 1,
      'evaluate.batch_size': 16,
      'log.every_steps': 1,
    }
    for name, tower in (('image', sizes.vision), ('text', sizes.text)):
      for key, value in dataclasses.asdict(tower).items():
        values[f'model.{name}.{key}'] = value
    lines = [f'  config.{key} = {value!r}' for key, value in values.items()]
    path = folder / 'config.py'
    path.write_text(
      'from modelstock_jax.training import config as config_lib\n\n\n'
      'def get_config():\n  config = config_lib.defaults()\n'
      + '\n'.join(lines)
      + '\n  return config\n'
    )
    return path

  return write


def pytest_ignore_collect(collection_path, config):
  """Leaves foreign code alone unless it is asked for.

  pytest does not call this for paths given on its command line: both
  `pytest tests/oracles` and `pytest -m oracle` run the oracles, and fail
  where the foreign code is not installed.
  """
  if collection_path == ORACLES and config.option.markexpr != 'oracle':
    return True
  return None
