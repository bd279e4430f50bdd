import logging
import re
from typing import NamedTuple

import jax
from jax import sharding as js
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets
from sklearn import linear_model

from modelstock_jax.clip import heads
from modelstock_jax.clip import probe

COLLECTIVE = re.compile(
  r' (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|'
  r'collective-broadcast)(?:-start)?\('
)


def _synthetic(n=300, seed=0, noise=0.0):
  """Five overlapping classes around a common direction, of any length."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 5, n)
  centres = np.random.default_rng(7).normal(size=(5, 12))
  features = 2 + centres[labels] + rng.normal(size=(n, 12))
  wrong = rng.random(n) < noise
  given = np.where(wrong, (labels + 1) % 5, labels)
  return np.float32(features * rng.uniform(0.1, 10, (n, 1))), given


def _digits(n=400):
  digits = datasets.load_digits()
  return np.float32(digits.data[:n]), digits.target[:n]


def _unit(features):
  features = np.float64(features)
  return features / np.sqrt((features**2).sum(1, keepdims=True))


def _loss_and_gradient(head, features, labels, l2):
  """Return loss, d/dkernel and d/dbias by the definition, in float64."""
  kernel, bias = np.float64(head['kernel']), np.float64(head['bias'])
  features = _unit(features)
  logits = features @ kernel + bias
  shifted = logits - logits.max(1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
  individual = np.eye(len(bias))[labels]
  loss = -(individual * log_p).sum(1).mean() + l2 / 2 * (kernel**2).sum()
  error = (np.exp(log_p) - individual) / len(labels)
  return loss, features.T @ error + l2 * kernel, error.sum(0)


class Fit(NamedTuple):
  """A head, cross-entropy and penalty, the norm of their gradient, steps."""

  head: dict[str, np.ndarray]
  loss: float
  gradient_norm: float
  steps: int


def _fit(
  features, labels, *, num_classes, l2, tol=1e-5, max_steps=1000, start=None
):
  features, labels = probe._place(features, labels, None)
  if start is None:
    kernel = np.zeros((features.shape[1], num_classes), np.float32)
    start = {'kernel': kernel, 'bias': np.zeros(num_classes, np.float32)}
  return Fit(
    *jax.device_get(
      probe._minimize(features, labels, start, l2, tol, max_steps)
    )
  )


@pytest.mark.parametrize('data', [_synthetic, _digits])
@pytest.mark.parametrize('c', [0.1, 10.0])
def test_scikit_learn_finds_the_same(data, c):
  features, labels = data()
  classes = labels.max() + 1
  other = linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=10_000)
  other.fit(_unit(features), labels)

  actual = _fit(
    features,
    labels,
    num_classes=int(classes),
    l2=1 / (c * len(labels)),
    tol=1e-6,
  )
  kernel, bias = actual.head['kernel'], actual.head['bias']
  assert kernel.dtype == bias.dtype == jnp.float32
  np.testing.assert_allclose(kernel, other.coef_.T, atol=1e-3)
  # A number added to all biases changes nothing.
  np.testing.assert_allclose(
    bias - np.mean(bias),
    other.intercept_ - other.intercept_.mean(),
    atol=1e-3,
  )
  p = jax.nn.softmax(heads.classify(actual.head, jnp.asarray(features)))
  np.testing.assert_allclose(p, other.predict_proba(_unit(features)), atol=1e-4)


@pytest.mark.parametrize('l2', [1e-1, 1e-3, 1e-5])
def test_gradient_vanishes(l2):
  features, labels = _synthetic()
  actual = _fit(features, labels, num_classes=5, l2=l2, tol=1e-5)
  loss, *gradient = _loss_and_gradient(actual.head, features, labels, l2)
  norm = np.sqrt(sum((g**2).sum() for g in gradient))
  assert actual.gradient_norm <= 1e-5
  np.testing.assert_allclose(norm, actual.gradient_norm, atol=1e-6)
  np.testing.assert_allclose(actual.loss, loss, rtol=1e-6)
  assert 1 < actual.steps < 1000


def test_examples_that_are_fitted_well_hide_no_descent():
  # One example a class and a weak penalty: logits of 10 to 20, losses of
  # 1e-6. The textbook's log-sum-exp minus the logit rounds to 1e-6 there.
  features, labels = np.eye(8, 16, dtype=np.float32), np.arange(8)
  actual = _fit(features, labels, num_classes=8, l2=1e-8, tol=1e-7)
  loss, *gradient = _loss_and_gradient(actual.head, features, labels, 1e-8)
  assert max(np.abs(g).max() for g in gradient) < 2e-7
  np.testing.assert_allclose(actual.loss, loss, rtol=1e-4)
  assert actual.gradient_norm <= 1e-7
  assert actual.steps < 200


def test_bias_is_not_regularised():
  # A kernel that cannot move leaves the frequencies of the classes.
  features, _ = _synthetic(100)
  labels = np.repeat([0, 1, 2], [10, 30, 60])
  actual = _fit(features, labels, num_classes=3, l2=1e6, tol=1e-6)
  np.testing.assert_allclose(actual.head['kernel'], 0, atol=1e-6)
  p = jax.nn.softmax(actual.head['bias'])
  np.testing.assert_allclose(p, [0.1, 0.3, 0.6], atol=1e-5)


def test_a_class_without_an_example_is_never_chosen():
  features, labels = _synthetic()
  actual = _fit(features, labels, num_classes=6, l2=1e-3, tol=1e-4)
  logits = heads.classify(actual.head, jnp.asarray(features))
  assert 5 not in np.argmax(logits, 1)
  assert actual.gradient_norm <= 1e-4


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, np.float64])
def test_other_floats_are_upcast(dtype):
  features, labels = _synthetic(50)
  features = np.asarray(features).astype(dtype)
  expected = _fit(
    np.float32(features), labels, num_classes=5, l2=0.01, tol=1e-6
  )
  actual = _fit(features, labels, num_classes=5, l2=0.01, tol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, actual.head, expected.head)


def test_a_fit_from_its_result_ends_at_once():
  features, labels = _synthetic()
  first = _fit(features, labels, num_classes=5, l2=1e-3)
  again = _fit(features, labels, num_classes=5, l2=1e-3, start=first.head)
  assert first.steps > 5
  assert again.steps == 1


def test_a_fit_that_does_not_converge_is_reported(caplog):
  features, labels = probe._place(*_synthetic(), None)
  start = {'kernel': np.zeros((12, 5)), 'bias': np.zeros(5)}
  head = probe.fit(features, labels, start, l2=1e-4, max_steps=3)
  actual = _fit(features, labels, num_classes=5, l2=1e-4, max_steps=3)
  assert actual.steps == 3
  assert actual.gradient_norm > 1e-5
  jax.tree.map(np.testing.assert_array_equal, head, actual.head)
  [record] = caplog.records
  assert record.levelno == logging.WARNING
  message = record.getMessage()
  assert f'gradient is {actual.gradient_norm:.2g}, not tol=1e-05' in message
  assert 'l2=0.0001' in message
  caplog.clear()
  probe.fit(features, labels, head, l2=1e-1)
  assert not caplog.records


class TestLinearProbe:
  STRENGTHS = (1e-6, 1e-1, 1e-2)

  def probe(self, validation, strengths=STRENGTHS, **options):
    # A third of the labels are wrong: weak heads learn them by heart.
    train = _synthetic(60, noise=0.3)
    return probe.linear_probe(
      train, validation, num_classes=5, strengths=strengths, **options
    )

  def test_each_strength_is_measured_on_validation_data(self):
    validation = _synthetic(500, seed=1)
    train = _synthetic(60, noise=0.3)
    actual = self.probe(validation, tol=1e-6)
    assert list(actual.tried) == [1e-1, 1e-2, 1e-6]
    for l2, accuracy in actual.tried.items():
      # Started from zeros, not from the strength before.
      alone = _fit(*train, num_classes=5, l2=l2, tol=1e-6)
      logits = np.asarray(alone.head['bias']) + _unit(validation[0]) @ (
        np.asarray(alone.head['kernel'])
      )
      expected = np.mean(logits.argmax(1) == validation[1])
      assert abs(accuracy - expected) <= 1 / 500  # one of nearly equal logits
      if l2 == actual.l2:
        jax.tree.map(
          lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3),
          actual.head,
          alone.head,
        )
    assert len(set(actual.tried.values())) == 3  # strengths that matter

  def test_validation_data_alone_decide(self):
    clean = self.probe(_synthetic(500, seed=1))
    memory = self.probe(_synthetic(60, noise=0.3))
    assert clean.l2 > memory.l2 == 1e-6
    for actual in (clean, memory):
      assert actual.accuracy == actual.tried[actual.l2]
      assert actual.accuracy == max(actual.tried.values())

  def test_of_equals_the_strongest(self):
    features, _ = _synthetic(20, seed=1)
    # Labels of a class that no head chooses: every strength is always wrong.
    train = _synthetic(60)
    actual = probe.linear_probe(
      train,
      (features, np.full(20, 5)),
      num_classes=6,
      strengths=self.STRENGTHS,
      tol=1e-4,
    )
    assert actual.tried == dict.fromkeys(sorted(self.STRENGTHS)[::-1], 0.0)
    assert actual.l2 == 1e-1
    assert actual.head['kernel'].shape == (12, 6)

  def test_one_program_for_all_strengths(self):
    probe._minimize.clear_cache()
    self.probe(_synthetic(40, seed=1), strengths=[0.3, 0.1, 0.03])
    assert probe._minimize._cache_size() == 1

  def test_all_that_is_wrong_is_said_at_once(self):
    features, labels = _synthetic(20)
    with pytest.raises(ValueError, match='train: features') as error:
      probe.linear_probe(
        (features, labels[:-1]),
        (features, labels + 0.5),
        num_classes=5,
        strengths=[],
      )
    assert [line.split(':')[0] for line in str(error.value).split('\n')] == [
      'train',
      'validation',
      'strengths=[]',
    ]


@pytest.fixture(scope='module')
def rows():
  """Examples over a mesh of eight devices, as evaluation batches lie."""
  devices = np.array(jax.devices()).reshape(2, 4)
  auto = js.AxisType.Auto
  mesh = js.Mesh(devices, ('stock', 'data'), axis_types=(auto, auto))
  return js.NamedSharding(mesh, js.PartitionSpec(('stock', 'data')))


@pytest.mark.parametrize('n', [296, 299, 6])
def test_any_number_of_examples_over_eight_devices(rows, n):
  # Every class has an example: without one, its bias has no minimum.
  train, validation = (_synthetic(n)[0], np.arange(n) % 5), _synthetic(n)
  options = {'num_classes': 5, 'strengths': [1e-2, 1e-3], 'tol': 1e-6}
  expected = probe.linear_probe(train, validation, **options)
  actual = probe.linear_probe(train, validation, sharding=rows, **options)
  assert (actual.l2, actual.tried) == (expected.l2, expected.tried)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3),
    actual.head,
    expected.head,
  )


def test_sums_alone_cross_devices(rows):
  n, d, k = 1024, 16, 24
  float32 = jnp.float32
  compiled = probe._minimize.lower(
    jax.ShapeDtypeStruct((n, d), float32, sharding=rows),
    jax.ShapeDtypeStruct((n,), jnp.int32),
    {
      'kernel': jax.ShapeDtypeStruct((d, k), float32),
      'bias': jax.ShapeDtypeStruct((k,), float32),
    },
    *(jax.ShapeDtypeStruct((), t) for t in (float32, float32, jnp.int32)),
  ).compile()
  assert set(COLLECTIVE.findall(compiled.as_text())) == {'all-reduce'}
  # No device holds all logits, nor several times its own.
  memory = compiled.memory_analysis().temp_size_in_bytes
  assert memory < 4 * (n * k * 4 // 8) + 25 * (d + 1) * k * 4


def test_collectives_are_counted(rows):
  complete = js.NamedSharding(rows.mesh, js.PartitionSpec())
  array = jax.device_put(np.arange(16.0, dtype=np.float32), rows)
  gather = jax.jit(lambda x: x * 2, out_shardings=complete)
  text = gather.lower(array).compile().as_text()
  assert 'all-gather' in COLLECTIVE.findall(text)


def _with(array, place, value):
  array = array.copy()
  array[place] = value
  return array


FEATURES, LABELS = _synthetic(20)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'features': _with(FEATURES, (3, 1), np.nan)},
      r'1 of 20 examples are not finite or all zero, .* example 3, .* nan',
    ),
    (
      {'features': _with(FEATURES, slice(2, 4), np.inf)},
      r'2 of 20 examples .* first of example 2, .* inf',
    ),
    ({'features': _with(FEATURES, 5, 0)}, r'example 5, .* length is 0'),
    ({'features': FEATURES[0]}, r'features have shape \(12,\)'),
    ({'features': FEATURES[:, :0]}, r'features have shape \(20, 0\)'),
    (
      {'features': FEATURES[:0], 'labels': LABELS[:0]},
      r'features have shape \(0, 12\)',
    ),
    ({'labels': LABELS[:-1]}, r'features have shape \(20, 12\), labels \(19,'),
    ({'labels': LABELS[:, None]}, r'features have .*, labels \(20, 1\)'),
    ({'labels': LABELS + 0.5}, 'of 20 examples are not integers in'),
    ({'labels': _with(LABELS, 0, 5)}, r'labels \[5\] of 1 examples .* 0\.\.4'),
    (
      {'labels': _with(LABELS, slice(3), -1)},
      r'labels \[-1\] of 3 examples are not integers in 0\.\.4',
    ),
    ({'l2': 0}, r'strengths=\[0\]: must be greater than 0'),
    ({'l2': -1.0}, r'strengths=\[-1\.0\]'),
    ({'l2': float('nan')}, r'strengths=\[nan\]'),
  ],
)
def test_bad_input_is_named(changes, message):
  arguments = {'features': FEATURES, 'labels': LABELS, 'l2': 0.1, **changes}
  train = arguments['features'], arguments['labels']
  with pytest.raises(ValueError, match=message):
    probe.linear_probe(
      train, (FEATURES, LABELS), num_classes=5, strengths=[arguments['l2']]
    )
