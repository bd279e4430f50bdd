"""A network that compiles in seconds, and a line of metrics."""

import jax
import pytest

from experiments.geometry import study
from modelstock_jax import clip
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import config as config_lib

# Two epochs of five steps: too short to learn much.
_TINY = {
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
def tiny_flags(tmp_path_factory):
  """Flags that make the demo's config tiny, with changes."""
  flags = [f'--config.{key}={value}' for key, value in _TINY.items()]
  path = tmp_path_factory.mktemp('anchor') / 'tiny.safetensors'
  config = config_lib.load(study.CONFIG, flags)
  model = clip.create(anchor_lib.network_config(config))
  params = model.init(jax.random.key(7))
  clip.save_safetensors(params, path, {'model': config.model.to_json()})
  flags.append(f'--config.anchor.weights={path}')

  def tiny(changes=()):
    return flags + [f'--config.{k}={v}' for k, v in dict(changes).items()]

  return tiny
