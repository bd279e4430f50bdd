"""AdamW with warm-up, cosine decay and clipping, as in the paper's lineage."""

from typing import Any

import jax
from jax import numpy as jnp
import optax

from modelstock_jax.training import task as task_lib


def warmup_steps(steps: int, share: float, total_steps: int) -> int:
  """Return the steps of the warm-up: so many, or a share of a run if not 0."""
  return min(round(share * total_steps), total_steps - 1) if share else steps


def warmup_cosine(
  peak: float, *, warmup_steps: int, total_steps: int, from_zero: bool = True
) -> optax.Schedule:
  r"""Linear warm-up to the peak, then a cosine to 0 at the end.

  Args:
    peak: the learning rate after the warm-up.
    warmup_steps: length of the warm-up, in optimizer steps.
    total_steps: length of the run, in optimizer steps.
    from_zero: step s of a warm-up of w has the share s / w of the peak, so that
      the first trains nothing; False: (s + 1) / w, as the code of WiSE-FT and
      Model Soups has it.

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
      f'{total_steps} steps of the run; lower it, train longer, or set '
      'train.warmup_share.'
    )
  offset = 0.0 if from_zero else 1.0
  warmup = optax.linear_schedule(0.0, peak, warmup_steps)
  cosine = optax.cosine_decay_schedule(peak, total_steps - warmup_steps)
  schedule = optax.join_schedules(
    [lambda step: warmup(step + offset), cosine], [warmup_steps]
  )
  # optax would mix the integer with floats, which strict promotion forbids.
  return lambda step: schedule(jnp.asarray(step, jnp.float32))


def adamw(
  *, weight_decay: float | jax.Array, clip_norm: float
) -> optax.GradientTransformation:
  """Return AdamW with clipping, for a learning rate of 1.

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
  return optax.chain(
    clip,
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay),
    optax.scale(-1.0),
  )


def from_optax(tx: optax.GradientTransformation) -> task_lib.Optimizer:
  """Make an `Optimizer` of an optax transformation.

  Args:
    tx: made with a learning rate of 1: `optax.adamw(1.0, weight_decay=0.1)`.
      The trainer's schedule scales its updates.

  Returns:
    An optimizer whose step is params + learning_rate * updates.

  >>> tiny = from_optax(optax.sgd(1.0))
  >>> params, _ = tiny.step(
  ...   jnp.ones(2), jnp.ones(2), tiny.init(jnp.ones(2)), 0.25, None, {}
  ... )
  >>> print(params)
  [0.75 0.75]
  """
  update: Any = tx.update  # of whatever state

  def step(params, grads, opt_state, learning_rate, anchor, hyper):
    del anchor, hyper
    # optax raises floats to an integer count, which strict promotion forbids.
    with jax.numpy_dtype_promotion('standard'):
      updates, opt_state = update(grads, opt_state, params)
    # In the dtype of the params.
    params = jax.tree.map(
      lambda p, u: p + jnp.asarray(learning_rate, p.dtype) * u, params, updates
    )
    return params, opt_state

  return task_lib.Optimizer(tx.init, step)


def only(part: str, optimizer: task_lib.Optimizer) -> task_lib.Optimizer:
  """Confine an optimizer to one part of the params; the rest stays as it is.

  The rest has no moments and no weight decay.

  Args:
    part: a key of the params.
    optimizer: of that part.

  Returns:
    An optimizer of all params.

  >>> params = {'image': jnp.ones(2), 'head': jnp.ones(2)}
  >>> tiny = only('head', from_optax(optax.sgd(1.0)))
  >>> new, _ = tiny.step(params, params, tiny.init(params), 0.5, params, {})
  >>> print(new['image'], new['head'])
  [1. 1.] [0.5 0.5]
  """

  def chosen(tree):
    return {part: tree[part]}

  def step(params, grads, opt_state, learning_rate, anchor, hyper):
    trained, opt_state = optimizer.step(
      chosen(params),
      chosen(grads),
      opt_state,
      learning_rate,
      chosen(anchor),
      hyper,
    )
    return {**params, **trained}, opt_state

  return task_lib.Optimizer(lambda params: optimizer.init(chosen(params)), step)
