"""The neighbours of Model Stock: plain averages and interpolations."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp

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
    first = trees.select(models, 0)
  else:
    first = trees.as_sequence(models)[0]
  family = trees.align(first, models, stacked=stacked)
  columns = family.models[0] if stacked else zip(*family.models, strict=True)

  def average(leaf: Any, column: Any) -> Any:
    if not trees.is_floating(leaf):
      return leaf
    return trees.mean(column, family.num_models).astype(leaf.dtype)

  return family.treedef.unflatten(map(average, family.anchor, columns))


def wise_ft(
  anchor: PyTree, model: PyTree, *, alpha: float | jax.Array
) -> PyTree:
  """WiSE-FT: (1 - alpha) anchor + alpha model.

  Args:
    anchor: the pretrained (zero-shot) weights.
    model: one fine-tuned model, a tree like the anchor.
    alpha: where to stand between them: 0 is the anchor, 1 the model.

  Returns:
    A tree of the anchor's structure and dtypes. Leaves that are not floating
    point are the model's.

  Raises:
    ValueError: if the trees differ; all differing leaves are named.

  Source: Wortsman et al. Robust fine-tuning of zero-shot models. CVPR 2022,
  arXiv:2109.01903, equation 2.

  >>> import jax.numpy as jnp
  >>> wise_ft({'w': jnp.zeros(1)}, {'w': jnp.ones(1)}, alpha=0.25)['w']
  Array([0.25], dtype=float32)
  """
  family = trees.align(anchor, [model, model], stacked=False)

  def interpolate(w0: Any, w1: Any) -> Any:
    if not trees.is_floating(w0):
      return w1
    dtype = trees.wide(w0.dtype)
    a = jnp.asarray(alpha, dtype)
    return ((1 - a) * w0.astype(dtype) + a * w1.astype(dtype)).astype(w0.dtype)

  return family.treedef.unflatten(
    map(interpolate, family.anchor, family.models[0])
  )
