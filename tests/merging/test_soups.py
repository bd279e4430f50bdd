import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (3, 4), 'bias': (4,), 'scale': ()}


@pytest.mark.parametrize('num_models', [2, 3, 5])
@pytest.mark.parametrize('stacked', [False, True])
def test_uniform_soup(make_family, num_models, stacked):
  _, models = make_family(SHAPES, num_models)
  soup = ms.uniform_soup(
    ms.stack(models) if stacked else models, stacked=stacked
  )
  for name in SHAPES:
    expected = np.mean([m[name].astype(np.float64) for m in models], axis=0)
    np.testing.assert_allclose(soup[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_soup_of_half_precision_is_rounded_once(dtype):
  # in bfloat16 1 + 1/128 + 1/128 + 1/128 is 1.03 only if summed wider
  values = jnp.asarray([1.0, 1 / 128, 1 / 128, 1 / 128], dtype)
  soup = ms.uniform_soup({'w': values}, stacked=True)['w']
  assert soup.dtype == dtype
  assert soup == jnp.asarray((1 + 3 / 128) / 4, dtype)


def test_soup_passes_on_what_it_cannot_average():
  model = {'n': jnp.int32(3), 'f': jax.nn.relu, 'w': jnp.ones(2)}
  soup = ms.uniform_soup([model, model])
  assert soup['n'] == 3
  assert soup['n'].dtype == jnp.int32
  assert soup['f'] is jax.nn.relu


def test_soup_of_a_stack_passes_on_one_value():
  stack = {'n': jnp.int32([3, 3]), 'w': jnp.ones((2, 2))}
  soup = ms.uniform_soup(stack, stacked=True)
  assert soup['n'].shape == ()
  assert soup['n'] == 3


@pytest.mark.parametrize('models', [[], [{'w': jnp.zeros(2)}], {'w': 1}])
def test_soup_needs_two_models(models):
  with pytest.raises(ValueError, match='models'):
    ms.uniform_soup(models)


@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0, jnp.float32(0.7)])
def test_wise_ft(make_family, alpha):
  anchor, (model, _) = make_family(SHAPES)
  got = ms.wise_ft(anchor, model, alpha=alpha)
  for name in SHAPES:
    w0, w1 = (x[name].astype(np.float64) for x in (anchor, model))
    expected = (1 - float(alpha)) * w0 + float(alpha) * w1
    np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_wise_ft_is_exact_at_the_ends(make_family, dtype):
  anchor, (model, _) = jax.tree.map(
    lambda x: jnp.asarray(x, dtype), make_family(SHAPES)
  )
  for alpha, expected in ((0.0, anchor), (1.0, model)):
    got = ms.wise_ft(anchor, model, alpha=alpha)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(x.dtype == dtype for x in jax.tree.leaves(got))


def test_wise_ft_sweeps_under_vmap(make_family):
  anchor, (model, _) = make_family(SHAPES)
  alphas = jnp.linspace(0.0, 1.0, 5)
  sweep = jax.vmap(lambda alpha: ms.wise_ft(anchor, model, alpha=alpha))(alphas)
  for i, alpha in enumerate(alphas):
    one = ms.wise_ft(anchor, model, alpha=float(alpha))
    np.testing.assert_allclose(
      sweep['kernel'][i], one['kernel'], rtol=1e-6, atol=1e-6
    )


def test_wise_ft_passes_on_the_models_counters():
  anchor = {'n': jnp.int32(0), 'w': jnp.zeros(2)}
  model = {'n': jnp.int32(9), 'w': jnp.ones(2)}
  assert ms.wise_ft(anchor, model, alpha=0.5)['n'] == 9


