"""Neighbours of Model Stock: averages of models, or of the steps of a run."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import trees

PyTree = trees.PyTree

# How `params` and their average are compared.
_AVERAGE = {'anchor_name': 'the average', 'any_float': True}


def uniform_soup(
  models: Sequence[PyTree] | PyTree, *, stacked: bool = False
) -> PyTree:
  """Average N models.

  Args:
    models: a sequence of N >= 2 trees, or with `stacked` one tree of leaves
      `[N, ...]`.
    stacked: True if `models` is one tree.

  Returns:
    One tree of the models' dtypes, averaged in float32 (float64 for
    float64). Leaves that are not floating point must agree.

  Raises:
    ValueError: if the trees differ; all differing leaves are named.

  Source: Wortsman et al. Model soups. ICML 2022, arXiv:2203.05482.

  >>> import jax.numpy as jnp
  >>> uniform_soup([{'w': jnp.array([0.0])}, {'w': jnp.array([1.0])}])['w']
  Array([0.5], dtype=float32)
  """
  if stacked:
    trees.stack_size(models)  # refuses what has no axis of models
    first = jax.tree.map(trees.first_of_stack, models)
  else:
    trees.check_sequence(models, least=2)
    first = models[0]
  family = trees.align(
    first, models, stacked=stacked, anchor_name='the first model'
  )
  models = family.models
  columns = models[0] if stacked else list(zip(*models, strict=True))
  means = _means(family.floats(columns), num_models=family.num_models)
  return family.tree(means, family.agreed)


def wise_ft(
  anchor: PyTree,
  model: PyTree,
  alpha: float | Sequence[float] | np.ndarray | jax.Array = 0.5,
) -> PyTree:
  """Interpolate by WiSE-FT: (1 - alpha) anchor + alpha model.

  Args:
    anchor: the pretrained (zero-shot) weights.
    model: one fine-tuned model, a tree like the anchor.
    alpha: position between them, in [0, 1]: 0 is the anchor, 1 the model.
      A number, or `[K]` for a sweep in one compiled call. The default is what
      the paper recommends where nothing can be tuned on.

  Returns:
    A tree of the anchor's structure and dtypes; of a sweep one stacked tree,
    leaves `[K, ...]` (`ms.unstack` takes it apart). Leaves that are not
    floating point are the model's.

  Raises:
    ValueError: if the trees differ (all differing leaves are named), or if an
      alpha is outside [0, 1], as far as its value is known (not under `jit`).

  Source: Wortsman et al. Robust fine-tuning of zero-shot models. CVPR 2022,
  arXiv:2109.01903, equation 2.

  >>> import jax.numpy as jnp
  >>> anchor, model = {'w': jnp.zeros(1)}, {'w': jnp.ones(1)}
  >>> wise_ft(anchor, model, alpha=0.25)['w']
  Array([0.25], dtype=float32)
  >>> wise_ft(anchor, model, alpha=[0.0, 0.5, 1.0])['w'].tolist()
  [[0.0], [0.5], [1.0]]
  """
  alpha = _check_unit_interval('alpha', alpha, max_ndim=1)
  merged = _map_pairs(_interpolate, anchor, model, alpha)
  if not alpha.ndim:
    return merged
  return jax.tree.map(
    lambda leaf: (
      jnp.stack([leaves_lib.as_jax(leaf)] * alpha.size)
      if leaves_lib.is_array(leaf) and not leaves_lib.is_floating(leaf)
      else leaf
    ),
    merged,
  )


def ema(average: PyTree, params: PyTree, decay: float | jax.Array) -> PyTree:
  r"""Advance an exponential moving average by one step.

  $$ \bar w \leftarrow \beta \bar w + (1 - \beta) w $$

  Nothing is corrected: after n steps the average holds what it started from
  with weight $\beta^n$. Start from the weights that training starts from, and
  it is a mean of weights that occurred; the scale has no bias then. Started
  from zeros it would have to be divided by $1 - \beta^n$.

  Args:
    average: average of the steps so far, a tree of arrays, in float32 or wider:
      rounding to bfloat16 would swallow changes of less than 1/256.
    params: the weights of this step, a tree like it, of any floating dtype.
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
  checked = _check_unit_interval('decay', decay)
  return _map_pairs(_ema, average, params, checked, **_AVERAGE)


