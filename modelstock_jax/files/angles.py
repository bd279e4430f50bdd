"""The formulas of the merge in float64, for inner products on the host.

They are those of `modelstock_jax.merging.geometry`, which are written for
compiled programs; tests hold the two together.
"""

import numpy as np

from modelstock_jax.merging import options

# Models in float32 that cancel do so up to its rounding.
_EPS = float(np.finfo(np.float32).eps)


def mean_cosine(
  gram: np.ndarray, average: options.Average = 'cosine'
) -> np.ndarray:
  """The mean cosine over pairs of displacements.

  Args:
    gram: float64[..., N, N] inner products of N displacements.
    average: of the cosines, or the cosine of the mean 'angle'.

  Returns:
    float64[...]. A pair of which one displacement is zero has cosine 0.

  >>> float(mean_cosine(np.array([[4.0, 1.0], [1.0, 1.0]])))
  0.5
  """
  i, j = np.triu_indices(gram.shape[-1], k=1)
  squares = np.diagonal(gram, axis1=-2, axis2=-1)
  large = np.maximum(squares[..., i], squares[..., j])
  small = np.minimum(squares[..., i], squares[..., j])
  unmoved = small == 0  # not `<= 0`: a NaN must stay one
  large, small = np.where(unmoved, 1, large), np.where(unmoved, 1, small)
  # No product of squared norms, which would underflow for short steps.
  cosines = gram[..., i, j] / large * np.sqrt(large / small)
  cosines = np.where(unmoved, 0.0, cosines)
  if average == 'angle':
    return np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1)), axis=-1))
  return np.mean(cosines, axis=-1)


def ratio(
  cosine: np.ndarray,
  num_models: int,
  *,
  clip: bool = True,
  strength: float = 1.0,
) -> np.ndarray:
  """How far from the anchor to the mean of the models the merge lies.

  t = N cos / (1 + (N - 1) cos), times `strength`.

  Args:
    cosine: float64[...].
    num_models: N >= 2.
    clip: take the cosine for one in [0, 1].
    strength: multiplies the ratio.

  Returns:
    float64[...]; 0 where the displacements cancel, 1 + (N - 1) cos = 0.

  Source: Jang et al., Model Stock, ECCV 2024, equation 3 and appendix.

  >>> round(float(ratio(np.array(0.5), 2)), 4)
  0.6667
  """
  if clip:
    cosine = np.clip(cosine, 0.0, 1.0)
  denominator = 1 + (num_models - 1) * cosine
  cancelled = denominator <= 4 * num_models * _EPS
  safe = np.where(cancelled, 1.0, denominator)
  return strength * np.where(cancelled, 0.0, num_models * cosine / safe)
