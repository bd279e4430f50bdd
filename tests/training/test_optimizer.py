import math

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from modelstock_jax.training import optimizer

WARMUP, TOTAL, PEAK = 4, 20, 3e-3


@pytest.mark.parametrize('from_zero', [True, False])
@pytest.mark.parametrize('step', range(TOTAL + 1))
def test_warmup_is_linear_and_decay_a_half_cosine(step, from_zero):
  schedule = optimizer.warmup_cosine(
    PEAK, warmup_steps=WARMUP, total_steps=TOTAL, from_zero=from_zero
  )
  if step < WARMUP:
    # (step + 1) / WARMUP: `cosine_lr` of WiSE-FT and Model Soups.
    expected = PEAK * (step if from_zero else step + 1) / WARMUP
  else:
    done = (step - WARMUP) / (TOTAL - WARMUP)
    expected = PEAK * (1 + math.cos(math.pi * done)) / 2
  assert float(schedule(jnp.int32(step))) == pytest.approx(
    expected, abs=1e-7 * PEAK, rel=1e-5
  )


def test_warmup_as_long_as_the_run_is_refused():
  with pytest.raises(ValueError, match=r'train.warmup_steps: 20.* 20 steps'):
    optimizer.warmup_cosine(PEAK, warmup_steps=20, total_steps=20)


@pytest.mark.parametrize(
  ('share', 'total', 'steps'),
  [(0.0, 4000, 500), (0.1, 4000, 400), (0.29, 100, 29), (0.99, 12, 11)],
)
def test_warmup_may_be_a_share_of_the_run(share, total, steps):
  assert optimizer.warmup_steps(500, share, total) == steps


def _reference(gradients, params, *, weight_decay, clip_norm):
  """AdamW in float64, from Loshchilov and Hutter's algorithm 2."""
  beta1, beta2, epsilon = 0.9, 0.999, 1e-8
  first = second = np.zeros_like(params)
  for step, gradient in enumerate(gradients, 1):
    rate = PEAK * (1 + math.cos(math.pi * (step - 1) / TOTAL)) / 2
    norm = np.linalg.norm(gradient)
    if clip_norm and norm > clip_norm:
      gradient = gradient * clip_norm / norm
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    unbiased = first / (1 - beta1**step)
    scale = np.sqrt(second / (1 - beta2**step)) + epsilon
    params = params - rate * (unbiased / scale + weight_decay * params)
  return params


@pytest.mark.parametrize('clip_norm', [0.0, 1.0])
@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
def test_steps_are_those_of_adamw(weight_decay, clip_norm):
  rng = np.random.default_rng(0)
  start = rng.normal(size=5)
  gradients = rng.normal(size=(6, 5)) * np.array(
    [[0.1], [2], [3], [1], [9], [0.2]]
  )
  adamw = optimizer.from_optax(
    optimizer.adamw(weight_decay=weight_decay, clip_norm=clip_norm)
  )
  schedule = optimizer.warmup_cosine(PEAK, warmup_steps=0, total_steps=TOTAL)

  params = jnp.asarray(start, jnp.float32)
  state = adamw.init(params)
  for step, gradient in enumerate(gradients):
    gradient = jnp.asarray(gradient, jnp.float32)
    rate = schedule(jnp.int32(step))
    params, state = adamw.step(params, gradient, state, rate, params, {})

  expected = _reference(
    gradients, start, weight_decay=weight_decay, clip_norm=clip_norm
  )
  np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)


def test_apply_keeps_the_dtype_of_the_weights():
  params = {'w': jnp.ones(3, jnp.bfloat16)}
  updates = {'w': -params['w']}
  tx = optimizer.from_optax(optax.identity())
  rate = jnp.float32(0.5)
  updated, _ = tx.step(params, updates, tx.init(params), rate, None, {})
  assert updated['w'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(updated['w'], 0.5 * np.ones(3))


def test_the_state_does_not_count_towards_the_schedule():
  tx = optimizer.adamw(weight_decay=0.1, clip_norm=1.0)
  kinds = {
    type(s)
    for s in jax.tree.leaves(
      tx.init(jnp.zeros(2)),
      is_leaf=lambda s: (
        isinstance(s, tuple) and s != () and hasattr(s, '_fields')
      ),
    )
  }
  assert optax.ScaleByScheduleState not in kinds
  assert optax.ScaleByAdamState in kinds
