"""Model Stock: merging few fine-tuned models by the angle between them."""

from collections.abc import Sequence
import functools
import itertools
import re
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.merging import geometry
from modelstock_jax.merging import layers as layers_lib
from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import options as options_lib
from modelstock_jax.merging import trees

PyTree = trees.PyTree


class Merged(NamedTuple):
  """Result of a merge.

  Attributes:
    params: the merged weights, structure and dtypes of the anchor.
    cosine: for each leaf the raw mean pairwise cosine between displacements,
      float32, never clipped (but for parity, see `clip`); a scalar, or shaped
      as the separate layers or filters of the leaf. None for a leaf that is
      not floating point.
    ratio: as `cosine`, the interpolation ratio t that was used (after
      `clip` and `strength`): 0 is the anchor, 1 the mean of the models.
  """

  params: PyTree
  cosine: PyTree
  ratio: PyTree

  def __repr__(self) -> str:
    """Return the number of leaves, and mean and range of cosine and ratio."""
    values = list(itertools.chain(*_by_kind(self).values()))
    if not values:  # it is traced, or holds shapes or shardings
      return f'Merged{tuple(self)}'
    cosine, ratio = _cells(values)
    return f'Merged({len(values)} leaves: cosine {cosine}, ratio {ratio})'

  def _repr_markdown_(self) -> str:
    """Return a table for notebooks, a row for each kind of leaf."""
    kinds = _by_kind(self)
    rows = [
      f'| {kind} | {len(values)} | {" | ".join(_cells(values))} |'
      for kind, values in kinds.items()
    ]
    more = [f'| ... {len(rows) - 20} more | | | |'] if len(rows) > 20 else []
    head = [repr(self), '', '| leaves | number | cosine | ratio |']
    return '\n'.join([*head, '|:--|--:|--:|--:|', *rows[:20], *more])


def _by_kind(merged: Merged) -> dict[str, list[tuple[float, float]]]:
  """Return cosine and ratio of each leaf, by its path without numbers.

  Where a leaf holds several layers or filters, their means.
  """
  leaves = jax.tree.leaves((merged.cosine, merged.ratio))
  known = (jax.Array, np.ndarray, np.generic)
  traced = any(map(leaves_lib.is_tracer, leaves))
  if traced or not all(
    isinstance(x, known) and leaves_lib.is_local(x) for x in leaves
  ):
    return {}
  kinds: dict[str, list[tuple[float, float]]] = {}
  for (path, cosine), (_, ratio) in zip(
    trees.leaf_means(merged.cosine), trees.leaf_means(merged.ratio), strict=True
  ):
    kinds.setdefault(re.sub(r'\d+', '*', path), []).append((cosine, ratio))
  return kinds


def _cells(values: list[tuple[float, float]]) -> list[str]:
  """Return mean and range of the cosines, and of the ratios."""
  return [
    f'{np.mean(x):.3f}'
    + (f' ({min(x):.3f} to {max(x):.3f})' if len(x) > 1 else '')
    for x in zip(*values, strict=True)
  ]


