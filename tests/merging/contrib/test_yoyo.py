import itertools

import jax
from jax import numpy as jnp
from jax import sharding as js
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (12, 8), 'bias': (8,), 'scan': (3, 4, 5)}


def _minimum(steps):
  """The coefficients of [N, D] displacements, in float64, by trying all.

  At the minimum some lambdas are 0 and the sum may be 1; for each such choice
  the others solve a linear system. The best feasible one of all.
  """
  gram = steps @ steps.T
  size = len(gram)
  target = (gram.sum(1) - np.diagonal(gram)) / (size - 1)
  best, at = 0.0, np.zeros(size)
  for number in range(1, size + 1):
    for kept in map(list, itertools.combinations(range(size), number)):
      part, ones = gram[np.ix_(kept, kept)], np.ones(number)
      free = np.linalg.solve(part, target[kept])
      face = np.linalg.solve(part, ones)
      bound = free - face * (free.sum() - 1) / face.sum()
      for values in (free, bound):
        if values.min() >= 0 and values.sum() <= 1 + 1e-12:
          actual = np.zeros(size)
          actual[kept] = values
          value = actual @ gram @ actual / 2 - target @ actual
          if value < best:
            best, at = value, actual
  return at


def _family(num_models, seed, agreement):
  """Models whose own noise differs up to ten times; float32 numpy."""
  rng = np.random.default_rng(seed)

  def draw(shape):
    anchor = rng.normal(size=shape)
    individual = rng.normal(size=(num_models, *shape))
    individual *= rng.uniform(0.2, 2, size=(num_models,) + (1,) * len(shape))
    models = anchor + 0.1 * (agreement * rng.normal(size=shape) + individual)
    return anchor.astype(np.float32), models.astype(np.float32)

  leaves = {name: draw(shape) for name, shape in SHAPES.items()}
  anchor = {name: leaf for name, (leaf, _) in leaves.items()}
  models = [
    {name: leaf[i] for name, (_, leaf) in leaves.items()}
    for i in range(num_models)
  ]
  return anchor, models


def _steps(anchor, models, name):
  start = np.asarray(anchor[name], np.float64)
  return np.stack([np.asarray(m[name], np.float64) - start for m in models])


def _check(got, coefficients, anchor, steps):
  """Compares one layer with the exhaustive minimum."""
  flat = steps.reshape(len(steps), -1)
  expected = _minimum(flat)
  np.testing.assert_allclose(coefficients, expected, atol=2e-5)
  merged = np.asarray(anchor, np.float64) + np.tensordot(expected, steps, 1)
  np.testing.assert_allclose(got, merged, rtol=1e-5, atol=1e-5)
  return expected


@pytest.mark.parametrize('form', ['list', 'stack', 'jit'])
@pytest.mark.parametrize('num_models', [2, 3, 8])
@pytest.mark.parametrize('agreement', [0.3, 1.0, 4.0])
def test_minimum(num_models, agreement, form):
  anchor, models = _family(num_models, num_models, agreement)
  given = models if form == 'list' else ms.stack(models)

  def merge(anchor, given):
    return ms.yoyo_scale(anchor, given, stacked=form != 'list')

  got = (jax.jit(merge) if form == 'jit' else merge)(anchor, given)
  for name in SHAPES:
    coefficients = np.asarray(got.coefficients[name])
    assert coefficients.shape == (num_models,)
    assert coefficients.min() >= 0
    assert coefficients.sum() <= 1 + 1e-6
    steps = _steps(anchor, models, name)
    _check(got.params[name], coefficients, anchor[name], steps)


def test_constraints_bind_somewhere():
  # that the cases above hold a minimum inside, on a side and on the face
  kinds = set()
  for num_models, agreement in itertools.product((3, 5), (0.3, 1.0, 4.0)):
    anchor, models = _family(num_models, num_models, agreement)
    for name in SHAPES:
      steps = _steps(anchor, models, name).reshape(num_models, -1)
      actual = _minimum(steps)
      kinds.add((actual.min() == 0, actual.sum() > 1 - 1e-9))
  assert {(False, False), (True, False)} <= kinds
  assert any(face for _, face in kinds)


def _symmetric(num_models, cosine):
  """Displacements of norm 1 and one pairwise cosine: [N, N + 1]."""
  common = np.sqrt(cosine) * np.ones((num_models, 1))
  return np.hstack([common, np.sqrt(1 - cosine) * np.eye(num_models)])


