import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (3, 4), 'bias': (4,), 'scale': ()}


def _close(got, expected):
  for name in SHAPES:
    np.testing.assert_allclose(got[name], expected[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.9])
def test_ema_is_its_sum(make_family, decay):
  # after n steps: decay^n w_0 + (1 - decay) sum_k decay^(n - k) w_k
  start, steps = make_family(SHAPES, 5)
  average = start
  for params in steps:
    average = ms.ema(average, params, decay=decay)
  weights = [decay**5, *((1 - decay) * decay ** (5 - k) for k in range(1, 6))]
  assert sum(weights) == pytest.approx(1)
  _close(
    average,
    {
      name: sum(
        weight * np.asarray(tree[name], np.float64)
        for weight, tree in zip(weights, [start, *steps], strict=True)
      )
      for name in SHAPES
    },
  )


def test_ema_from_zeros_is_biased_as_documented(make_family):
  _, steps = make_family(SHAPES, 3)
  average = jax.tree.map(np.zeros_like, steps[0])
  for _ in range(3):
    average = ms.ema(average, steps[0], decay=0.5)
  _close(jax.tree.map(lambda x: x / (1 - 0.5**3), average), steps[0])


def test_ema_limits(make_family):
  average, (params, _) = make_family(SHAPES)
  for decay, expected in ((1.0, average), (0.0, params)):
    got = ms.ema(average, params, decay=decay)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize('number', [1, 2, 7])
def test_swa_is_the_mean(make_family, number):
  _, models = make_family(SHAPES, 7)
  average = jax.tree.map(np.zeros_like, models[0])
  for i, params in enumerate(models[:number]):
    average = ms.swa(average, params, count=i)
  _close(
    average,
    {
      name: np.mean([m[name].astype(np.float64) for m in models[:number]], 0)
      for name in SHAPES
    },
  )


def test_swa_forgets_what_it_was_before_the_first():
  nothing = {'w': jnp.full(2, jnp.nan)}
  got = ms.swa(nothing, {'w': jnp.ones(2)}, count=0)
  assert got['w'].tolist() == [1.0, 1.0]


def test_under_scan(make_family):
  # as a training loop would: the count and the decay are traced
  _, models = make_family(SHAPES, 4)
  stack = ms.stack(models)
  start = unit = jax.tree.map(
    jnp.zeros_like, jax.tree.map(jnp.asarray, models[0])
  )

  def step(carry, params):
    mean, moving, count = carry
    mean = ms.swa(mean, params, count)
    moving = ms.ema(moving, params, decay=1 - 1 / (count + 1))
    return (mean, moving, count + 1), None

  carry = (start, unit, jnp.float32(0))
  (mean, moving, _), _ = jax.lax.scan(step, carry, stack)
  expected = ms.uniform_soup(models)
  _close(mean, expected)
  _close(moving, expected)  # a decay of n / (n + 1) is the plain mean


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_dtypes_and_counters(dtype):
  average = {'n': jnp.int32(1), 'w': jnp.zeros(1, dtype)}
  params = {'n': jnp.int32(2), 'w': jnp.ones(1, dtype)}
  for got, expected in (
    (ms.ema(average, params, decay=0.75), 0.25),
    (ms.swa(average, params, count=3), 0.25),
  ):
    assert got['w'].dtype == dtype
    assert float(got['w'][0]) == expected
    assert got['n'] == 2


@pytest.mark.parametrize(
  ('decay', 'match'),
  [
    (1.5, r'decay: must lie in \[0, 1\], got \[1.5\]'),
    (-0.1, 'got .-0.1'),
    (float('nan'), 'got .nan'),
    ([0.5, 0.9], r'decay: must be a number, its shape is \(2,\)'),
  ],
)
def test_ema_refuses_decay(decay, match):
  with pytest.raises(ValueError, match=match):
    ms.ema({'w': jnp.zeros(1)}, {'w': jnp.ones(1)}, decay=decay)


@pytest.mark.parametrize('count', [-1, float('nan'), np.array([1, 2])])
def test_swa_refuses_count(count):
  with pytest.raises(ValueError, match='count: must be a number of models'):
    ms.swa({'w': jnp.zeros(1)}, {'w': jnp.ones(1)}, count=count)


def test_names_what_differs():
  with pytest.raises(ValueError, match=r'w: the average has shape \(1,\)'):
    ms.swa({'w': jnp.zeros(1)}, {'w': jnp.ones(2)}, count=1)
