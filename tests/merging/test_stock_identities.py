"""The geometry behind the formula: a thin shell of fine-tuned weights.

With mu the centre of all fine-tuned weights, w_i - mu and w_0 - mu are
orthogonal to each other and |w_i - mu| is constant. Then every displacement
has the norm l and every pair of them the cosine c, and with
|mu - w_0|^2 = l^2 c and |w_i - mu|^2 = l^2 (1 - c) the rest follows.
"""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

DIMENSION = 60
LENGTH = 0.7

SHELLS = pytest.mark.parametrize(
  ('num_models', 'degrees'),
  [(2, 60), (2, 30), (3, 45), (4, 78), (6, 60)],
)
pytestmark = pytest.mark.usefixtures('x64')


def _shell(num_models, degrees, seed=0):
  """(w_0, w_1 .. w_N, mu) with exactly the assumed Gram matrix, float64."""
  rng = np.random.default_rng(seed)
  c = np.cos(np.radians(degrees))
  axes = np.linalg.qr(rng.normal(size=(DIMENSION, num_models + 1)))[0].T
  anchor = rng.normal(size=DIMENSION)
  center = anchor + LENGTH * c**0.5 * axes[0]
  models = center + LENGTH * (1 - c) ** 0.5 * axes[1:]
  return anchor, models, center, c


@SHELLS
def test_cosine_and_ratio(num_models, degrees):
  anchor, models, _, c = _shell(num_models, degrees)
  merged = ms.model_stock(anchor, models, stacked=True)
  t = num_models * c / (1 + (num_models - 1) * c)
  np.testing.assert_allclose(merged.cosine, c, rtol=1e-12)
  np.testing.assert_allclose(merged.ratio, t, rtol=1e-12)


@SHELLS
def test_distances_to_the_center(num_models, degrees):
  anchor, models, center, c = _shell(num_models, degrees)
  merged = ms.model_stock(anchor, models, stacked=True)
  soup = ms.uniform_soup(models, stacked=True)

  def square(x):
    return np.sum(np.asarray(x - center) ** 2)

  np.testing.assert_allclose(square(anchor), LENGTH**2 * c)
  for model in models:
    np.testing.assert_allclose(square(model), LENGTH**2 * (1 - c))
  mean = LENGTH**2 * (1 - c) / num_models
  np.testing.assert_allclose(square(soup), mean, rtol=1e-10)
  t = num_models * c / (1 + (num_models - 1) * c)
  np.testing.assert_allclose(square(merged.params), t * mean, rtol=1e-10)


@SHELLS
def test_merge_is_the_foot_of_the_perpendicular(num_models, degrees):
  anchor, models, center, _ = _shell(num_models, degrees)
  merged = np.asarray(ms.model_stock(anchor, models, stacked=True).params)
  steps = models - anchor
  np.testing.assert_allclose(steps @ (center - merged), 0, atol=1e-12)
  # and the closest point by least squares, an independent way to find it
  weights = np.linalg.lstsq(steps.T, center - anchor)[0]
  np.testing.assert_allclose(merged, anchor + weights @ steps, rtol=1e-10)


@SHELLS
def test_merge_is_the_orthocenter(num_models, degrees):
  anchor, models, _, _ = _shell(num_models, degrees)
  merged = np.asarray(ms.model_stock(anchor, models, stacked=True).params)
  products = (models - merged) @ (models - anchor).T
  apart = ~np.eye(num_models, dtype=bool)
  np.testing.assert_allclose(products[apart], 0, atol=1e-12)


def test_orthocenter_needs_equal_norms_only():
  # no centre, no shell: any two displacements of one length
  rng = np.random.default_rng(1)
  anchor = rng.normal(size=DIMENSION)
  steps = rng.normal(size=(2, DIMENSION))
  steps /= np.linalg.norm(steps, axis=1, keepdims=True)
  models = anchor + steps
  merged = ms.model_stock(anchor, models, stacked=True, clip=False)
  foot = np.asarray(merged.params)
  for i, j in ((0, 1), (1, 0)):
    assert (models[i] - foot) @ steps[j] == pytest.approx(0, abs=1e-12)


def test_unequal_angles_of_three_models():
  # 40, 60 and 80 degrees: t = .7346 from the mean of the cosines (the
  # authors), .7500 from the mean of the angles
  c40, c60, c80 = np.cos(np.radians([40, 60, 80]))
  steps = np.linalg.cholesky([[1, c40, c60], [c40, 1, c80], [c60, c80, 1]])
  anchor = np.array([3.0, -1.0, 0.5])
  for average, expected in (('cosine', 0.7346), ('angle', 0.75)):
    merged = ms.model_stock(
      anchor, anchor + steps, stacked=True, average=average
    )
    assert float(merged.ratio) == pytest.approx(expected, abs=5e-5)
    np.testing.assert_allclose(
      merged.params, anchor + float(merged.ratio) * steps.mean(axis=0)
    )


