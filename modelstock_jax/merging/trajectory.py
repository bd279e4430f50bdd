"""Averages along one run: weights of many steps, held as one tree."""

import functools
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax.merging import trees

PyTree = trees.PyTree


def ema(average: PyTree, params: PyTree, decay: float | jax.Array) -> PyTree:
  r"""The exponential moving average, one step on.

  $$ \bar w \leftarrow \beta \bar w + (1 - \beta) w $$

  Nothing is corrected: after n steps the average holds what it started from
  with weight $\beta^n$. Start from the weights that training starts from, and
  it is a mean of weights that occurred; the scale has no bias then. Started
  from zeros it would have to be divided by $1 - \beta^n$.

  Args:
    average: of the steps so far, a tree of arrays. In float32 or wider:
      rounding to bfloat16 would swallow changes of less than 1/256.
    params: the weights of this step, a tree like it.
    decay: beta, in [0, 1]; the average reaches back about 1 / (1 - beta) steps.

  Returns:
    A tree of the average's structure and dtypes, computed in float32 (float64
    for float64 leaves). Leaves that are not floating point are those of
    `params`.

  Raises:
    ValueError: if the trees differ (all differing leaves are named), or for a
      decay outside [0, 1], as far as its value is known (not under `jit`).

  Source: Polyak, Juditsky. Acceleration of stochastic approximation by
  averaging. SIAM J. Control and Optimization 30(4), 1992, for the mean; the
  exponential form is common in training.

  >>> import jax.numpy as jnp
  >>> ema({'w': jnp.array([1.0])}, {'w': jnp.array([2.0])}, decay=0.75)['w']
  Array([1.25], dtype=float32)
  """
  return _step(average, params, _ema, trees.fractions('decay', decay))


def swa(average: PyTree, params: PyTree, count: int | jax.Array) -> PyTree:
  r"""Stochastic weight averaging: the plain mean, one model on.

  $$ \bar w \leftarrow \frac{n \bar w + w}{n + 1} $$

  There is no bias: with n = 0 the average counts for nothing, and after any
  number of models it is their mean. Which steps to average (the ends of
  epochs, at a constant or cyclic rate) is up to the caller. Statistics of
  batch normalisation, if any, have to be computed anew; CLIP has none.

  Args:
    average: the mean of `count` models, a tree of arrays; float32 or wider.
    params: one more model, a tree like it.
    count: n >= 0, how many models the average holds.

  Returns:
    A tree of the average's structure and dtypes, computed in float32 (float64
    for float64 leaves). Leaves that are not floating point are those of
    `params`.

  Raises:
    ValueError: if the trees differ (all differing leaves are named), or for a
      negative count, as far as its value is known (not under `jit`).

  Source: Izmailov et al. Averaging weights leads to wider optima and better
  generalization. UAI 2018, arXiv:1803.05407, algorithm 1.

  >>> import jax.numpy as jnp
  >>> mean = {'w': jnp.zeros(1)}
  >>> for i, w in enumerate([1.0, 2.0, 6.0]):
  ...   mean = swa(mean, {'w': jnp.array([w])}, count=i)
  >>> mean['w'].tolist()
  [3.0]
  """
  if not trees.is_tracer(count) and (jnp.ndim(count) or not count >= 0):
    raise ValueError(f'count: must be a number of models >= 0, got {count}.')
  return _step(average, params, _swa, count)


def _step(average: PyTree, params: PyTree, update: Any, by: Any) -> PyTree:
  family = trees.align(
    average, [params], stacked=False, least=1, anchor_name='the average'
  )
  leaves = family.models[0]
  averages = _update(
    [family.anchor[i] for i in family.floating],
    [leaves[i] for i in family.floating],
    by,
    update=update,
  )
  return family.tree(averages, rest=leaves)


@functools.partial(jax.jit, static_argnames='update')
def _update(averages, leaves, by, *, update):
  result = []
  for average, leaf in zip(averages, leaves, strict=True):
    dtype = trees.wide(average.dtype)
    new = update(*(jnp.asarray(x, dtype) for x in (average, leaf, by)))
    result.append(new.astype(average.dtype))
  return result


def _ema(average, leaf, decay):
  return decay * average + (1 - decay) * leaf


def _swa(average, leaf, count):
  # At 0 not even a NaN of the average counts.
  share = 1 / (count + 1)
  return jnp.where(count == 0, leaf, average + share * (leaf - average))
