"""Classification heads on top of image embeddings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def classify(head: dict[str, jax.Array], embeddings: jax.Array) -> jax.Array:
  """Return logits (f / |f|) @ kernel + bias of embeddings f.

  Args:
    head: `{'kernel': float32[D, K], 'bias': float32[K]}`.
    embeddings: float[B, D], of any length.

  Returns:
    Logits, float32[B, K].
  """
  # Zero-shot logits are 100 x a cosine and classes often differ by 0.001 in
  # cosine: more than the bfloat16 passes an accelerator would choose can hold.
  logits = jnp.matmul(
    normalize(embeddings), head['kernel'], precision=jax.lax.Precision.HIGHEST
  )
  return logits + head['bias'][None]


def zero_shot_head(
  embeddings: jax.Array, *, scale: float = 100.0
) -> dict[str, jax.Array]:
  """Return the head that classifies by the nearest class description.

  kernel[:, k] = scale * n(mean_t n(embeddings[k, t])), n(v) = v / |v|.

  Args:
    embeddings: float[K, T, D], text embeddings of T templates for each of K
      classes, of any length.
    scale: the inverse temperature; CLIP's was trained up to 100.

  Returns:
    `{'kernel': float32[D, K], 'bias': float32[K]}`, the bias zero.

  Raises:
    ValueError: `embeddings` does not have three axes, or one is empty.

  Source: the prompt ensemble of section 3.1.4 of arXiv:2103.00020.

  >>> head = zero_shot_head(jnp.array([[[3.0, 0.0]], [[0.0, 0.1]]]))
  >>> print(head['kernel'])
  [[100.   0.]
   [  0. 100.]]
  """
  if embeddings.ndim != 3 or not embeddings.size:
    raise ValueError(
      f'embeddings have shape {embeddings.shape}, zero_shot_head takes '
      '(classes, templates, features), none of them zero.'
    )
  mean = normalize(embeddings).mean(axis=1)
  return {
    'kernel': scale * normalize(mean).T,
    'bias': jnp.zeros(embeddings.shape[0], jnp.float32),
  }


def text_head(
  encode_text: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  tokens: np.ndarray,
  *,
  batch_size: int = 256,
  examples: jax.sharding.Sharding | None = None,
  replicated: jax.sharding.Sharding | None = None,
) -> dict[str, jax.Array]:
  """Embed the descriptions of classes and make their `zero_shot_head`.

  The texts are embedded in batches, which bounds the memory; only their
  embeddings, float32[K * T, D], are kept.

  Args:
    encode_text: of a `CLIP`.
    params: of the CLIP; 'text' matters.
    tokens: int32[K, T, L]: K classes in T templates, of L tokens each.
    batch_size: texts that are embedded at a time, if there are as many.
    examples: sharding of a batch, which divides it; None: one device.
    replicated: sharding of the embeddings, as of the params.

  Returns:
    `{'kernel': float32[D, K], 'bias': float32[K]}`, the bias zero.
  """
  classes, templates, length = tokens.shape
  texts = tokens.reshape(-1, length)
  embed = jax.jit(encode_text, out_shardings=replicated)
  rows = []
  # Zero-shot logits of two classes often differ by less than what the 8 or 11
  # bits hold with which an accelerator would multiply.
  with jax.default_matmul_precision('highest'):
    for start in range(0, len(texts), batch_size):
      batch = texts[start : start + batch_size]
      # With the last text: one program for batches of one shape.
      missing = batch_size - len(batch)
      batch = np.pad(batch, [(0, missing), (0, 0)], mode='edge')
      batch = jax.device_put(batch, examples)
      rows.append(np.asarray(embed({'text': params['text']}, batch)))
  embeddings = np.concatenate(rows)[: len(texts)]
  return jax.jit(zero_shot_head)(embeddings.reshape(classes, templates, -1))


def normalize(x: jax.Array) -> jax.Array:
  """Return x / |x| over the last axis, in float32.

  >>> print(normalize(jnp.array([[3.0, 4.0]])))
  [[0.6 0.8]]
  """
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