@pytest.mark.parametrize('alphas', [[0.0, 0.25, 1.0], np.linspace(0, 1, 5)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_wise_ft_sweeps_in_one_call(make_family, alphas, dtype):
  anchor, (model, _) = jax.tree.map(
    lambda x: jnp.asarray(x, dtype), make_family(SHAPES)
  )
  sweep = ms.wise_ft(anchor, model, alpha=alphas)
  epsilon = float(jnp.finfo(dtype).eps)
  for name, shape in SHAPES.items():
    assert sweep[name].shape == (len(alphas), *shape)
    assert sweep[name].dtype == dtype
    w0, w1 = (np.asarray(x[name], np.float64) for x in (anchor, model))
    for i, alpha in enumerate(alphas):
      expected = (1 - alpha) * w0 + alpha * w1
      np.testing.assert_allclose(
        np.asarray(sweep[name][i], np.float64),
        expected,
        rtol=epsilon,
        atol=4 * epsilon,
      )
    np.testing.assert_array_equal(sweep[name][0], anchor[name])
    np.testing.assert_array_equal(sweep[name][-1], model[name])


def test_wise_ft_sweep_is_a_stack():
  anchor = {'f': jax.nn.relu, 'n': jnp.int32(0), 'w': jnp.zeros(2)}
  model = {'f': jax.nn.relu, 'n': jnp.int32(9), 'w': jnp.ones(2)}
  sweep = ms.unstack(ms.wise_ft(anchor, model, alpha=jnp.array([0.0, 0.5])))
  assert [float(m['w'][1]) for m in sweep] == [0.0, 0.5]
  assert [int(m['n']) for m in sweep] == [9, 9]
  assert sweep[0]['f'] is jax.nn.relu


def test_wise_ft_sweeps_under_jit(make_family):
  anchor, (model, _) = make_family(SHAPES)
  alphas = jnp.linspace(0.0, 1.0, 3)
  sweep = jax.jit(ms.wise_ft)(anchor, model, alphas)
  expected = ms.wise_ft(anchor, model, alphas)
  for name in SHAPES:
    np.testing.assert_allclose(sweep[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize(
  ('alpha', 'match'),
  [
    (1.5, r'alpha: must lie in \[0, 1\], got \[1.5\]'),
    (-0.1, 'got .-0.1'),
    (float('nan'), 'got .nan'),
    ([0.5, 2.0, -1.0], r'got \[2.0, -1.0\]'),
    (jnp.array([0.5, 1.25]), r'got \[1.25\]'),
    ([], 'alpha: must be a number or an array'),
    ([[0.5]], r'shape is \(1, 1\)'),
  ],
)
def test_wise_ft_refuses_alpha(alpha, match):
  with pytest.raises(ValueError, match=match):
    ms.wise_ft({'w': jnp.zeros(1)}, {'w': jnp.ones(1)}, alpha=alpha)


def test_wise_ft_names_what_differs():
  with pytest.raises(ValueError, match='1 places') as error:
    ms.wise_ft({'w': jnp.zeros(1)}, {'w': jnp.ones(2)})
  assert 'w: the anchor has float32[1], model 0 has float32[2]' in str(
    error.value
  )


def test_soup_names_what_differs():
  models = [{'head': jnp.zeros(3)}, {'head': jnp.zeros(4)}]
  with pytest.raises(ValueError, match='the first model has float32'):
    ms.uniform_soup(models)


def test_soup_is_model_stock_of_identical_directions(make_family):
  # cosine 1 gives t = 1: the plain average
  anchor, (model, _) = make_family(SHAPES)
  far = jax.tree.map(lambda w0, w1: w0 + 2 * (w1 - w0), anchor, model)
  merged = ms.model_stock(anchor, [model, far]).params
  soup = ms.uniform_soup([model, far])
  for name in SHAPES:
    np.testing.assert_allclose(merged[name], soup[name], rtol=1e-5, atol=1e-6)


def test_stacked_scalars_are_refused():
  with pytest.raises(ValueError, match='number of models'):
    ms.uniform_soup({'w': jnp.float32(1)}, stacked=True)


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
  with pytest.raises(ValueError, match=r'w: the average has float32\[1\]'):
    ms.swa({'w': jnp.zeros(1)}, {'w': jnp.ones(2)}, count=1)