# Laws, on integer weights: their sums are exact, so that only what the law
# is about can differ.

VECTORS = st.integers(2, 4).flatmap(
  lambda num_models: st.lists(
    st.lists(st.integers(-8, 8), min_size=6, max_size=6),
    min_size=num_models + 1,
    max_size=num_models + 1,
  )
)


def _settings(test):
  return hypothesis.settings(
    deadline=None, max_examples=30, derandomize=True, database=None
  )(test)


def _close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def _family(vectors):
  anchor, *models = np.array(vectors, np.float64)
  return anchor, np.array(models)


def _merge(anchor, models, **options):
  return ms.model_stock(anchor, models, stacked=True, **options)


@hypothesis.given(VECTORS, st.randoms(use_true_random=False))
@_settings
def test_order_of_the_models_is_nothing(vectors, random):
  anchor, models = _family(vectors)
  order = list(range(len(models)))
  random.shuffle(order)
  merged, other = _merge(anchor, models), _merge(anchor, models[order])
  _close(other.cosine, merged.cosine)
  _close(other.params, merged.params)


@hypothesis.given(VECTORS, st.integers(-60, 60))
@_settings
def test_size_of_the_steps_is_nothing(vectors, exponent):
  # the anchor is 0 and the scale a power of two: no step is rounded
  _, models = _family(vectors)
  scale = 2.0**exponent
  merged = _merge(np.zeros(6), models)
  scaled = _merge(np.zeros(6), models * scale)
  _close(scaled.cosine, merged.cosine)
  _close(scaled.params / scale, merged.params)


@hypothesis.given(VECTORS, st.lists(st.integers(1, 9), min_size=4, max_size=4))
@_settings
def test_length_of_each_step_is_nothing_to_the_cosine(vectors, lengths):
  anchor, models = _family(vectors)
  lengths = np.array(lengths[: len(models)], np.float64)[:, None]
  longer = anchor + lengths * (models - anchor)
  _close(_merge(anchor, longer).cosine, _merge(anchor, models).cosine)


@hypothesis.given(VECTORS, st.integers(0, 100))
@_settings
def test_rotations_pass_through(vectors, seed):
  anchor, models = _family(vectors)
  # a step of exactly zero does not survive the rounding of a rotation
  hypothesis.assume(np.all(np.any(models != anchor, axis=1)))
  normal = np.random.default_rng(seed).normal(size=(6, 6))
  rotation = np.linalg.qr(normal)[0]
  merged = _merge(anchor, models)
  turned = _merge(anchor @ rotation, models @ rotation)
  _close(turned.cosine, merged.cosine)
  _close(turned.params, np.asarray(merged.params) @ rotation)


@hypothesis.given(VECTORS, st.integers(-5, 5))
@_settings
def test_translations_pass_through(vectors, shift):
  anchor, models = _family(vectors)
  merged = _merge(anchor, models)
  moved = _merge(anchor + shift, models + shift)
  _close(moved.cosine, merged.cosine)
  _close(moved.params, merged.params + shift)


@hypothesis.given(VECTORS)
@_settings
def test_transposes_and_reshapes_pass_through(vectors):
  anchor, models = _family(vectors)
  merged = _merge(anchor, models)
  shaped = _merge(
    anchor.reshape(2, 3).T, models.reshape(-1, 2, 3).swapaxes(1, 2)
  )
  _close(shaped.cosine, merged.cosine)
  _close(shaped.params.T.ravel(), merged.params)


@hypothesis.given(VECTORS, st.booleans())
@_settings
def test_against_the_formula(merge_layer, vectors, filters):
  anchor, models = _family(vectors)
  if filters:
    anchor, models = anchor.reshape(3, 2), models.reshape(-1, 3, 2)
    merged = _merge(anchor, models, unit='filter')
    for j in range(2):
      params, cosine, _ = merge_layer(anchor[:, j], models[:, :, j])
      _close(merged.cosine[j], cosine)
      _close(merged.params[:, j], params)
  else:
    merged = _merge(anchor, models)
    params, cosine, _ = merge_layer(anchor, models)
    _close(merged.cosine, cosine)
    _close(merged.params, params)


@hypothesis.given(VECTORS)
@_settings
def test_clipped_merges_lie_between_anchor_and_mean(vectors):
  anchor, models = _family(vectors)
  merged = _merge(anchor, models)
  assert -1 <= float(merged.cosine) <= 1 + 1e-12
  assert 0 <= float(merged.ratio) <= 1
  assert np.all(jnp.isfinite(merged.params))


def test_one_model_twice_is_that_model(x64):
  anchor, models = _family([[1, 2, 3], [3, 1, 2]])
  merged = jax.tree.map(
    np.asarray, ms.model_stock(anchor, [models[0], models[0]])
  )
  _close(merged.ratio, 1)
  _close(merged.params, models[0])
