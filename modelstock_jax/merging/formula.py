"""The formula of the merge, for numpy and for jax alike.

Standard library only: `xp` is the module of the arrays, `numpy` or `jax.numpy`.
"""

from typing import Any


def cosine(
  dot: Any, left: Any, right: Any, xp: Any, clip: bool | str = True
) -> Any:
  """Compute d_i.d_j / (|d_i| |d_j|) from inner products, `[...]` each.

  Args:
    dot: d_i.d_j.
    left: d_i.d_i.
    right: d_j.d_j.
    xp: see above.
    clip: 'authors' or 'mergekit' for the cosine of their code: see
      `options.StockOptions`.

  Returns:
    `[...]`, 1 where the three agree to the last bit, and 0 where a displacement
    is zero: it has no angle and counts as orthogonal.
  """
  large, small = xp.maximum(left, right), xp.minimum(left, right)
  unmoved = small == 0  # not `<= 0`: a NaN must stay one
  large, small = xp.where(unmoved, 1, large), xp.where(unmoved, 1, small)
  if isinstance(clip, str):
    norms = xp.sqrt(large) * xp.sqrt(small)
    norms = norms + 1e-8 if clip == 'authors' else xp.maximum(norms, 1e-6)
    return xp.clip(xp.where(unmoved, 0, dot / norms), -1, 1)
  # No product of the squared norms, which would underflow for short steps.
  return xp.where(unmoved, 0, dot / large * xp.sqrt(large / small))


def ratio(cosine: Any, num_models: int, eps: float, xp: Any) -> Any:
  """Compute t = N cos / (1 + (N - 1) cos), `[...]` of cosines `[...]`.

  Args:
    cosine: mean pairwise cosine between displacements.
    num_models: N.
    eps: the rounding error of the models. Where 1 + (N - 1) cos is 0 up to it,
      the displacements cancel and t is 0.
    xp: see above.

  Source: Jang et al., Model Stock, ECCV 2024, equation 3 (two models) and
  its appendix (N models).
  """
  denominator = 1 + (num_models - 1) * cosine
  cancelled = denominator <= 4 * num_models * eps
  safe = xp.where(cancelled, 1, denominator)
  return xp.where(cancelled, 0, num_models * cosine / safe)


def depth_scale(alpha: Any, beta: Any, depth: Any, last: int) -> Any:
  """Return the scale of LiNeS for a block: alpha + beta depth / last.

  Args:
    alpha: scale of the first block, and of what is outside of blocks.
    beta: increase from the first block to the last.
    depth: index of the block, or an array of such; None outside of blocks.
    last: index of the last block.

  Source: Wang et al., LiNeS, ICLR 2025, equation 2.

  >>> depth_scale(0.2, 0.8, 3, 6), depth_scale(0.2, 0.8, None, 6)
  (0.6000000000000001, 0.2)
  """
  return alpha if depth is None else alpha + beta * (depth / last)
