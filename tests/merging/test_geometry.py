import itertools
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax.merging import geometry

# reference values of t = N cos / (1 + (N - 1) cos), to three digits
RATIOS = {
  30: (0.866, 0.928, 0.951, 0.963),
  45: (0.707, 0.828, 0.879, 0.906),
  60: (0.5, 0.667, 0.75, 0.8),
  78: (0.208, 0.344, 0.441, 0.512),
}


@pytest.mark.parametrize('degrees', RATIOS)
@pytest.mark.parametrize('num_models', [1, 2, 3, 4])
def test_ratio_table(degrees, num_models):
  ratio = geometry.interpolation_ratio(np.cos(np.radians(degrees)), num_models)
  assert float(ratio) == pytest.approx(
    RATIOS[degrees][num_models - 1], abs=0.0005
  )


@pytest.mark.parametrize(
  ('num_models', 'cosine', 'mean_distance', 'merge_distance'),
  [(2, 0.524, 9.19, 7.62), (3, 0.515, 7.44, 6.49)],
)
def test_ratio_explains_the_distances_of_the_paper(
  num_models, cosine, mean_distance, merge_distance
):
  # |w_H - mu|^2 = t |mean - mu|^2, the ViT-B/32 ablation of the ECCV talk
  ratio = float(geometry.interpolation_ratio(cosine, num_models))
  assert ratio == pytest.approx(
    (merge_distance / mean_distance) ** 2, abs=0.001
  )


@pytest.mark.parametrize('num_models', [1, 2, 3, 7])
def test_ratio_is_exact_at_the_ends(num_models):
  ends = geometry.interpolation_ratio(jnp.array([0.0, 1.0]), num_models)
  assert ends.tolist() == [0.0, 1.0]


def test_ratio_of_one_model_is_the_cosine():
  cosines = jnp.linspace(-1.0, 1.0, 9)
  np.testing.assert_array_equal(
    geometry.interpolation_ratio(cosines, 1), cosines
  )


def test_ratio_is_not_clipped():
  # N = 2, cos = -1/2: t = -1 / (1/2)
  assert float(geometry.interpolation_ratio(-0.5, 2)) == -2.0


@pytest.mark.parametrize('num_models', [2, 3, 5])
def test_ratio_where_displacements_cancel(num_models):
  assert geometry.interpolation_ratio(-1 / (num_models - 1), num_models) == 0
  assert geometry.interpolation_ratio(-1.0, num_models) == 0


def test_ratio_takes_integers():
  assert float(geometry.interpolation_ratio(1, 2)) == 1.0


@pytest.mark.parametrize('num_models', [0, -1])
def test_ratio_needs_a_model(num_models):
  with pytest.raises(ValueError, match=f'num_models.*got {num_models}'):
    geometry.interpolation_ratio(0.5, num_models)


# axes kept and summed over in blocks: all, the last two, the last; and where
# they cannot be: no axis at the end, none that 64 divides, a prime number of 64
GRAMS = [
  ((16, 64, 96), ()),
  ((3, 64, 512), (0,)),
  ((2, 40, 1024), (0, 1)),
  ((64, 20, 64), (1,)),
  ((64, 20, 64), (2,)),
  ((64, 20, 64), (0, 1, 2)),
  ((3, 4, 5), ()),
  ((301, 301), ()),
  ((1031, 64), ()),
]


def _leaf(shape, num_models=3):
  rng = np.random.default_rng(0)
  anchor = rng.normal(size=shape).astype(np.float32)
  models = rng.normal(size=(num_models, *shape)).astype(np.float32)
  return anchor, models


@pytest.fixture
def one_device(monkeypatch):
  """Sums are taken in blocks where nothing can be cut over devices."""
  monkeypatch.setattr(jax, 'device_count', lambda: 1)


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize(('shape', 'keep'), GRAMS, ids=str)
def test_gram(shape, keep, devices, monkeypatch):
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  anchor, models = _leaf(shape)
  gram = geometry.gram(
    jnp.asarray(anchor),
    jnp.asarray(models),
    num_models=3,
    keep=keep,
  )
  steps = models.astype(np.float64) - anchor.astype(np.float64)
  others = tuple(axis for axis in range(len(shape)) if axis not in keep)
  lengths = np.sqrt(np.sum(steps**2, axis=tuple(axis + 1 for axis in others)))
  for i, j in itertools.product(range(3), repeat=2):
    expected = np.sum(steps[i] * steps[j], axis=others)
    assert gram[..., i, j].shape == expected.shape
    error = np.abs(gram[..., i, j] - expected)
    assert np.all(error <= 2e-6 * lengths[i] * lengths[j])


