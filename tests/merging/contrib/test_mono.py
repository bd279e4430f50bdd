import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms


def _edit(anchor, model):
  """MonoSoup of one matrix from its formulas, in float64: (w, low, k)."""
  anchor = np.asarray(anchor, np.float64)
  step = np.asarray(model, np.float64) - anchor
  u, values, v = np.linalg.svd(step, full_matrices=False)
  shares = values / values.sum()
  entropy = -np.sum(shares * np.log(shares))
  rank = min(int(np.ceil(np.exp(entropy))), len(values))
  captured = np.sum(values[:rank] ** 2) / np.sum(values**2)
  rho = (values[rank] / values[0]) ** 2 if rank < len(values) else 0.0
  low = rho + (1 - rho) * np.sqrt(max(1 - captured, 0))
  high = (u[:, :rank] * values[:rank]) @ v[:rank]
  return anchor + (1 - low) * high + low * (step - high), low, rank


def _pair(shape, *, seed=0, decay=0.4):
  """An anchor and a model whose displacement has values exp(-decay i)."""
  rng = np.random.default_rng(seed)
  rows, columns = shape
  count = min(shape)
  u = np.linalg.qr(rng.normal(size=(rows, count)))[0]
  v = np.linalg.qr(rng.normal(size=(columns, count)))[0]
  anchor = rng.normal(size=shape)
  step = (u * np.exp(-decay * np.arange(count))) @ v.T
  return np.float32(anchor), np.float32(anchor + step)