@pytest.mark.parametrize('cosine', [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize('num_models', [2, 3, 4, 7])
def test_model_stock_for_equal_norms_and_angles(num_models, cosine):
  steps = _symmetric(num_models, cosine)
  anchor = np.float32(np.linspace(-1, 1, num_models + 1))
  models = [np.float32(anchor + step) for step in steps]
  got = ms.yoyo_scale(anchor, models)
  ratio = num_models * cosine / (1 + (num_models - 1) * cosine)
  np.testing.assert_allclose(got.coefficients, ratio / num_models, atol=5e-5)
  np.testing.assert_allclose(
    got.params, ms.model_stock(anchor, models).params, atol=1e-4
  )


def test_less_noise_more_weight():
  # mu - w_0 = e_0, noise s_i e_i: G = 1 + diag(s_i^2), b = 1, so that
  # lambda_i is proportional to 1 / s_i^2
  sizes = np.array([1.0, 2.0, 4.0])
  models = [np.float32([1, *(s * np.eye(3)[i])]) for i, s in enumerate(sizes)]
  got = np.asarray(ms.yoyo_scale(np.zeros(4, np.float32), models).coefficients)
  shares = sizes**-2 / (1 + np.sum(sizes**-2))  # Sherman and Morrison
  np.testing.assert_allclose(got, shares, rtol=1e-4)


def test_limits():
  anchor = {'w': jnp.array([1.0, 2.0])}
  moved = {'w': jnp.array([2.0, 4.0])}
  still = ms.yoyo_scale(anchor, [anchor, anchor])
  assert still.params['w'].tolist() == [1.0, 2.0]
  assert still.coefficients['w'].tolist() == [0.0, 0.0]
  one = ms.yoyo_scale(anchor, [anchor, moved])
  assert one.params['w'].tolist() == [1.0, 2.0]
  same = ms.yoyo_scale(anchor, [moved, moved, moved])
  np.testing.assert_allclose(same.params['w'], moved['w'], rtol=1e-6)
  opposite = ms.yoyo_scale(anchor, [moved, {'w': jnp.array([0.0, 0.0])}])
  np.testing.assert_allclose(opposite.params['w'], anchor['w'], atol=1e-6)


@pytest.mark.parametrize('scale', [1e-12, 1e12])
def test_scale_is_free(scale):
  steps = np.float32([[1, 1, 0], [1, 0, 3]])
  models = [jnp.asarray(scale * step, jnp.float32) for step in steps]
  got = ms.yoyo_scale(jnp.zeros(3), models)
  # G = [[2, 1], [1, 10]], b = (1, 1): lambda = (9, 1) / 19
  np.testing.assert_allclose(got.coefficients, [9 / 19, 1 / 19], rtol=1e-5)


def test_groups_filters_and_separate_layers():
  anchor, models = _family(3, 0, 1.0)
  steps = {name: _steps(anchor, models, name) for name in SHAPES}
  options = {
    'layers': lambda path, leaf: ms.Layer(
      group='dense' if path != 'scan' else None,
      axes=(0,) if path == 'scan' else (),
    )
  }
  got = ms.yoyo_scale(anchor, models, **options)
  both = [steps[n].reshape(3, -1) for n in ('kernel', 'bias')]
  expected = _minimum(np.hstack(both))
  for name in ('kernel', 'bias'):
    np.testing.assert_allclose(got.coefficients[name], expected, atol=2e-5)
  for i in range(3):
    _check(
      got.params['scan'][i],
      got.coefficients['scan'][i],
      anchor['scan'][i],
      steps['scan'][:, i],
    )
  filters = ms.yoyo_scale(anchor, models, unit='filter')
  for i in range(8):
    _check(
      filters.params['kernel'][:, i],
      filters.coefficients['kernel'][i],
      anchor['kernel'][:, i],
      steps['kernel'][..., i],
    )


def test_dtypes_and_counters():
  anchor = {'n': jnp.int32(3), 'w': jnp.zeros(2, jnp.bfloat16)}
  models = [
    {'n': jnp.int32(3), 'w': jnp.asarray(v, jnp.bfloat16)}
    for v in ([1.0, 0.0], [1.0, 1.0])
  ]
  got = ms.yoyo_scale(anchor, ms.stack(models), stacked=True)
  assert got.params['w'].dtype == jnp.bfloat16
  assert got.coefficients['w'].dtype == jnp.float32
  assert got.params['n'] == 3
  assert got.coefficients['n'] is None


def test_nan_stays_in_its_layer():
  anchor = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
  models = [
    {'a': jnp.array([jnp.nan, 1.0]), 'b': jnp.ones(2)},
    {'a': jnp.ones(2), 'b': jnp.ones(2)},
  ]
  got = ms.yoyo_scale(anchor, models)
  assert np.all(np.isnan(got.params['a']))
  np.testing.assert_allclose(got.params['b'], 1, rtol=1e-6)


def test_nothing_is_gathered(make_family):
  auto = (js.AxisType.Auto,)
  mesh = js.Mesh(np.array(jax.devices()), ('data',), axis_types=auto)
  cut = js.NamedSharding(mesh, js.PartitionSpec('data'))
  anchor, models = jax.device_put(make_family({'w': (64, 6)}, 3), cut)
  merge = jax.jit(lambda w0, ws: ms.yoyo_scale(w0, ws).params)
  text = merge.lower(anchor, models).compile().as_text()
  assert 'all-reduce' in text
  assert not any(op in text for op in ('all-gather', 'all-to-all'))
  expected = ms.yoyo_scale(*jax.device_get((anchor, models))).params
  np.testing.assert_allclose(
    merge(anchor, models)['w'], expected['w'], rtol=1e-5, atol=1e-6
  )


def test_bad_input():
  anchor = {'w': jnp.zeros(2)}
  with pytest.raises(ValueError, match='at least 2'):
    ms.yoyo_scale(anchor, [anchor])
  with pytest.raises(ValueError, match=r"unit.*'row'"):
    ms.yoyo_scale(anchor, [anchor, anchor], unit='row')
  with pytest.raises(ValueError, match='w: the anchor has float32'):
    ms.yoyo_scale(anchor, [anchor, {'w': jnp.zeros(3)}])
