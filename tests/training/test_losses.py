"""Losses against the same formulas in float64, and against torch's cases."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax.training import losses

B, K, D, T, L = 6, 4, 5, 3, 7


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_cross_entropy(smoothing):
  logits, label = 3 * normal(0, B, K), np.arange(B) % K
  target = (1 - smoothing) * np.eye(K)[label] + smoothing / K
  expected = -(target * np.log(softmax(logits))).sum(-1).mean()
  actual = losses.cross_entropy(
    jnp.asarray(logits, jnp.float32), jnp.asarray(label), smoothing
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_stack_may_smooth_each_model_its_way():
  logits = jnp.asarray(normal(0, B, K), jnp.float32)
  label = jnp.arange(B) % K
  each = jnp.array([0.0, 0.3], jnp.float32)
  actual = jax.vmap(losses.cross_entropy, (None, None, 0))(logits, label, each)
  alone = [losses.cross_entropy(logits, label, s) for s in (0.0, 0.3)]
  np.testing.assert_allclose(actual, alone, rtol=1e-6)
