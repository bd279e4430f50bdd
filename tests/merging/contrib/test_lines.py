import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

BLOCKS = 4
SHAPES = {
  'embedding': (5, 3),
  **{f'block_{i}': (3, 4) for i in range(BLOCKS)},
  'head': (),
}


def _block(path, leaf):
  del leaf
  return int(path[-1]) if path.startswith('block') else None


def _formula(anchor, model, alpha, beta, outside):
  """lambda = alpha + beta l / (L - 1), in float64."""
  expected = {}
  for name in SHAPES:
    w0, w1 = (np.asarray(x[name], np.float64) for x in (anchor, model))
    block = _block(name, None)
    scale = outside if block is None else alpha + beta * block / (BLOCKS - 1)
    expected[name] = w0 + scale * (w1 - w0)
  return expected


def _close(got, expected):
  for name in SHAPES:
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ('alpha', 'beta'), [(0.0, 1.0), (0.3, 0.7), (0.5, 0.0), (1.0, 0.5)]
)
def test_formula(make_family, alpha, beta):
  anchor, (model, _) = make_family(SHAPES)
  got = ms.lines(anchor, model, _block, alpha=alpha, beta=beta)
  _close(got, _formula(anchor, model, alpha, beta, outside=alpha))


def test_defaults_keep_the_first_block_and_return_the_last(make_family):
  anchor, (model, _) = make_family(SHAPES)
  got = ms.lines(anchor, model, _block)
  for name in ('embedding', 'block_0', 'head'):
    np.testing.assert_array_equal(got[name], anchor[name])
  np.testing.assert_array_equal(got['block_3'], model['block_3'])


@pytest.mark.parametrize('alpha', [0.0, 0.4, 1.0])
def test_without_beta_it_is_wise_ft(make_family, alpha):
  anchor, (model, _) = make_family(SHAPES)
  got = ms.lines(anchor, model, _block, alpha=alpha, beta=0.0)
  _close(got, ms.wise_ft(anchor, model, alpha=alpha))


def test_a_head_may_count_as_the_last_block(make_family):
  anchor, (model, _) = make_family(SHAPES)

  def depth(path, leaf):
    return BLOCKS - 1 if path == 'head' else _block(path, leaf)

  got = ms.lines(anchor, model, depth)
  np.testing.assert_array_equal(got['head'], model['head'])


def test_linear_in_depth_and_in_the_displacement(make_family):
  # second differences over blocks of one displacement are 0
  anchor = {f'block_{i}': jnp.zeros(3) for i in range(BLOCKS)}
  model = {f'block_{i}': jnp.array([1.0, -2.0, 4.0]) for i in range(BLOCKS)}
  got = np.stack(
    list(ms.lines(anchor, model, _block, alpha=0.25, beta=0.5).values())
  )
  np.testing.assert_allclose(np.diff(got, n=2, axis=0), 0, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_dtypes_of_the_anchor_and_counters_of_the_model(dtype):
  anchor = {'block_0': jnp.zeros(1, dtype), 'block_1': jnp.zeros(1, dtype)}
  model = {'block_0': jnp.ones(1, dtype), 'block_1': jnp.ones(1, dtype)}
  anchor['n'], model['n'] = jnp.int32(1), jnp.int32(2)
  got = ms.lines(anchor, model, _block, alpha=0.5, beta=0.25)
  assert (got['block_0'].dtype, got['n']) == (dtype, 2)
  assert [float(got[f'block_{i}'][0]) for i in range(2)] == [0.5, 0.75]


def test_alpha_sweeps_under_vmap(make_family):
  anchor, (model, _) = make_family(SHAPES)
  alphas = jnp.array([0.0, 0.5])
  got = jax.vmap(
    lambda alpha: ms.lines(anchor, model, _block, alpha=alpha, beta=1 - alpha)
  )(alphas)
  for i, alpha in enumerate([0.0, 0.5]):
    expected = _formula(anchor, model, alpha, 1 - alpha, outside=alpha)
    _close(jax.tree.map(lambda x, i=i: x[i], got), expected)


@pytest.mark.parametrize(
  ('depth', 'match'),
  [
    (lambda path, leaf: None, r'at least 2 blocks are needed[\s\S]*head: None'),
    (lambda path, leaf: 0, r'at least 2 blocks[\s\S]*block_0: 0'),
    (lambda path, leaf: 0.5, r'depth: must return[\s\S]*block_0: 0.5'),
    (lambda path, leaf: -1, 'head: -1'),
  ],
)
def test_bad_depths(make_family, depth, match):
  anchor, (model, _) = make_family(SHAPES)
  with pytest.raises(ValueError, match=match):
    ms.lines(anchor, model, depth)


def test_names_what_differs():
  with pytest.raises(ValueError, match=r'w: the anchor has float32\[1\]'):
    ms.lines({'w': jnp.zeros(1)}, {'w': jnp.zeros(2)}, _block)