def _sums(anchor, models):
  gram = geometry.gram(anchor, models, num_models=2)
  return gram[jnp.triu_indices(2)]


def test_gram_of_blocks_under_vmap(monkeypatch):
  families = [_leaf((128, 512), 2), _leaf((128, 512), 3)]
  anchors = jnp.stack([anchor for anchor, _ in families])
  models = jnp.stack([models[:2] for _, models in families])
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 1)
    got = jax.jit(jax.vmap(_sums))(anchors, models)
  for row, anchor, column in zip(got, anchors, models, strict=True):
    expected = _sums(anchor, column)
    np.testing.assert_allclose(row, expected, rtol=1e-5)


@pytest.mark.usefixtures('one_device')
def test_gram_of_blocks_has_the_gradient():
  # of a d_1.d_1 + b d_1.d_2 + c d_2.d_2 by w_1: 2 a d_1 + b d_2
  anchor, models = _leaf((128, 512), 2)
  weights = jnp.array([1.0, 2.0, 3.0])
  gradient = jax.jit(
    jax.grad(lambda models: jnp.sum(weights * _sums(anchor, models)))
  )(jnp.asarray(models))
  d1, d2 = models - anchor
  np.testing.assert_allclose(gradient[0], 2 * d1 + 2 * d2, atol=1e-5)
  np.testing.assert_allclose(gradient[1], 2 * d1 + 6 * d2, atol=1e-5)


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_blocks_are_for_cpus_whatever_traces(platform):
  # a reduction of several operands gathers what is sharded: never elsewhere
  anchor, models = _leaf((128, 512), 2)
  program = jax.jit(_sums).trace(anchor, models)
  text = program.lower(lowering_platforms=(platform,)).as_text()
  assert ('32x8xf32' in text) == (platform == 'cpu')


@pytest.mark.usefixtures('one_device')
def test_blocks_are_chosen_when_compiling():
  program = jax.jit(_sums).lower(*_leaf((128, 512), 2)).compile()
  assert 'conditional' not in program.as_text()


@pytest.mark.usefixtures('one_device')
def test_models_of_a_bfloat16_stack_are_not_rounded_again():
  # XLA's CPU backend slices in float32, and would turn slices back at once
  anchor, models = _leaf((128, 512), 2)
  stack = jnp.asarray(models, jnp.bfloat16)
  text = jax.jit(_sums).lower(jnp.bfloat16(anchor), stack).compile().as_text()
  assert not re.findall(r'= bf16\S* convert\(', text)


def _gram_of(vectors):
  vectors = np.stack(vectors)
  return jnp.float32(vectors @ vectors.T)


@pytest.mark.parametrize(
  ('average', 'cosine', 'ratio'),
  # (.76604 + .5 + .17365) / 3 = .47990, and the mean angle is 60 degrees
  [('cosine', 0.4799, 0.7346), ('angle', 0.5, 0.75)],
)
def test_mean_of_cosines_is_not_the_cosine_of_the_mean_angle(
  average, cosine, ratio
):
  c40, c60, c80 = np.cos(np.radians([40, 60, 80]))
  vectors = np.linalg.cholesky([[1, c40, c60], [c40, 1, c80], [c60, c80, 1]])
  got = geometry.mean_cosine(
    _gram_of(vectors * [[0.1], [3.0], [20.0]]), average
  )
  assert float(got) == pytest.approx(cosine, abs=1e-5)
  assert float(geometry.interpolation_ratio(got, 3)) == pytest.approx(
    ratio, abs=5e-5
  )


@pytest.mark.parametrize('average', ['cosine', 'angle'])
def test_zero_displacement_counts_as_orthogonal(average):
  vectors = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
  got = geometry.mean_cosine(_gram_of(vectors), average)
  # pairs: 0, 0 and 1; angles: 90, 90 and 0 degrees
  expected = {'cosine': 1 / 3, 'angle': 0.5}[average]
  assert float(got) == pytest.approx(expected, abs=1e-6)


def test_same_vector_has_cosine_exactly_one():
  vector = np.random.default_rng(0).normal(size=1000) * 1e-6
  got = geometry.mean_cosine(_gram_of([vector] * 3), 'cosine')
  assert float(got) == 1.0


def test_short_displacements_do_not_underflow():
  # the product of the squared norms is 1e-48, far below float32
  vectors = 1e-12 * np.array([[1.0, 0.0], [1.0, 1.0]])
  got = geometry.mean_cosine(_gram_of(vectors), 'cosine')
  assert float(got) == pytest.approx(0.5**0.5, rel=1e-6)
