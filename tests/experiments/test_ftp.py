"""FTP against the published steps in float64, and what a ball is."""

import ftp
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from modelstock_jax.training import optimizer as optimizer_lib

STEPS, RATE = 12, 3e-3


def params_of(seed):
  rng = np.random.default_rng(seed)
  return {
    'image': {'kernel': rng.normal(size=(4, 3)), 'bias': rng.normal(size=3)},
    'head': {'kernel': rng.normal(size=(3, 2))},
  }


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


class Published:
  """FTP in float64, for rows along the first axis, as its authors' code has it.

  That is a layer of PyTorch: [outputs, inputs]; a vector is one row.
  """

  def __init__(self, anchor, strength):
    self.anchor, self.strength = anchor, strength
    self.t, self.gamma, self.m, self.v = 1, 1e-8, 0.0, 0.0
    self.c, self.scale = None, None

  def norms(self, c):
    axes = tuple(range(1, c.ndim)) if c.ndim > 1 else None
    return np.abs(c).sum(axes, keepdims=True) + 1e-8

  def step(self, proposed, grad):
    c = proposed - self.anchor
    norms = self.norms(c)
    if self.t > 1:
      slope = (grad * self.c * self.scale).sum()
      if slope > 0:
        slope *= self.strength
      self.m = 0.9 * self.m + 0.1 * slope
      self.v = 0.999 * self.v + 0.001 * slope**2
      mean, square = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
      self.gamma -= 1e-2 * mean / (np.sqrt(square) + 1e-8)
      self.gamma = np.clip(self.gamma, 1e-8, norms.max())
    self.c, self.scale = c, 1 / norms
    self.t += 1
    return self.anchor + np.clip(self.gamma / norms, 0, 1) * c


def proposing():
  """An optimizer that stays where it is: steps are given to it."""
  return optimizer_lib.from_optax(optax.identity())


def run(strength, exclude=('head',)):
  """Steps of plain gradient descent, each projected; yields both sides."""
  anchor = params_of(0)
  target = params_of(1)
  optimizer = ftp.optimizer(proposing(), strength=strength, exclude=exclude)
  params = float32(anchor)
  state = optimizer.init(params)
  oracles = {
    'kernel': Published(anchor['image']['kernel'].T, strength),
    'bias': Published(anchor['image']['bias'], strength),
  }
  for index in range(STEPS):
    # One way, then back: radii grow, then shrink.
    sign = 1.0 if index < STEPS // 2 else -1.0
    grads = jax.tree.map(
      lambda p, t, sign=sign: sign * (np.asarray(p, np.float64) - t),
      params,
      target,
    )
    proposed = jax.tree.map(
      lambda p, g: np.asarray(p, np.float64) - RATE * g, params, grads
    )
    expected = {
      'kernel': oracles['kernel']
      .step(proposed['image']['kernel'].T, grads['image']['kernel'].T)
      .T,
      'bias': oracles['bias'].step(
        proposed['image']['bias'], grads['image']['bias']
      ),
    }
    params, state = optimizer.step(
      float32(proposed), float32(grads), state, 0.0, float32(anchor), {}
    )
    yield index, anchor, proposed, params, state, expected, oracles


@pytest.mark.parametrize('strength', [1.0, 0.3, 0.0])
def test_steps_are_the_published_ones(strength):
  bound = 0
  for _, _, proposed, params, state, expected, oracles in run(strength):
    for name, value in expected.items():
      np.testing.assert_allclose(
        params['image'][name], value, rtol=1e-5, atol=2e-6
      )
      radius = state.radii.radius['image'][name]
      np.testing.assert_allclose(
        radius, oracles[name].gamma, rtol=2e-3, atol=1e-7
      )
      bound += not np.allclose(value, proposed['image'][name], atol=1e-5)
  assert bound > STEPS // 2  # steps that were cut short


def test_the_first_step_is_put_back_and_all_are_inside_their_balls():
  for index, anchor, _, params, state, _, _ in run(1.0):
    for name, leaf in params['image'].items():
      moved = leaf - jnp.asarray(anchor['image'][name], jnp.float32)
      norms = ftp.norms(name, moved)
      radius = state.radii.radius['image'][name]
      if not index:
        np.testing.assert_allclose(moved, np.zeros(moved.shape), atol=1e-6)
      assert (norms <= radius * (1 + 1e-4) + 1e-6).all()


def test_what_is_excluded_moves_freely_and_takes_no_memory():
  for _, _, proposed, params, state, _, _ in run(1.0):
    np.testing.assert_array_equal(
      params['head']['kernel'], np.float32(proposed['head']['kernel'])
    )
    assert set(state.radii.before) == {'image'}


def test_a_part_that_is_not_there_is_refused():
  optimizer = ftp.optimizer(proposing(), exclude=['tail'])
  with pytest.raises(ValueError, match=r"'tail'.*\['head', 'image'\]"):
    optimizer.init(float32(params_of(0)))


@pytest.mark.parametrize('path', ['image/kernel', 'image/embedding'])
def test_rows_of_a_ball(path):
  anchor, leaf = params_of(0)['head']['kernel'], params_of(1)['head']['kernel']
  projected = ftp.project(
    path,
    jnp.asarray(anchor, jnp.float32),
    jnp.asarray(leaf, jnp.float32),
    jnp.float32(0.5),
  )
  axis = 0 if path.endswith('kernel') else 1
  norms = np.abs(projected - anchor).sum(axis)
  outside = np.abs(leaf - anchor).sum(axis) > 0.5
  assert outside.any()
  np.testing.assert_allclose(norms[outside], 0.5, rtol=1e-4)
  # The direction of a row is kept.
  cosines = ((projected - anchor) * (leaf - anchor)).sum(axis)
  cosines /= np.linalg.norm(projected - anchor, axis=axis)
  cosines /= np.linalg.norm(leaf - anchor, axis=axis)
  np.testing.assert_allclose(cosines, 1, rtol=1e-5)


def test_in_a_ball_without_end_nothing_changes():
  leaf = jnp.asarray(params_of(1)['image']['kernel'], jnp.float32)
  anchor = jnp.asarray(params_of(0)['image']['kernel'], jnp.float32)
  projected = ftp.project('kernel', anchor, leaf, jnp.float32(jnp.inf))
  assert projected.tobytes() == leaf.tobytes()
