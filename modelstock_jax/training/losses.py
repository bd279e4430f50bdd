"""What models are trained on: losses of one model on one batch."""

import jax
from jax import numpy as jnp
import optax

from modelstock_jax.clip import heads


def cross_entropy(
  logits: jax.Array, label: jax.Array, smoothing: float | jax.Array = 0.0
) -> jax.Array:
  """Mean cross-entropy, of targets mixed with the uniform ones.

  Args:
    logits: float32[B, K].
    label: int32[B].
    smoothing: share of the uniform distribution in the targets, 0..1.

  Returns:
    float32[], nats.

  >>> round(float(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))), 4)
  1.3863
  """
  target = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
  # One number for each model of a stack may be 0 in some of them.
  if isinstance(smoothing, jax.Array) or smoothing:
    target = optax.smooth_labels(target, smoothing)
  return jnp.mean(optax.softmax_cross_entropy(logits, target))


def context_divergence(
  contexts: dict[str, jax.Array], frozen: jax.Array, embeddings: jax.Array
) -> jax.Array:
  """How far a tower has moved in what it says of the context of images.

  mean_i KL(p(frozen_i) || p(embeddings_i)), p = softmax over contexts

  A context is a template of the prompts, 'a sketch of a {}.' for instance; its
  description is the normalised mean over classes of its text embeddings.

  Args:
    contexts: {'kernel': float32[D, T], 'bias': float32[T]}: a head whose
      classes are contexts, which `clip.zero_shot_head` makes of text embeddings
      [T, K, D].
    frozen: float32[B, D], of the pretrained tower; no gradient goes there.
    embeddings: float32[B, D], of the tower in training.

  Returns:
    float32[], nats.

  Source: Mao et al. Context-aware robust fine-tuning. arXiv:2211.16175. Built
  from its abstract and a third party's program, not from the paper's text. The
  program has the same direction and mean over classes, but takes the softmax of
  bare cosines, which a head of `clip.zero_shot_head` scales by 100.

  >>> contexts = {'kernel': jnp.eye(2), 'bias': jnp.zeros(2)}
  >>> same = jnp.array([[3.0, 4.0]])
  >>> float(context_divergence(contexts, same, 2 * same))
  0.0
  """
  target = jax.nn.log_softmax(
    heads.classify(contexts, jax.lax.stop_gradient(frozen))
  )
  found = jax.nn.log_softmax(heads.classify(contexts, embeddings))
  return jnp.mean(jnp.sum(jnp.exp(target) * (target - found), axis=-1))


def pair_logits(
  images: jax.Array, texts: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """exp(log_scale) * cosine of every image with every text.

  Args:
    images: float32[B, D] embeddings, of any length.
    texts: float32[B, D] embeddings, of any length.
    log_scale: float32[].

  Returns:
    float32[B, B], a row for each image.

  >>> print(pair_logits(2 * jnp.eye(2), jnp.eye(2), jnp.log(10.0)).round())
  [[10.  0.]
   [ 0. 10.]]
  """
  return jnp.exp(log_scale) * jnp.matmul(
    heads.normalize(images),
    heads.normalize(texts).T,
    precision=jax.lax.Precision.HIGHEST,
  )


def contrastive(logits: jax.Array) -> jax.Array:
  """CLIP's loss of pairs, as FLYP fine-tunes with it.

  Each image has one caption, its own; captions of other images count as wrong
  even where their class is the same, as the source has it.

  Args:
    logits: float32[B, B], of `pair_logits`.

  Returns:
    float32[], nats: the mean over both directions of the cross-entropy.

  Source: Goyal et al. Finetune like you pretrain. CVPR 2023, arXiv:2212.00638.

  >>> round(float(contrastive(jnp.zeros((4, 4)))), 4)
  1.3863
  """
  own = jnp.arange(logits.shape[0])
  return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def captions(key: jax.Array, tokens: jax.Array, label: jax.Array) -> jax.Array:
  """Describes each example by its class in a template drawn at random.

  Args:
    key: decides the templates.
    tokens: int32[K, T, L], every class in every template.
    label: int32[B].

  Returns:
    int32[B, L].

  >>> tokens = jnp.arange(6).reshape(3, 1, 2)
  >>> captions(jax.random.key(0), tokens, jnp.array([2, 0])).tolist()
  [[4, 5], [0, 1]]
  """
  template = jax.random.randint(key, label.shape, 0, tokens.shape[1])
  return tokens[label, template]