def model_stock(
  anchor: PyTree,
  models: Sequence[PyTree] | PyTree,
  *,
  stacked: bool = False,
  layers: layers_lib.Layers | None = None,
  unit: options_lib.Unit = 'layer',
  average: options_lib.Average = 'cosine',
  clip: options_lib.Clip = True,
  strength: float | jax.Array = 1.0,
) -> Merged:
  r"""Merge N fine-tuned models by the angle between their displacements.

  For each layer, with displacements $d_i = w_i - w_0$ from the anchor and
  $\cos\theta$ the mean of their pairwise cosines,

  $$ w_H = t\,\bar w + (1 - t)\,w_0, \qquad
     t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}. $$

  Layers on which the models agree go to their mean; where the models are
  orthogonal, what they learnt is noise, and the layer stays the anchor.

  Works under `jit`, `vmap` and `grad`, and on sharded arrays without
  gathering them: per layer only N(N+1)/2 scalars cross devices.

  Args:
    anchor: w_0, the common initialisation of the models: any tree of
      float16, bfloat16, float32 or float64 arrays.
    models: a sequence of N >= 2 trees like the anchor, or, with `stacked`,
      one tree whose leaves are `[N, ...]`.
    stacked: True if `models` is one stacked tree (see `ms.stack`).
    layers: which leaves share a cosine and which leaf axes hold separate
      layers: a function of a leaf's path ('block_0/query/kernel') and the
      anchor's leaf, returning a `Layer`, or None for a layer of its own. By
      default each leaf is a layer, as in the paper. PyTorch checkpoints hold
      query, key and value in one tensor: to reproduce the paper the three
      need one group (`modelstock_jax.clip.clip_layers` does it for CLIP).
    unit: what shares a cosine: a 'layer'; a 'filter', each slice of a leaf
      along its output axis (leaves with one axis are one unit); the 'model'.
    average: for N > 2 take the mean of the pairwise 'cosine's (the authors'
      choice) or of the 'angle's.
    clip: clip the cosine to [0, 1] before it becomes a ratio, so that a
      layer never moves away from the models (negative cosines) or beyond
      their mean. False for the formula as it is; 'authors' or 'mergekit' for
      parity with their code to the letter: cosines that are clipped to [-1, 1]
      instead, d_i.d_j / (|d_i| |d_j| + 1e-8) of the authors' notebook, or
      d_i.d_j / max(|d_i| |d_j|, 1e-6).
    strength: multiplies every ratio, >= 0; 0 returns the anchor. A traced one
      is not checked.

  Returns:
    `Merged(params, cosine, ratio)`. Statistics are computed in float32
    (float64 for float64 leaves), `params` have the anchor's dtypes.

    Limits: a layer that no model moved stays the anchor exactly; so does one
    that only one of two models moved (a zero displacement has no angle and
    counts as orthogonal); identical models give t = 1 and are returned,
    up to rounding; opposite models (mean cosine -1/(N-1)) give the
    anchor, clipped or not. Leaves that are not floating point (integers,
    random keys, functions) must agree across models and are passed through.
    NaN in a model makes its layer NaN, cosine included: see `ms.not_finite`.

  Raises:
    ValueError: for fewer than two models, an empty tree, an unknown option, a
      strength that is not one finite number >= 0, torch tensors, float64
      without jax_enable_x64, or trees that differ; all differing leaves are
      named at once. Also inside `shard_map`, unless every device has complete
      leaves.

  Source: Jang, Yun, Han. Model Stock: All we need is just a few fine-tuned
  models. ECCV 2024, arXiv:2403.19522, equation 3 and appendix; mean of
  pairwise cosines: the authors in issue 2 of naver-ai/model-stock.

  >>> import jax.numpy as jnp
  >>> import modelstock_jax as ms
  >>> anchor = {'w': jnp.array([1.0, 1.0])}
  >>> models = [{'w': jnp.array([3.0, 1.0])}, {'w': jnp.array([1.0, 3.0])}]
  >>> merged = ms.model_stock(anchor, models)  # at right angles: the anchor
  >>> float(merged.cosine['w']), merged.params['w'].tolist()
  (0.0, [1.0, 1.0])
  """
  options = options_lib.StockOptions(unit, average, clip)
  return merge(
    anchor, models, options, stacked=stacked, layers=layers, strength=strength
  )


def merge(
  anchor: PyTree,
  models: Sequence[PyTree] | PyTree,
  options: options_lib.StockOptions,
  *,
  stacked: bool = False,
  layers: layers_lib.Layers | None = None,
  strength: float | jax.Array = 1.0,
) -> Merged:
  """Merge as `model_stock` does, with its options in one value."""
  family, static = layers_lib.prepare(anchor, models, stacked, layers, options)
  strength = leaves_lib.number('strength', strength)
  if not leaves_lib.is_tracer(strength) and strength < 0:
    raise ValueError(f'strength: must be at least 0, got {strength}.')
  strength = leaves_lib.as_jax(strength)
  merged, cosines, ratios = _merge(*family.arrays(), strength, static=static)
  params = family.tree(merged, family.agreed)
  return Merged(params, family.tree(cosines), family.tree(ratios))


def displacement_cosine(
  anchor: PyTree,
  models: Sequence[PyTree] | PyTree,
  *,
  stacked: bool = False,
  layers: layers_lib.Layers | None = None,
  unit: options_lib.Unit = 'layer',
  average: options_lib.Average = 'cosine',
) -> PyTree:
  """Compute the mean pairwise cosine of displacements, layer by layer.

  Args:
    anchor: see `model_stock`, as all others.
    models: N >= 2 trees, or one stacked tree.
    stacked: True if `models` is one tree.
    layers: grouping of leaves that share a cosine.
    unit: 'layer', 'filter' or 'model'.
    average: 'cosine' or 'angle'.

  Returns:
    The anchor's structure with float32 cosines, `model_stock(...).cosine`.

  >>> import jax.numpy as jnp
  >>> w0, w1, w2 = jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
  >>> round(float(displacement_cosine(w0, [w1, w2])), 4)
  0.7071
  """
  options = options_lib.StockOptions(unit, average)
  family, static = layers_lib.prepare(anchor, models, stacked, layers, options)
  return family.tree(_cosines(*family.arrays(), static=static))


