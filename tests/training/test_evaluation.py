import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import data
from modelstock_jax.clip import model as model_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import sharding

# 37 examples: no batch size below divides it.
BENCHMARK = data.Benchmark('odd', 'digits', 'test[:37]')


def _apply(params, images):
  flat = jnp.reshape(images, (images.shape[0], -1))
  return jnp.matmul(flat, params, precision=jax.lax.Precision.HIGHEST)


def _evaluator(batch_size, stock=1):
  placement = sharding.place(stock=stock, num_models=2, batch_size=8)
  model = model_lib.Model(init=lambda key: key, apply=_apply)
  return evaluation.evaluator(
    model,
    lambda images: images.astype(jnp.float32),
    placement,
    batch_size=batch_size,
  )


@pytest.fixture(scope='module')
def models():
  """Integer weights: logits are exact, and so are their ties and order."""
  rng = np.random.default_rng(0)
  return rng.integers(-9, 9, (3, 64, 10)).astype(np.float32)


@pytest.fixture(scope='module')
def expected(models):
  source = data.open_source('digits', 'test[:37]')
  images = np.stack([data.decode(record['image']) for record in source])
  labels = np.array([record['label'] for record in source])
  logits = images.reshape(37, 64).astype(np.float64) @ models
  return (logits.argmax(-1) == labels).sum(-1).tolist()


@pytest.mark.parametrize('stock', [1, 2])
@pytest.mark.parametrize('batch_size', [1, 16, 36, 37, 100])
def test_every_example_is_counted_once(models, expected, batch_size, stock):
  evaluate = _evaluator(batch_size, stock)
  assert evaluate.batch_size % 8 == 0
  assert 0 <= evaluate.batch_size - batch_size < 8
  placed = jax.device_put(models, evaluate.placement.replicated)
  scores = evaluate(list(placed), BENCHMARK)
  assert [score.correct for score in scores] == expected
  assert [score.n for score in scores] == [37] * 3
  assert len(set(expected)) > 1  # models that can be told apart


def test_the_blank_rest_of_a_batch_is_not_counted(models):
  # Zero weights say 0 to every image, so also to what fills up the batch.
  evaluate = _evaluator(100)
  source = data.open_source('digits', 'test[:37]')
  zeros = sum(record['label'] == 0 for record in source)
  [score] = evaluate([jnp.zeros_like(models[0])], BENCHMARK)
  assert score == (zeros, 37)
  assert score.accuracy == zeros / 37


def test_batches_are_read_once_for_all_models(models, monkeypatch):
  evaluate = _evaluator(16)
  opened = []
  original = data.eval_batches
  monkeypatch.setattr(
    data,
    'eval_batches',
    lambda *args, **kwargs: opened.append(1) or original(*args, **kwargs),
  )
  assert len(evaluate(list(jnp.asarray(models)), BENCHMARK)) == 3
  assert opened == [1]


def test_missing_data_is_named(models):
  placement = sharding.place(stock=1, num_models=2, batch_size=8)
  evaluate = evaluation.evaluator(
    model_lib.Model(init=lambda key: key, apply=_apply),
    lambda images: images.astype(jnp.float32),
    placement,
    batch_size=8,
    data_dir='/nowhere',
  )
  with pytest.raises(FileNotFoundError, match="'digits' in /nowhere"):
    evaluate([jnp.asarray(models[0])], BENCHMARK)
