"""The neighbours of Model Stock: plain averages and interpolations."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.merging import trees

PyTree = trees.PyTree


def uniform_soup(
  models: Sequence[PyTree] | PyTree, *, stacked: bool = False
) -> PyTree:
  """The plain average of N models.

  Args:
    models: a sequence of N >= 2 trees, or with `stacked` one tree of leaves
      `[N, ...]`.
    stacked: which of the two.

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
    first = jax.tree.map(_one_model, models)
  else:
    first = trees.as_sequence(models)[0]
  family = trees.align(
    first, models, stacked=stacked, anchor_name='the first model'
  )
  leaves = family.models
  columns = leaves[0] if stacked else list(zip(*leaves, strict=True))
  means = _means(
    [columns[i] for i in family.floating], num_models=family.num_models
  )
  return family.tree(means, rest=family.anchor)


def wise_ft(
  anchor: PyTree,
  model: PyTree,
  alpha: float | Sequence[float] | np.ndarray | jax.Array = 0.5,
) -> PyTree:
  """WiSE-FT: (1 - alpha) anchor + alpha model.

  Args:
    anchor: the pretrained (zero-shot) weights.
    model: one fine-tuned model, a tree like the anchor.
    alpha: where to stand between them, in [0, 1]: 0 is the anchor, 1 the model.
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
  family = trees.align(anchor, [model], stacked=False, least=1)
  alpha = trees.fractions('alpha', alpha, max_ndim=1)
  leaves = family.models[0]
  between = _between(
    [family.anchor[i] for i in family.floating],
    [leaves[i] for i in family.floating],
    alpha,
  )
  if alpha.ndim:
    leaves = [
      jnp.stack([jnp.asarray(leaf)] * alpha.size)
      if trees.is_array(leaf) and i not in family.floating
      else leaf
      for i, leaf in enumerate(leaves)
    ]
  return family.tree(between, rest=leaves)


def _one_model(leaf: Any) -> Any:
  """What a stacked leaf is in each model; of floats just the shape."""
  if trees.is_floating(leaf):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return leaf[0] if trees.is_array(leaf) else leaf


@functools.partial(jax.jit, static_argnames='num_models')
def _means(columns: list[Any], *, num_models: int) -> list[jax.Array]:
  return [
    trees.mean(column, num_models).astype(column[0].dtype) for column in columns
  ]


@jax.jit
def _between(
  anchors: list[Any], models: list[Any], alpha: Any
) -> list[jax.Array]:
  result = []
  for w0, w1 in zip(anchors, models, strict=True):
    dtype = trees.wide(w0.dtype)
    a, left, right = (jnp.asarray(x, dtype) for x in (alpha, w0, w1))
    if a.ndim:
      a = jnp.expand_dims(a, tuple(range(1, left.ndim + 1)))
      left, right = left[None], right[None]
    leaf = (1 - a) * left + a * right
    result.append(leaf.astype(w0.dtype))
  return result
