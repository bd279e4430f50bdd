"""Losses against the same formulas in float64, and against torch's cases."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
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
  found = losses.cross_entropy(
    jnp.asarray(logits, jnp.float32), jnp.asarray(label), smoothing
  )
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_stack_may_smooth_each_model_its_own_way():
  logits = jnp.asarray(normal(0, B, K), jnp.float32)
  label = jnp.arange(B) % K
  each = jnp.array([0.0, 0.3], jnp.float32)
  found = jax.vmap(losses.cross_entropy, (None, None, 0))(logits, label, each)
  alone = [losses.cross_entropy(logits, label, s) for s in (0.0, 0.3)]
  np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_the_divergence_of_contexts():
  texts = normal(1, T, K, D)  # each context says every class
  frozen, moved = normal(2, B, D), normal(3, B, D)
  contexts = clip.zero_shot_head(jnp.asarray(texts, jnp.float32), scale=5.0)
  weight = 5 * unit(unit(texts).mean(1)).T
  p, q = softmax(unit(frozen) @ weight), softmax(unit(moved) @ weight)
  expected = (p * np.log(p / q)).sum(-1).mean()
  found = losses.context_divergence(
    contexts, jnp.asarray(frozen, jnp.float32), jnp.asarray(moved, jnp.float32)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_divergence_pulls_the_tower_in_training_alone():
  contexts = {
    'kernel': jnp.asarray(normal(1, D, T), jnp.float32),
    'bias': jnp.zeros(T),
  }
  frozen = jnp.asarray(normal(2, B, D), jnp.float32)
  moved = jnp.asarray(normal(3, B, D), jnp.float32)
  of_frozen, of_moved = jax.grad(losses.context_divergence, (1, 2))(
    contexts, frozen, moved
  )
  assert not of_frozen.any()
  assert of_moved.all()
  # Where both say the same, the divergence is least.
  least = jax.grad(losses.context_divergence, 2)(contexts, frozen, frozen)
  np.testing.assert_allclose(least, np.zeros((B, D)), atol=1e-7)


def test_the_loss_of_pairs():
  images, texts, log_scale = normal(4, B, D), normal(5, B, D), 1.3
  logits = np.exp(log_scale) * unit(images) @ unit(texts).T
  by_image = -np.log(np.diagonal(softmax(logits)))
  by_text = -np.log(np.diagonal(softmax(logits.T)))
  found = losses.contrastive(
    losses.pair_logits(
      jnp.asarray(images, jnp.float32),
      jnp.asarray(texts, jnp.float32),
      jnp.float32(log_scale),
    )
  )
  expected = (by_image.mean() + by_text.mean()) / 2
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_captions_are_of_the_class_in_every_template():
  tokens = jnp.arange(K * T * L).reshape(K, T, L)
  label = jnp.arange(300) % K
  found = losses.captions(jax.random.key(0), tokens, label)
  template = found[:, 0] // L % T
  np.testing.assert_array_equal(found, tokens[label, template])
  assert np.bincount(template, minlength=T).min() > 60  # 100 are expected
  again = losses.captions(jax.random.key(1), tokens, label)
  assert (found != again).any()