def _check(got, params, expected):
  matrix, low, rank = expected
  np.testing.assert_allclose(params, matrix, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(got[0], low, rtol=1e-4, atol=1e-6)
  assert int(got[1]) == rank


@pytest.mark.parametrize('shape', [(12, 9), (9, 12), (1, 7)])
@pytest.mark.parametrize('decay', [0.1, 0.4, 1.5])
def test_formula(shape, decay):
  anchor, model = _pair(shape, decay=decay)
  got = jax.jit(ms.mono_soup)(anchor, model)
  assert got.low.dtype == jnp.float32
  assert got.rank.dtype == jnp.int32
  _check((got.low, got.rank), got.params, _edit(anchor, model))


def test_a_matrix_and_its_transpose_are_edited_alike():
  anchor, model = _pair((12, 9))
  got = ms.mono_soup(anchor, model)
  turned = ms.mono_soup(anchor.T, model.T)
  np.testing.assert_allclose(turned.params.T, got.params, atol=2e-6)
  np.testing.assert_allclose(turned.low, got.low, rtol=1e-5)


def test_vectors_and_counters_are_the_models():
  anchor, model = _pair((6, 5))
  w0 = {'kernel': anchor, 'bias': np.zeros(5, np.float32), 'n': jnp.int32(1)}
  w1 = {'kernel': model, 'bias': np.ones(5, np.float32), 'n': jnp.int32(2)}
  got = ms.mono_soup(w0, w1)
  np.testing.assert_array_equal(got.params['bias'], w1['bias'])
  assert got.params['n'] == 2
  for name in ('bias', 'n'):
    assert got.low[name] is None
    assert got.rank[name] is None


def test_equal_singular_values_are_all_kept():
  # an effective rank of n: nothing is low
  step = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
  got = ms.mono_soup(jnp.zeros((8, 8)), jnp.float32(step))
  assert (int(got.rank), float(got.low)) == (8, 0.0)
  np.testing.assert_allclose(got.params, step, atol=1e-6)


def test_two_values_by_hand():
  # 1, 1/3, 1/3, 1/3: p = 1/2, 1/6 three times, H = log 2 / 2 + log 6 / 2,
  # so that exp(H) = sqrt(12) and k = 4 = the full rank; of 1 and 1/3 alone
  # p = 3/4, 1/4 and exp(H) = 1.7548, k = 2. Of 1, e, e with e = 1/98:
  # p = .98, .01, .01, exp(H) = 1.1185, k = 2, P = (1 + e^2) / (1 + 2 e^2),
  # rho = e^2.
  low = ms.mono_soup(jnp.zeros((4, 4)), jnp.diag(jnp.array([3.0, 1, 1, 1]))).low
  assert float(low) == 0
  e = 1 / 98
  got = ms.mono_soup(jnp.zeros((3, 3)), jnp.diag(jnp.array([1.0, e, e])))
  assert int(got.rank) == 2
  expected = e**2 + (1 - e**2) * e / np.sqrt(1 + 2 * e**2)
  np.testing.assert_allclose(got.low, expected, rtol=1e-4)
  np.testing.assert_allclose(
    sorted(np.diagonal(got.params), reverse=True),
    [1 - expected, e * (1 - expected), e * expected],
    rtol=1e-4,
  )


def test_what_did_not_move_stays():
  anchor = {'w': jnp.arange(6.0).reshape(2, 3)}
  got = ms.mono_soup(anchor, anchor)
  np.testing.assert_array_equal(got.params['w'], anchor['w'])
  assert float(got.low['w']) == 0


@pytest.mark.parametrize('scale', [1e-15, 1e12])
def test_scale_is_free(scale):
  _, step = _pair((6, 5))
  expected = ms.mono_soup(np.zeros_like(step), step)
  got = ms.mono_soup(np.zeros_like(step), np.float32(scale * step))
  assert int(got.rank) == int(expected.rank)
  np.testing.assert_allclose(got.low, expected.low, rtol=1e-4)


def test_query_key_and_value_are_one_matrix():
  # as one matrix they were fused: [inputs, 3 x outputs]
  anchor, model = _pair((8, 15))
  names = ('query', 'key', 'value')

  def split(x):
    parts = np.split(x, 3, axis=1)
    return {'bias': np.zeros(2, np.float32)} | dict(
      zip(names, parts, strict=True)
    )

  got = ms.mono_soup(
    split(anchor),
    split(model),
    layers=lambda path, leaf: ms.Layer(group='qkv' if path in names else None),
  )
  joined = np.concatenate([got.params[name] for name in names], axis=1)
  for name in names:
    _check((got.low[name], got.rank[name]), joined, _edit(anchor, model))


def test_convolutions_and_scanned_layers():
  # [scan, height, width, inputs, outputs]: outputs against all others
  pairs = [_pair((12, 7), seed=seed) for seed in range(3)]
  anchor, model = (
    np.stack([pair[i] for pair in pairs]).reshape(3, 2, 2, 3, 7)
    for i in range(2)
  )
  got = ms.mono_soup(
    anchor, model, layers=lambda path, leaf: ms.Layer(axes=(0,))
  )
  assert got.low.shape == (3,)
  for i, pair in enumerate(pairs):
    params = np.asarray(got.params[i]).reshape(12, 7)
    _check((got.low[i], got.rank[i]), params, _edit(*pair))


def test_output_axis():
  # PyTorch: [outputs, inputs, height, width]
  anchor, model = _pair((7, 12))
  got = ms.mono_soup(
    anchor.reshape(7, 3, 2, 2),
    model.reshape(7, 3, 2, 2),
    layers=lambda path, leaf: ms.Layer(filter_axis=0),
  )
  params = np.asarray(got.params).reshape(7, 12)
  _check((got.low, got.rank), params, _edit(anchor, model))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_half_precision_is_edited_wider(dtype):
  anchor, model = (jnp.asarray(x, dtype) for x in _pair((6, 5)))
  got = ms.mono_soup(anchor, model).params
  assert got.dtype == dtype
  expected = _edit(anchor.astype(jnp.float32), model.astype(jnp.float32))[0]
  np.testing.assert_allclose(
    got.astype(jnp.float32), expected, rtol=float(jnp.finfo(dtype).eps)
  )


def test_bad_groups_are_named():
  tree = {'a': jnp.ones((2, 3)), 'b': jnp.ones((4, 3))}
  with pytest.raises(ValueError, match=r'b: .* of inputs is 4, that of a is 2'):
    ms.mono_soup(tree, tree, layers=lambda path, leaf: ms.Layer(group='x'))


def test_names_what_differs():
  with pytest.raises(ValueError, match='the anchor has float32'):
    ms.mono_soup(jnp.ones((2, 3)), jnp.ones((2, 4)))
