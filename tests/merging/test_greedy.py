from collections.abc import Sequence

import jax
from jax import numpy as jnp
from jax import sharding as js
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (3, 4), 'bias': (4,), 'scale': ()}


def _recipe(models, score):
  """Recipe 1 of the paper in float64, on vectors: (members, soup)."""
  individual = [score(model) for model in models]
  order = sorted(range(len(models)), key=lambda i: individual[i], reverse=True)
  members = []
  for i in order:
    mixed = np.mean([models[j] for j in [*members, i]], axis=0)
    old = np.mean([models[j] for j in members], axis=0) if members else None
    if old is None or score(mixed) >= score(old):
      members.append(i)
  return members, np.mean([models[j] for j in members], axis=0)


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('seed', range(1, 7))
def test_recipe(seed, stacked):
  rng = np.random.default_rng(seed)
  vectors = rng.normal(size=(9, 5)).astype(np.float32)
  goal = rng.normal(size=5)

  def score(vector):
    return -float(np.sum((np.asarray(vector, np.float64) - goal) ** 2))

  members, expected = _recipe(vectors.astype(np.float64), score)
  models = [{'w': jnp.asarray(v)} for v in vectors]
  soup = ms.greedy_soup(
    ms.stack(models) if stacked else models,
    lambda params: score(params['w']),
    stacked=stacked,
  )
  assert 1 < len(members) < 9, 'a case that decides nothing'
  assert soup.members == tuple(members)
  np.testing.assert_allclose(soup.params['w'], expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(soup.scores, [score(v) for v in vectors])
  assert soup.score == score(soup.params['w'])
  assert soup.score >= max(soup.scores)


def test_members_average_as_in_a_uniform_soup(make_family):
  _, models = make_family(SHAPES, 4)
  soup = ms.greedy_soup(models, lambda params: 0.0)
  assert soup.members == (0, 1, 2, 3)
  expected = ms.uniform_soup(models)
  for name in SHAPES:
    np.testing.assert_allclose(soup.params[name], expected[name], rtol=2e-7)


def test_of_equal_scores_the_earlier_comes_first_and_all_join():
  models = [{'w': jnp.array([x])} for x in (4.0, 1.0, 2.0)]
  soup = ms.greedy_soup(models, lambda params: float(params['w'][0] < 3))
  # 1 and 2 score 1, 4 scores 0; (1 + 2) / 2 scores 1; with 4 still 7/3 < 3
  assert soup.members == (1, 2, 0)
  assert soup.scores == (0.0, 1.0, 1.0)


def test_a_model_left_out_does_not_end_the_search():
  models = [{'w': jnp.array([x])} for x in (0.0, 0.5, -0.6)]
  soup = ms.greedy_soup(models, lambda params: -abs(params['w'][0] + 0.1))
  # 0 first (0.1 away); 0.25 is further; -0.3 is too
  assert soup.members == (0,)
  models = [{'w': jnp.array([x])} for x in (0.2, 0.3, -0.6)]
  soup = ms.greedy_soup(models, lambda params: -abs(params['w'][0] + 0.15))
  # 0.2 (0.35), with 0.3 0.25 (0.4: out), with -0.6 -0.2 (0.05: in)
  assert soup.members == (0, 2)


def test_one_model_is_its_soup():
  model = {'n': jnp.int32(3), 'w': jnp.asarray([0.1], jnp.bfloat16)}
  soup = ms.greedy_soup([model], lambda params: 0.5)
  assert (soup.members, soup.scores, soup.score) == ((0,), (0.5,), 0.5)
  assert soup.params['w'] == model['w']
  assert soup.params['w'].dtype == jnp.bfloat16
  assert soup.params['n'] == 3


def test_half_precision_sums_in_float32():
  # 256 + 1 is not a bfloat16: summed in it, 256 + 1 + 1 would stay 256
  values = [256.0, 1.0, 1.0]
  models = [{'w': jnp.asarray([v], jnp.bfloat16)} for v in values]
  soup = ms.greedy_soup(models, lambda params: 0.0)
  assert soup.params['w'] == jnp.asarray(86.0, jnp.bfloat16)


class _Files(Sequence):
  """Models made when asked for; counts what lives."""

  def __init__(self, values):
    self.values = values
    self.reads = 0

  def __len__(self):
    return len(self.values)

  def __getitem__(self, i):
    self.reads += 1
    return {'w': jnp.array([self.values[i]])}


def test_models_may_be_read_when_needed():
  models = _Files([3.0, 1.0, 2.0])
  calls = []

  def score(params):
    calls.append(None)
    return float(params['w'][0])

  assert ms.greedy_soup(models, score).members == (0,)
  assert models.reads == 9  # looked at, scored, added
  assert len(calls) == 5  # 3 alone and 2 averages


def test_models_with_different_heads():
  models = [
    {'head': jnp.zeros((2, n)), 'bias': jnp.zeros(n)} for n in (3, 3, 5, 4)
  ]
  with pytest.raises(ValueError, match='4 places') as error:
    ms.greedy_soup(models, lambda params: 0.0)
  text = str(error.value)
  assert 'head: model 0 has float32[2, 3], model 2 has float32[2, 5]' in text
  assert 'bias: model 0 has float32[3], model 3 has float32[4]' in text
  assert 'the same head' in text


def test_scores_that_are_not_finite():
  models = [{'w': jnp.array([float(x)])} for x in range(4)]
  values = [0.5, np.nan, 0.7, np.inf]
  with pytest.raises(ValueError, match='nan for model 1, must be one finite'):
    ms.greedy_soup(models, lambda params: values[int(params['w'][0])])


def test_a_model_that_diverged_is_left_out():
  models = [{'w': jnp.array([x])} for x in (jnp.nan, 1.0, 2.0)]

  def accuracy(params):
    return float(jnp.mean(params['w'] > 0))

  assert ms.greedy_soup(models, accuracy).members == (1, 2)


def test_empty_held_out_split():
  models = [{'w': jnp.ones(1)}] * 2
  with pytest.raises(ValueError, match='held-out split empty'):
    ms.greedy_soup(models, lambda params: float('nan'))


def test_average_without_a_score():
  models = [{'w': jnp.array([x])} for x in (0.0, 2.0)]
  with pytest.raises(ValueError, match=r'nan for the average of models \[0, 1'):
    ms.greedy_soup(
      models, lambda params: np.nan if params['w'][0] == 1 else 0.0
    )


@pytest.mark.parametrize('models', [[], {'w': jnp.ones((2, 2))}, 'models'])
def test_no_models(models):
  with pytest.raises(ValueError, match='models'):
    ms.greedy_soup(models, lambda params: 0.0)


def test_counters_must_agree():
  models = [{'n': jnp.int32(n), 'w': jnp.ones(1)} for n in (1, 2)]
  with pytest.raises(ValueError, match='the models disagree'):
    ms.greedy_soup(models, lambda params: 0.0)


def test_on_shards():
  auto = (js.AxisType.Auto,)
  mesh = js.Mesh(np.array(jax.devices()), ('data',), axis_types=auto)
  shards = js.NamedSharding(mesh, js.PartitionSpec('data'))
  models = [
    {'w': jax.device_put(jnp.full(16, x), shards)} for x in (1.0, 2.0, 9.0)
  ]
  soup = ms.greedy_soup(models, lambda params: -float(params['w'][0]))
  assert soup.members == (0,)
  assert soup.params['w'].sharding.is_equivalent_to(shards, 1)
