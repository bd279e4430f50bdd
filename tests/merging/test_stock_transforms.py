"""The merge under jit, vmap and grad."""

import functools
import itertools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (4, 5), 'bias': (5,)}


def _close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def _arrays(family):
  return jax.tree.map(jnp.asarray, family)


@pytest.mark.parametrize('stacked', [False, True])
def test_jit_is_eager(make_family, stacked):
  anchor, models = _arrays(make_family(SHAPES, 2))
  if stacked:
    models = ms.stack(models)
  merge = functools.partial(ms.model_stock, stacked=stacked, unit='filter')
  eager, jitted = merge(anchor, models), jax.jit(merge)(anchor, models)
  assert jax.tree.structure(eager) == jax.tree.structure(jitted)
  jax.tree.map(_close, jitted, eager)


def test_jit_compiles_once(make_family):
  traces = []

  @jax.jit
  def merge(anchor, models):
    traces.append(None)
    return ms.model_stock(anchor, models).params

  for seed in range(3):
    merge(*_arrays(make_family(SHAPES, 2, seed=seed)))
  assert len(traces) == 1


def test_jit_passes_on_counters(make_family):
  anchor, models = _arrays(make_family(SHAPES))
  key = jax.random.key(3)
  for tree in (anchor, *models):
    tree.update(count=jnp.int32(5), key=key)
  merged = jax.jit(
    lambda anchor, stack: ms.model_stock(anchor, stack, stacked=True).params
  )(anchor, ms.stack(models))
  assert merged['count'] == 5
  assert merged['key'] == key


def test_bad_trees_are_reported_while_tracing():
  with pytest.raises(ValueError, match='w: '):
    jax.jit(ms.model_stock)({'w': jnp.zeros(2)}, [{'w': jnp.zeros(3)}] * 2)


def test_vmap_over_families(make_family):
  families = [_arrays(make_family(SHAPES, 3, seed=seed)) for seed in range(4)]
  anchors = jax.tree.map(lambda *x: jnp.stack(x), *[a for a, _ in families])
  stacks = jax.tree.map(
    lambda *x: jnp.stack(x), *[ms.stack(models) for _, models in families]
  )
  merged = jax.vmap(lambda a, s: ms.model_stock(a, s, stacked=True))(
    anchors, stacks
  )
  for i, (anchor, models) in enumerate(families):
    one = ms.model_stock(anchor, models)
    jax.tree.map(lambda x, y, i=i: _close(x[i], y), merged, one)


def _derivative(function, tree, direction, step=1e-5):
  """Central difference of a scalar function along a direction."""

  def move(sign):
    return jax.tree.map(lambda x, d: x + sign * step * d, tree, direction)

  return float(function(move(1)) - function(move(-1))) / (2 * step)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'clip': False},
    {'average': 'angle'},
    {'unit': 'filter', 'strength': 0.7},
  ],
  ids=str,
)
def test_grad_against_finite_differences(x64, make_family, options):
  rng = np.random.default_rng(5)

  def noise(x):
    return jnp.asarray(rng.normal(size=np.shape(x)))

  family = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float64), make_family({'w': (4, 5)}, 3)
  )
  weights = jax.tree.map(noise, family[0])

  @jax.jit
  def loss(family):
    params = ms.model_stock(*family, **options).params
    return jnp.sum(weights['w'] * params['w'] ** 2)

  grads = jax.grad(loss)(family)
  for _ in range(3):
    direction = jax.tree.map(noise, family)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
    expected = _derivative(loss, family, direction)
    np.testing.assert_allclose(
      sum(jax.tree.leaves(products)), expected, rtol=1e-6
    )


@pytest.mark.parametrize('average', ['cosine', 'angle'])
@pytest.mark.parametrize('clip', [True, False])
def test_grad_is_finite(clip, average):
  w0 = jnp.array([1.0, 2.0, 3.0])
  step = jnp.array([0.5, -0.25, 1.0])
  anchor = dict.fromkeys(['unmoved', 'half', 'same', 'opposite'], w0)
  models = [
    {'unmoved': w0, 'half': w0, 'same': w0 + step, 'opposite': w0 + step},
    {
      'unmoved': w0,
      'half': w0 + step,
      'same': w0 + step,
      'opposite': w0 - step,
    },
  ]

  def loss(anchor, models):
    merged = ms.model_stock(anchor, models, clip=clip, average=average)
    return sum(jnp.sum(x**2) for x in merged.params.values())

  grads = jax.grad(loss, argnums=(0, 1))(anchor, models)
  for tree in (grads[0], *grads[1]):
    for name, grad in tree.items():
      assert np.all(jnp.isfinite(grad)), name


def test_grad_of_an_unmoved_layer_is_the_anchors():
  # w_H = w_0 there, and stays it to first order in each model
  anchor = jnp.array([1.0, 2.0, 3.0])
  grads = jax.grad(
    lambda anchor, models: jnp.sum(ms.model_stock(anchor, models).params ** 2),
    argnums=(0, 1),
  )(anchor, [anchor, anchor])
  _close(grads[0], 2 * anchor)
  for grad in grads[1]:
    _close(grad, jnp.zeros(3))


def test_jit_of_grad_of_vmap(make_family):
  family = _arrays(make_family(SHAPES, 2))
  many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), family)

  def loss(family):
    return sum(jnp.sum(x) for x in ms.model_stock(*family).params.values())

  grads = jax.jit(jax.vmap(jax.grad(loss)))(many)
  for i, scale in itertools.product(range(2), (1, 2)):
    if scale == i + 1:
      one = jax.grad(loss)(jax.tree.map(lambda x, s=scale: s * x, family))
      jax.tree.map(lambda x, y, i=i: _close(x[i], y), grads, one)
