"""The formula of the merge, for numpy and for jax alike.

Standard library only: `xp` is the module of the arrays, `numpy` or `jax.numpy`.
"""

from typing import Any


def cosine(dot: Any, left: Any, right: Any, xp: Any) -> Any:
  """Compute d_i.d_j / (|d_i| |d_j|) from inner products, `[...]` each.

  Args:
    dot: d_i.d_j.
    left: d_i.d_i.
    right: d_j.d_j.
    xp: see above.

  Returns:
    `[...]`, 1 where the three agree to the last bit, and 0 where a displacement
    is zero: it has no angle and counts as orthogonal.
  """
  large, small = xp.maximum(left, right), xp.minimum(left, right)
  unmoved = small == 0  # not `<= 0`: a NaN must stay one
  large, small = xp.where(unmoved, 1, large), xp.where(unmoved, 1, small)
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
