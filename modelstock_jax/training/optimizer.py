"""AdamW with warm-up, cosine decay and clipping, as in the paper's lineage."""

from typing import Any

import jax
from jax import numpy as jnp
import optax


def warmup_cosine(
  peak: float, *, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  r"""Linear warm-up from 0 to the peak, then a cosine to 0 at the end.

  Args:
    peak: the learning rate after the warm-up.
    warmup_steps: length of the warm-up, in optimizer steps.
    total_steps: length of the whole run, in optimizer steps.

  Returns:
    A function of the step, int32[], giving the learning rate, float32[].

  Raises:
    ValueError: if the warm-up is not shorter than the run.

  >>> schedule = warmup_cosine(1.0, warmup_steps=2, total_steps=6)
  >>> [round(float(schedule(jnp.int32(s))), 3) for s in range(7)]
  [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
  """
  if warmup_steps >= total_steps:
    raise ValueError(
      f'train.warmup_steps: {warmup_steps} is not less than the '
      f'{total_steps} steps of the whole run; lower it, or train longer.'
    )
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, peak, warmup_steps, total_steps
  )
  # optax would mix the integer with floats, which strict promotion forbids.
  return lambda step: schedule(jnp.asarray(step, jnp.float32))


def warmup_cosine_at(
  step: jax.typing.ArrayLike,
  *,
  peak: jax.Array,
  warmup_steps: int,
  total_steps: jax.Array,
) -> jax.Array:
  """`warmup_cosine` where peak and length may differ from model to model.

  Args:
    step: int32[].
    peak: float32[...], the learning rate after the warm-up.
    warmup_steps: length of the warm-up, in optimizer steps.
    total_steps: float32[...], length of the whole run; from there on it is 0.

  Returns:
    float32[...], the learning rate.

  >>> rate = warmup_cosine_at(
  ...   4, peak=jnp.float32(1), warmup_steps=2, total_steps=jnp.float32(6)
  ... )
  >>> round(float(rate), 3)
  0.5
  """
  now = jnp.asarray(step, jnp.float32)
  share = (now - warmup_steps) / (total_steps - warmup_steps)
  decay = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
  decay = jnp.where(share < 1, decay, 0)  # exactly, whatever cos(pi) is
  return peak * jnp.where(now < warmup_steps, now / max(warmup_steps, 1), decay)


def adamw(
  *, weight_decay: float | jax.Array, clip_norm: float
) -> optax.GradientTransformation:
  """The direction of an AdamW step, before it is scaled by the learning rate.

  The learning rate is left to the training step, which knows the number of
  steps taken; so a merge may reset the optimizer's state without starting
  the schedule again.

  Args:
    weight_decay: of every tensor, in units of the learning rate.
    clip_norm: the largest global norm of a gradient; 0 does not clip.

  Returns:
    An optax transformation.
  """
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  tx = optax.chain(
    clip, optax.scale_by_adam(), optax.add_decayed_weights(weight_decay)
  )

  def update(updates, state, params=None):
    # optax raises floats to an integer count, which strict promotion forbids.
    with jax.numpy_dtype_promotion('standard'):
      return tx.update(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


def only(
  part: str, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Confines an optimizer to one part of the params; the rest stays as it is.

  The rest has no moments and no weight decay; its gradients must be zero.

  Args:
    part: a key of the params.
    tx: the optimizer of that part.

  Returns:
    An optax transformation.

  >>> params = {'image': jnp.ones(2), 'head': jnp.ones(2)}
  >>> tx = only('head', adamw(weight_decay=0.5, clip_norm=0.0))
  >>> zero = jax.tree.map(jnp.zeros_like, params)
  >>> direction, _ = tx.update(zero, tx.init(params), params)
  >>> print(direction['image'], direction['head'])
  [0. 0.] [0.5 0.5]
  """
  inner: Any = tx.update  # of whatever state

  def init(params):
    return tx.init({part: params[part]})

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    own = None if params is None else {part: params[part]}
    found, state = inner({part: updates[part]}, state, own)
    return {**updates, **found}, state

  return optax.GradientTransformation(init, update)


def apply(
  params: Any, direction: Any, learning_rate: jax.typing.ArrayLike
) -> Any:
  """Params - learning_rate * direction, in the dtype of params."""
  return jax.tree.map(
    lambda p, d: p - jnp.asarray(learning_rate, p.dtype) * d, params, direction
  )
