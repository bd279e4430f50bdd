"""Losses of classification."""

import jax
from jax import numpy as jnp
import optax


def cross_entropy(
  logits: jax.Array, label: jax.Array, smoothing: float | jax.Array = 0.0
) -> jax.Array:
  """Return the mean of `cross_entropies`, float32[].

  >>> round(float(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))), 4)
  1.3863
  """
  return jnp.mean(cross_entropies(logits, label, smoothing))


def cross_entropies(
  logits: jax.Array, label: jax.Array, smoothing: float | jax.Array = 0.0
) -> jax.Array:
  """Return the cross-entropies, of targets mixed with the uniform ones.

  Args:
    logits: float32[B, K].
    label: int32[B].
    smoothing: share of the uniform distribution in the targets, 0..1.

  Returns:
    float32[B], nats.
  """
  target = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
  # A traced number may be 0 in some models of a stack.
  if isinstance(smoothing, jax.Array) or smoothing:
    target = optax.smooth_labels(target, smoothing)
  return optax.softmax_cross_entropy(logits, target)


def accuracy(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Return the share of examples whose largest logit is their label's."""
  return jnp.mean(jnp.argmax(logits, -1) == label, dtype=jnp.float32)
