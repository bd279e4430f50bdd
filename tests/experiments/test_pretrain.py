import json

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from experiments.digits import pretrain
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.cli import main
from modelstock_jax.data import captions
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import sharding


def _reference(images, texts, labels, log_scale):
  """In float64 and in loops: all captions of a label are positives."""
  images, texts = (np.asarray(x, np.float64) for x in (images, texts))
  images /= np.linalg.norm(images, axis=1, keepdims=True)
  texts /= np.linalg.norm(texts, axis=1, keepdims=True)
  logits = min(np.exp(float(log_scale)), 100) * images @ texts.T
  total = 0.0
  for rows in (logits, logits.T):
    for row, label in zip(rows, labels, strict=True):
      log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
      total -= log_p[labels == label].mean() / len(labels) / 2
  return total


@pytest.mark.parametrize('log_scale', [0.0, 2.7, 9.0])
@pytest.mark.parametrize('num_labels', [1, 3, 1000])
def test_contrastive_loss(log_scale, num_labels):
  rng = np.random.default_rng(0)
  images, texts = rng.normal(size=(2, 12, 5)).astype(np.float32)
  labels = rng.integers(0, num_labels, 12).astype(np.int32)
  loss = pretrain.contrastive_loss(
    jnp.asarray(images),
    jnp.asarray(texts),
    jnp.asarray(labels),
    jnp.float32(log_scale),
  )
  expected = _reference(images, texts, labels, log_scale)
  assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_captions_name_the_class_in_any_template():
  names = [captions.describe(name) for name in data.class_names('glyphs')]
  labels = np.repeat(np.arange(36), 50)
  tokens = pretrain.caption_tokens(names, labels, np.random.default_rng(0))
  table = np.stack(
    [
      captions.tokenize([t.format(n) for t in captions.TEMPLATES])
      for n in names
    ]
  )
  match = (tokens[:, None] == table[labels]).all(-1)
  np.testing.assert_array_equal(match.sum(1), 1)
  np.testing.assert_array_equal(  # 225 expected of each; sd 14
    match.sum(0) > 150, True
  )


def test_pretraining_writes_weights_that_a_run_can_start_from(
  geometry_flags, tmp_path
):
  path = tmp_path / 'weights.safetensors'
  config = config_lib.load(
    pretrain.CONFIG,
    geometry_flags(
      {
        'pretrain.steps': 25,
        'pretrain.warmup_steps': 5,
        'pretrain.batch_size': 64,
        'pretrain.learning_rate': 1e-2,
        'anchor.weights': path,
      }
    ),
  )
  losses = pretrain.pretrain(config, path)
  assert len(losses) == 25
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
  placement = sharding.place(stock=1, batch_size=8)
  head = anchor_lib.load(config, placement)['head']
  assert head['kernel'].shape == (8, 10)
  model = clip.create(config.model.network())
  like = jax.eval_shape(model.init, jax.random.key(0))
  restored = clip.load_safetensors(path, like)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('steps', '-5', 'must be at least 1, got -5.'),
    ('warmup_steps', '-1', 'must be at least 0, got -1.'),
    ('learning_rate', '1e999', 'must be a finite number, got inf.'),
  ],
)
def test_settings_out_of_range(key, value, message):
  flag = f'--config.pretrain.{key}={value}'
  config = config_lib.load(pretrain.CONFIG, [flag])
  with pytest.raises(ValueError, match='not valid') as error:
    pretrain.check(config)
  assert str(error.value).splitlines()[1:] == [f'  pretrain.{key}: {message}']


def test_the_demo_starts_from_the_anchor_that_it_pretrains(
  geometry_flags, tmp_path
):
  arguments = [
    f'--workdir={tmp_path}',
    '--seeds=1',
    *(flag for flag in geometry_flags() if 'anchor.weights' not in flag),
    '--config.pretrain.steps=3',
    '--config.pretrain.batch_size=16',
    '--config.pretrain.warmup_steps=1',
    "--config.evaluate.benchmarks=('digits',)",
  ]
  assert main.main(['demo', '--pretrain', *arguments]) == 0
  weights = tmp_path / 'anchor.safetensors'
  first = weights.read_bytes()
  rows = json.loads((tmp_path / 'results.json').read_text())
  assert {row['benchmark'] for row in rows} == {'digits'}
  # A second time it is there already.
  assert main.main(['demo', '--pretrain', *arguments]) == 0
  assert weights.read_bytes() == first
