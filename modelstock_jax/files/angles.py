"""Cosines and ratios of the merge in float64, of inner products on the host."""

import numpy as np

from modelstock_jax.merging import formula
from modelstock_jax.merging import options

# Models in float32 that cancel do so up to its rounding.
_EPS = float(np.finfo(np.float32).eps)


def mean_cosine(
  gram: np.ndarray,
  average: options.Average = 'cosine',
  clip: options.Clip = True,
) -> np.ndarray:
  """Compute the mean cosine over pairs of displacements.

  Args:
    gram: float64[..., N, N] inner products of N displacements.
    average: mean of the cosines, or the cosine of the mean 'angle'.
    clip: see `formula.cosine`.

  Returns:
    float64[...]. A pair of which one displacement is zero has cosine 0. Of
    one model, which has no pair, NaN.

  >>> float(mean_cosine(np.array([[4.0, 1.0], [1.0, 1.0]])))
  0.5
  """
  if gram.shape[-1] == 1:
    return np.full(gram.shape[:-2], np.nan)
  i, j = np.triu_indices(gram.shape[-1], k=1)
  squares = np.diagonal(gram, axis1=-2, axis2=-1)
  cosines = formula.cosine(
    gram[..., i, j], squares[..., i], squares[..., j], np, clip
  )
  if average == 'angle':
    return np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1)), axis=-1))
  return np.mean(cosines, axis=-1)


def ratio(
  cosine: np.ndarray,
  num_models: int,
  *,
  clip: options.Clip = True,
  strength: float = 1.0,
) -> np.ndarray:
  """Return the ratio: the weight of the mean in the merge.

  t = N cos / (1 + (N - 1) cos), times `strength`.

  Args:
    cosine: float64[...].
    num_models: N >= 2.
    clip: True takes the cosine for one in [0, 1].
    strength: multiplies the ratio.

  Returns:
    float64[...]; 0 where the displacements cancel, 1 + (N - 1) cos = 0.

  Source: Jang et al., Model Stock, ECCV 2024, equation 3 and appendix.

  >>> round(float(ratio(np.array(0.5), 2)), 4)
  0.6667
  """
  if clip is True:
    cosine = np.clip(cosine, 0.0, 1.0)
  return strength * formula.ratio(cosine, num_models, _EPS, np)
