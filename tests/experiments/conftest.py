"""Scripts and configs of experiments/ find each other beside themselves."""

import pathlib
import sys

import jax
import pytest

from experiments.geometry import study
from modelstock_jax import clip
from modelstock_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'experiments' / 'baselines'))


@pytest.fixture(scope='session')
def prepare_baseline(tiny_flags, prepare_on):
  """Config and setup of a file of experiments/baselines, made tiny."""

  def prepare(file, changes=(), devices=2):
    path = ROOT / 'experiments' / 'baselines' / file
    config, hooks = config_lib.load_with_hooks(path, tiny_flags(changes))
    return config, prepare_on(devices, config, **hooks)

  return prepare


# Two epochs of five steps: too short to learn much.
_GEOMETRY = {
  'model.embed_dim': 8,
  'model.image.width': 8,
  'model.image.depth': 1,
  'model.image.heads': 2,
  'model.text.width': 8,
  'model.text.heads': 2,
  'train.batch_size': 40,
  'train.epochs': 2,
  'train.warmup_steps': 2,
  'evaluate.every_epochs': 1,
  'evaluate.benchmarks': "('digits', 'noise')",
}


@pytest.fixture(scope='session')
def geometry_flags(tmp_path_factory):
  """Flags that make the demo's config tiny, with changes."""
  flags = [f'--config.{key}={value}' for key, value in _GEOMETRY.items()]
  path = tmp_path_factory.mktemp('anchor') / 'tiny.safetensors'
  config = config_lib.load(study.CONFIG, flags)
  model = clip.create(config.model.network())
  params = model.init(jax.random.key(7))
  clip.save_safetensors(params, path, {'model': config.model.to_json()})
  flags.append(f'--config.anchor.weights={path}')

  def tiny(changes=()):
    return flags + [f'--config.{k}={v}' for k, v in dict(changes).items()]

  return tiny
