"""LiNeS: scaling a displacement linearly with depth."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax.merging import formula
from modelstock_jax.merging import leaves as leaves_lib
from modelstock_jax.merging import trees

PyTree = trees.PyTree

# Maps a leaf to its block: ('block_3/mlp/kernel', leaf) -> 3, or None.
Depth = Callable[[str, Any], int | None]


def lines(
  anchor: PyTree,
  model: PyTree,
  depth: Depth,
  *,
  alpha: float | jax.Array = 0.0,
  beta: float | jax.Array = 1.0,
) -> PyTree:
  r"""Keep shallow blocks near the anchor, deep ones near the model: LiNeS.

  $$ w = w_0 + \lambda_\ell (w_1 - w_0), \qquad
     \lambda_\ell = \alpha + \beta \frac{\ell}{L - 1}, \quad
     \ell = 0 \ldots L - 1. $$

  Args:
    anchor: w_0, a tree of arrays.
    model: w_1, a tree like the anchor: one fine-tuned model, or a merge
      (`ms.uniform_soup(models)`, `ms.model_stock(...).params`).
    depth: the block of a leaf, from 0, by its path ('block_3/mlp/kernel') and
      the anchor's leaf. None is outside of blocks: there, as in the authors'
      program, the scale is alpha, for embeddings and for what follows the last
      block alike. A trained classification head has no counterpart there; to
      keep it, give it the depth of the last block. L is one more than the
      deepest block. For the image tower of our CLIP:
      `lambda path, leaf: modelstock_jax.clip.layer_depth(path)`.
    alpha: the scale of the first block. The defaults are those of the authors'
      example; for one model they vary alpha, with beta = 1 - alpha.
    beta: increase of the scale from the first block to the last.

  Returns:
    A tree of the anchor's structure and dtypes. Leaves that are not floating
    point are the model's.

  Raises:
    ValueError: if the trees differ (all differing leaves are named), if depths
      are not block indices, or if there are fewer than two blocks.

  Source: Wang et al. LiNeS: Post-training layer scaling prevents forgetting and
  enhances model merging. ICLR 2025, arXiv:2410.17146.

  >>> import jax.numpy as jnp
  >>> anchor = {f'block_{i}': jnp.zeros(1) for i in range(3)}
  >>> model = {f'block_{i}': jnp.ones(1) for i in range(3)}
  >>> scaled = lines(anchor, model, lambda path, leaf: int(path[-1]))
  >>> [float(leaf[0]) for leaf in scaled.values()]
  [0.0, 0.5, 1.0]
  """
  family = trees.align(anchor, [model], least=1)
  anchors, (models,) = family.arrays()
  depths = _depths(family, depth)
  scales = leaves_lib.number('alpha', alpha), leaves_lib.number('beta', beta)
  scales = map(leaves_lib.as_jax, scales)
  scaled = _scale(anchors, models, *scales, depths=depths)
  return family.tree(scaled, family.agreed)


def _depths(family: trees.Family, depth: Depth) -> tuple[int | None, ...]:
  """Return the block of each floating leaf."""
  paths = [family.paths[i] for i in family.floating]
  depths = list(map(depth, paths, family.floats(family.anchor)))
  blocks = [block for block in depths if block is not None]
  indices = all(isinstance(block, int) and block >= 0 for block in blocks)
  if not indices or max(blocks, default=0) < 1:
    pairs = zip(paths, depths, strict=True)
    shown = '\n  '.join(f'{path}: {block!r}' for path, block in pairs)
    raise ValueError(
      'depth: must return the index of a block (0, 1, ...) or None, and at '
      f'least 2 blocks are needed. It returned\n  {shown}'
    )
  return tuple(depths)


@functools.partial(jax.jit, static_argnames='depths')
def _scale(anchors, models, alpha, beta, *, depths):
  last = max(depth for depth in depths if depth is not None)
  result = []
  for w0, w1, depth in zip(anchors, models, depths, strict=True):
    dtype = leaves_lib.wide(w0.dtype)
    first, rise = jnp.asarray(alpha, dtype), jnp.asarray(beta, dtype)
    scale = formula.depth_scale(first, rise, depth, last)
    leaf = (1 - scale) * w0.astype(dtype) + scale * w1.astype(dtype)
    result.append(leaf.astype(w0.dtype))
  return result
