"""Fine-tuning held near the anchor: each layer on a ball whose radius learns.

A layer is a leaf. Its displacement d = w - w0 is held by rows: a row is what
leads to one output, and its norm the sum of absolute values, so that all rows
obey one radius r (the maximum absolute row sum of a matrix).

  row of w  <-  row of w0 + min(r / |row of d|_1, 1) row of d

Source: Tian et al. Trainable projected gradient method for robust fine-tuning.
CVPR 2023, arXiv:2303.10720. Tian et al. Fast trainable projection for robust
fine-tuning. NeurIPS 2023, arXiv:2310.19182.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import optax

from modelstock_jax import merging

Params = Any

# Of the radii's own Adam, and the least radius, as published.
RATE = 1e-2
DECAYS = (0.9, 0.999)
EPSILON = 1e-8
LEAST = 1e-8


class Radii(NamedTuple):
  """What is known of the radii of a model's layers, of those that are held."""

  count: jax.Array  # int32[]       steps taken
  radius: Params  # leaves float32[]
  first: Params  # leaves float32[]  moments of the gradient of the radius
  second: Params  # leaves float32[]
  before: Params  # leaves as params: displacements before their projection


class State(NamedTuple):
  """What an optimizer whose steps are projected remembers."""

  inner: Any
  radii: Radii


def project(
  path: str, anchor: jax.Array, leaf: jax.Array, radius: jax.Array
) -> jax.Array:
  """Puts a layer onto its ball; what is inside stays as it is.

  Args:
    path: of the leaf: rows of a kernel are along its last axis, of all else
      along the first.
    anchor: float32[...], the centre.
    leaf: float32[...].
    radius: float32[].

  Returns:
    float32[...].

  >>> w = project('kernel', jnp.zeros((2, 2)), jnp.eye(2) * 3, jnp.float32(1))
  >>> print(w)
  [[1. 0.]
   [0. 1.]]
  """
  moved = leaf - anchor
  ratio = radius / norms(path, moved)
  return jnp.where(ratio < 1, anchor + ratio * moved, leaf)


def norms(path: str, moved: jax.Array) -> jax.Array:
  """The norms of rows, float32[1, ..., rows] or [rows, 1, ...], never 0.

  Of a vector there is one row.

  >>> print(norms('head/kernel', jnp.array([[3.0, -1.0], [4.0, 0.0]])))
  [[7. 1.]]
  """
  axes = range(moved.ndim)
  if moved.ndim > 1:
    axes = axes[:-1] if path.endswith('kernel') else axes[1:]
  total = jnp.sum(jnp.abs(moved), axis=tuple(axes), keepdims=True)
  return total + LEAST


def remember(
  tx: optax.GradientTransformation, exclude: Sequence[str] = ()
) -> optax.GradientTransformation:
  """An optimizer whose state has a place for radii; its updates are the same.

  Args:
    tx: the optimizer.
    exclude: parts of the params that are not held, such as 'head'.

  Returns:
    An optimizer with the state `State`. Its `init` raises ValueError where the
    params have no such part.
  """

  def init(params):
    unknown = sorted(set(exclude) - params.keys())
    if unknown:
      raise ValueError(
        f'train.projection_exclude: the params have no {unknown}; their parts '
        f'are {sorted(params)}.'
      )
    held = {name: part for name, part in params.items() if name not in exclude}

    def everywhere(value):
      return jax.tree.map(lambda _: jnp.full((), value, jnp.float32), held)

    radii = Radii(
      count=jnp.zeros((), jnp.int32),
      radius=everywhere(LEAST),
      first=everywhere(0),
      second=everywhere(0),
      before=jax.tree.map(jnp.zeros_like, held),
    )
    return State(tx.init(params), radii)

  def update(updates, state, params=None):
    updates, inner = tx.update(updates, state.inner, params)
    return updates, state._replace(inner=inner)

  return optax.GradientTransformation(init, update)


def fast(
  anchor: Params,
  params: Params,
  grads: Params,
  state: State,
  *,
  strength: float = 1.0,
) -> tuple[Params, State]:
  """FTP: projects a step; the radii learn from the gradient of that step.

  With the gradient g at the weights before the step, and the displacement d
  that the step before had led to before it was projected, a radius has the
  gradient

    sum over rows of <g, d> / |d|_1

  by which Adam changes it; it stays between 1e-8 and the largest norm of a row.
  The first step is put back to the anchor, as published.

  Args:
    anchor: the centre, leaves [...].
    params: of a model after the step of its optimizer.
    grads: at the weights before that step.
    state: what `remember` made, after the step of its optimizer.
    strength: 0..1, factor on gradients that make a radius smaller; with 0 radii
      only grow.

  Returns:
    The params on their balls, and the state.
  """
  radii = state.radii
  count = radii.count + 1

  def held(tree):
    return {name: tree[name] for name in radii.radius}

  def one(path, *leaves):
    return _fast(merging.path_name(path), count, strength, *leaves)

  found = jax.tree.map_with_path(
    one, held(anchor), held(params), held(grads), *radii[1:]
  )
  new, *learnt = jax.tree.transpose(
    jax.tree.structure(radii.radius), jax.tree.structure((0,) * 5), found
  )
  return {**params, **new}, State(state.inner, Radii(count, *learnt))


def _fast(
  path: str,
  count: jax.Array,
  strength: float,
  anchor: jax.Array,
  leaf: jax.Array,
  grad: jax.Array,
  radius: jax.Array,
  first: jax.Array,
  second: jax.Array,
  before: jax.Array,
) -> tuple[jax.Array, ...]:
  """One layer's step: see `fast`."""
  moved = leaf - anchor
  slope = jnp.sum(grad * before / norms(path, before))
  slope = jnp.where(slope > 0, strength * slope, slope)
  first = DECAYS[0] * first + (1 - DECAYS[0]) * slope
  second = DECAYS[1] * second + (1 - DECAYS[1]) * jnp.square(slope)
  steps = count.astype(jnp.float32)
  mean = first / (1 - DECAYS[0] ** steps)
  scale = jnp.sqrt(second / (1 - DECAYS[1] ** steps)) + EPSILON
  radius = radius - RATE * mean / scale
  radius = jnp.clip(radius, LEAST, jnp.max(norms(path, moved)))
  return project(path, anchor, leaf, radius), radius, first, second, moved