def not_finite(merged: Merged) -> list[str]:
  """List paths of the merged leaves that hold a NaN or an infinity.

  Args:
    merged: a merge outside of `jit`; its values are looked at on the device.

  Returns:
    Paths in the tree's order; empty when all is well.

  >>> import jax.numpy as jnp
  >>> nan = {'a': jnp.array([jnp.nan]), 'b': jnp.ones(1)}
  >>> not_finite(model_stock({'a': jnp.ones(1), 'b': jnp.ones(1)}, [nan, nan]))
  ['a']
  """
  leaves = {
    path: leaves_lib.on_device(x)
    for path, x in jax.tree_util.tree_leaves_with_path(merged.params)
    if leaves_lib.is_floating(x)
  }
  finite = jax.device_get(_all_finite(list(leaves.values())))
  pairs = zip(leaves, finite, strict=True)
  return [leaves_lib.path_name(path) for path, ok in pairs if not ok]


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.all(jnp.isfinite(x)) for x in leaves]


def describe(merged: Merged) -> str:
  """Describe a merge in text: cosine and ratio of every leaf.

  Args:
    merged: a merge outside of `jit`.

  Returns:
    Lines 'path  cosine  ratio'; where a leaf holds several layers or
    filters, their means. Leaves that are not finite stand on top.

  >>> import jax.numpy as jnp
  >>> ones = {'w': jnp.ones(2)}
  >>> print(describe(model_stock({'w': jnp.zeros(2)}, [ones, ones])))
  leaf  cosine  ratio
  w      1.000  1.000
  """
  cosines = trees.leaf_means(merged.cosine)
  ratios = trees.leaf_means(merged.ratio)
  width = max([len('leaf'), *(len(path) for path, _ in cosines)])
  lines = [f'not finite: {path}' for path in not_finite(merged)]
  lines.append(f'{"leaf":<{width}}  cosine  ratio')
  for (path, cosine), (_, ratio) in zip(cosines, ratios, strict=True):
    lines.append(f'{path:<{width}}  {cosine:6.3f}  {ratio:5.3f}')
  return '\n'.join(lines)


@functools.partial(jax.jit, static_argnames='static')
def _cosines(anchors, models, *, static: layers_lib.Static):
  """Compute the raw cosine of each leaf."""
  options, cosine_of = static.options, {}
  for group, (gram, scales) in layers_lib.grams(
    anchors, models, static
  ).items():
    if isinstance(options.clip, str):  # which adds to the norms as they are
      gram = layers_lib.unscaled(gram, scales)
    cosine_of[group] = geometry.mean_cosine(gram, options.average, options.clip)
  return [cosine_of[unit.group] for unit in static.units]


@functools.partial(jax.jit, static_argnames='static')
def _merge(anchors, models, strength, *, static: layers_lib.Static):
  """Compute the merged leaves, their cosines and their ratios."""
  # One program: XLA lets the sums lie where the merged leaves will.
  cosines = _cosines(anchors, models, static=static)
  merged, ratios = [], []
  for anchor, column, cosine, unit in zip(
    anchors,
    layers_lib.columns(models, static),
    cosines,
    static.units,
    strict=True,
  ):
    clipped = (
      jnp.clip(cosine, 0.0, 1.0) if static.options.clip is True else cosine
    )
    ratio = geometry.interpolation_ratio(clipped, static.num_models)
    ratio = ratio * jnp.asarray(strength, ratio.dtype)
    mean = trees.mean(column, static.num_models)
    merged.append(_interpolate(anchor, mean, ratio, unit.keep))
    ratios.append(ratio)
  return merged, cosines, ratios


def _interpolate(anchor, mean, ratio, keep):
  """Compute (1 - t) w_0 + t mean(w_i), exact at t = 0 and at t = 1."""
  ratio = layers_lib.spread(ratio, anchor, keep, mean.dtype)
  merged = (1 - ratio) * anchor.astype(mean.dtype) + ratio * mean
  return merged.astype(anchor.dtype)
