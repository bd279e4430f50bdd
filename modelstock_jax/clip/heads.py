"""Classification heads on top of image embeddings."""

import jax
import jax.numpy as jnp


def classify(head: dict[str, jax.Array], embeddings: jax.Array) -> jax.Array:
  """Logits = (f / |f|) @ kernel + bias.

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
  """The head that classifies by the nearest class description.

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


def normalize(x: jax.Array) -> jax.Array:
  """X / |x| over the last axis, in float32.

  >>> print(normalize(jnp.array([[3.0, 4.0]])))
  [[0.6 0.8]]
  """
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
