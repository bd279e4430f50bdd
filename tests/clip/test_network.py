import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.clip import network


def test_patches_times_kernel_is_a_strided_convolution():
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 6, 9, 2)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 5)), jnp.float32)
  expected = jax.lax.conv_general_dilated(
    images,
    kernel,
    window_strides=(3, 3),
    padding='VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  ours = network.patchify(images, 3) @ kernel.reshape(-1, 5)[None]
  np.testing.assert_allclose(ours, expected.reshape(2, -1, 5), atol=1e-5)


def test_quick_gelu_at_known_points():
  # sigmoid(log 3) = 3/4.
  x = np.log(3) / 1.702
  ours = network.quick_gelu(jnp.asarray([x, -x, 0.0], jnp.float32))
  np.testing.assert_allclose(ours, [0.75 * x, -0.25 * x, 0], rtol=1e-6)


def test_layer_norm_takes_statistics_in_float32():
  # Around 100, bfloat16 holds steps of 0.5: its own mean and variance would be
  # far off, while the rounded input still has an exact answer.
  x = jnp.asarray(100 + np.arange(0, 32, 0.5)[None], jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
  norm = network.LayerNorm(jnp.bfloat16)
  params = norm.init(jax.random.key(0), x)
  ours = jnp.asarray(norm.apply(params, x))
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8)


def test_layer_norm_epsilon():
  # A row +-e has variance e^2: the result is e / sqrt(e^2 + 1e-5).
  e = 1e-5**0.5
  norm = network.LayerNorm(jnp.float32)
  x = jnp.asarray([[e, -e]], jnp.float32)
  ours = jnp.asarray(norm.apply(norm.init(jax.random.key(0), x), x))
  np.testing.assert_allclose(ours, [[0.5**0.5, -(0.5**0.5)]], rtol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_causal_attention_looks_only_back(causal):
  attention = network.Attention(2, causal, 0.3, jnp.float32)
  x = jax.random.normal(jax.random.key(0), (1, 5, 8))
  params = attention.init(jax.random.key(1), x)
  jacobian = jax.jit(jax.jacobian(lambda x: attention.apply(params, x)))(x)
  # reaches[i, j]: output token i depends on input token j.
  reaches = np.abs(jacobian).max(axis=(0, 2, 3, 5)) > 0
  expected = np.tril(np.ones((5, 5), bool)) if causal else np.ones((5, 5))
  np.testing.assert_array_equal(reaches, expected)