def swa(average: PyTree, params: PyTree, count: int | jax.Array) -> PyTree:
  r"""Add one model to a plain mean: stochastic weight averaging.

  $$ \bar w \leftarrow \frac{n \bar w + w}{n + 1} $$

  There is no bias: with n = 0 the average counts for nothing, and after any
  number of models it is their mean. Which steps to average (the ends of
  epochs, at a constant or cyclic rate) is up to the caller. Statistics of
  batch normalisation, if any, have to be computed anew; CLIP has none.

  Args:
    average: the mean of `count` models, a tree of arrays; float32 or wider.
    params: one more model, a tree like it, of any floating dtype.
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
  if not leaves_lib.is_tracer(count):
    count = jax.device_get(count)
    if np.ndim(count) or not count >= 0:
      raise ValueError(f'count: must be a number of models >= 0, got {count}.')
  return _map_pairs(_swa, average, params, count, **_AVERAGE)


@functools.partial(jax.jit, static_argnames='num_models')
def _means(columns: list[Any], *, num_models: int) -> list[jax.Array]:
  return [
    trees.mean(column, num_models).astype(column[0].dtype) for column in columns
  ]


def _map_pairs(
  formula: Callable[..., jax.Array],
  anchor: PyTree,
  model: PyTree,
  scalar: Any,
  **options: Any,
) -> PyTree:
  """Apply a formula to each floating leaf of two trees, in one program.

  Args:
    formula: function of a leaf of the anchor, one of the model, and the
      scalar, in float32 or wider; a static argument of the program.
    anchor: a tree of arrays.
    model: a tree like it.
    scalar: a number or an array.
    **options: of `trees.align`.

  Returns:
    The anchor's structure and dtypes; other leaves are the model's.
  """
  family = trees.align(anchor, [model], least=1, **options)
  model = family.models[0]
  pairs = [(family.anchor[i], model[i]) for i in family.floating]
  results = _apply(pairs, leaves_lib.as_jax(scalar), formula=formula)
  return family.tree(results, model)


@functools.partial(jax.jit, static_argnames='formula')
def _apply(pairs, scalar, *, formula):
  result = []
  for pair in pairs:
    dtype = leaves_lib.wide(*(x.dtype for x in pair))
    leaf = formula(*(jnp.asarray(x, dtype) for x in (*pair, scalar)))
    result.append(leaf.astype(pair[0].dtype))
  return result


def _interpolate(anchor, model, alpha):
  if alpha.ndim:
    alpha = jnp.expand_dims(alpha, tuple(range(1, anchor.ndim + 1)))
    anchor, model = anchor[None], model[None]
  return (1 - alpha) * anchor + alpha * model


def _ema(average, leaf, decay):
  return decay * average + (1 - decay) * leaf


def _swa(average, leaf, count):
  # At 0 not even a NaN of the average counts.
  share = 1 / (count + 1)
  return jnp.where(count == 0, leaf, average + share * (leaf - average))


def _check_unit_interval(
  name: str, value: Any, *, max_ndim: int = 0
) -> np.ndarray | jax.Array:
  """Return a number, or an array of them, checked to lie in [0, 1]."""
  if leaves_lib.is_array(value):
    array = jax.device_get(value)  # a traced one stays as it is
  else:
    array = np.asarray(value, np.float64)
  if array.ndim > max_ndim or array.size == 0:
    forms = 'a number or an array [K], K >= 1' if max_ndim else 'a number'
    raise ValueError(f'{name}: must be {forms}, its shape is {array.shape}.')
  if not leaves_lib.is_tracer(array):
    values = array.reshape(-1).tolist()
    if outside := [x for x in values if not 0 <= x <= 1]:
      raise ValueError(f'{name}: must lie in [0, 1], got {outside}.')
  return array
