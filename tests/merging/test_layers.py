import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (6, 8), 'bias': (8,), 'scale': (), 'scan': (3, 4, 5)}


def _steps(anchor, models, name):
  """Displacements of one leaf in float64: [N, ...]."""
  start = np.asarray(anchor[name], np.float64)
  return np.stack([np.asarray(m[name], np.float64) - start for m in models])


def _gram(steps):
  flat = steps.reshape(len(steps), -1)
  return flat @ flat.T


def _close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('form', ['list', 'stack', 'jit'])
@pytest.mark.parametrize('num_models', [2, 3, 9])
def test_each_leaf_is_a_layer(make_family, num_models, form):
  anchor, models = make_family(SHAPES, num_models)
  given = models if form == 'list' else ms.stack(models)

  def measure(anchor, given):
    return ms.displacement_gram(anchor, given, stacked=form != 'list')

  got = (jax.jit(measure) if form == 'jit' else measure)(anchor, given)
  for name in SHAPES:
    assert got[name].shape == (num_models, num_models)
    assert got[name].dtype == jnp.float32
    _close(got[name], _gram(_steps(anchor, models, name)))


@pytest.mark.parametrize('num_models', [3, 7])
def test_groups_share_their_sum(make_family, num_models):
  anchor, models = make_family(SHAPES, num_models)
  got = ms.displacement_gram(
    anchor,
    models,
    layers=lambda path, leaf: ms.Layer(
      group='dense' if path in ('kernel', 'bias') else None
    ),
  )
  expected = sum(
    _gram(_steps(anchor, models, name)) for name in ('kernel', 'bias')
  )
  _close(got['kernel'], expected)
  np.testing.assert_array_equal(got['kernel'], got['bias'])
  _close(got['scan'], _gram(_steps(anchor, models, 'scan')))


@pytest.mark.parametrize('num_models', [2, 6])
def test_separate_layers_lead(make_family, num_models):
  anchor, models = make_family(SHAPES, num_models)
  got = ms.displacement_gram(
    anchor,
    models,
    layers=lambda path, leaf: ms.Layer(axes=(0,)) if path == 'scan' else None,
  )
  steps = _steps(anchor, models, 'scan')
  assert got['scan'].shape == (3, num_models, num_models)
  for i in range(3):
    _close(got['scan'][i], _gram(steps[:, i]))


def test_filters_and_the_complete_model(make_family):
  anchor, models = make_family(SHAPES, 3)
  filters = ms.displacement_gram(anchor, models, unit='filter')
  steps = _steps(anchor, models, 'kernel')
  assert filters['kernel'].shape == (8, 3, 3)
  for i in range(8):
    _close(filters['kernel'][i], _gram(steps[..., i]))
  complete = ms.displacement_gram(anchor, models, unit='model')
  expected = sum(_gram(_steps(anchor, models, name)) for name in SHAPES)
  for name in SHAPES:
    _close(complete[name], expected)


@pytest.mark.parametrize('num_models', [4, 6])
def test_it_holds_the_cosines_of_the_merge(make_family, num_models):
  # the definition: the mean of G_ij / sqrt(G_ii G_jj) over i < j
  anchor, models = make_family(SHAPES, num_models)
  gram = ms.displacement_gram(anchor, models)
  cosine = ms.model_stock(anchor, models).cosine
  upper = np.triu_indices(num_models, 1)
  for name in SHAPES:
    norms = np.sqrt(np.diagonal(gram[name]))
    cosines = np.asarray(gram[name]) / np.outer(norms, norms)
    _close(cosine[name], np.mean(cosines[upper]))


def test_half_precision_is_measured_wider():
  # 256 + 1 is not a bfloat16, its square sums in float32 are exact
  anchor = {'w': jnp.zeros(257, jnp.bfloat16)}
  models = [{'w': jnp.ones(257, jnp.bfloat16)}] * 2
  gram = ms.displacement_gram(anchor, models)['w']
  assert gram.dtype == jnp.float32
  assert gram.tolist() == [[257, 257], [257, 257]]


def test_float64_is_measured_in_float64(x64):
  anchor = {'w': jnp.zeros(2, jnp.float64)}
  models = [{'w': jnp.full(2, 1 + 2.0**-40)}, {'w': jnp.ones(2)}]
  gram = ms.displacement_gram(anchor, models)['w']
  assert gram[0, 1] == 2 * (1 + 2.0**-40)


def test_what_cannot_be_measured_is_none():
  anchor = {'n': jnp.int32(3), 'w': jnp.zeros(2)}
  model = {'n': jnp.int32(3), 'w': jnp.ones(2)}
  assert ms.displacement_gram(anchor, [model, model])['n'] is None


@pytest.mark.parametrize(
  ('models', 'options', 'match'),
  [
    ([{'w': np.ones(2, np.float32)}], {}, 'at least 2'),
    ([{'w': np.ones(3, np.float32)}] * 2, {}, r'w: .*\[2\].*\[3\]'),
    ([{'w': np.ones(2, np.float32)}] * 2, {'unit': 'row'}, "unit.*'row'"),
  ],
)
def test_bad_input(models, options, match):
  with pytest.raises(ValueError, match=match):
    ms.displacement_gram({'w': np.zeros(2, np.float32)}, models, **options)
