r"""Inner products around the centre of all fine-tuned models.

The centre mu is not known. Any vector from it is therefore estimated with
models that have no part in the vector: of the M others

$$ (x - \mu) \cdot (y - \mu) \approx
   \frac{1}{M (M - 1)} \sum_{a \ne b} (x - d_a) \cdot (y - d_b), $$

which has no bias, where the mean of the others would be off by their own
distance from the centre.
"""

import numpy as np

LEAST = 4  # models: a pair, and two others that locate the centre


def from_centre(
  products: np.ndarray, x: np.ndarray, y: np.ndarray, others: np.ndarray
) -> np.ndarray:
  """Estimate (x - mu) . (y - mu), with the centre located by other models.

  Args:
    products: float64[..., N, N], inner products of displacements.
    x: float64[N] or [..., N], a point as its shares of the displacements; all
      zeros is the anchor.
    y: another point, or the same.
    others: bool[N], M >= 2 models of which the points have no share.

  Returns:
    float64[...].

  >>> points, others = np.eye(4), np.arange(4) > 1
  >>> from_centre(np.eye(4), points[0], points[1], others).item()
  0.0
  """
  number = int(others.sum())
  mean = others / number
  inside = products[..., others, :][..., others]
  diagonal = np.trace(inside, axis1=-2, axis2=-1)
  pairs = number * (number - 1)
  apart = (inside.sum((-2, -1)) - diagonal) / pairs  # mean of d_a . d_b
  return (
    product(products, x, y)
    - product(products, x, mean)
    - product(products, y, mean)
    + apart
  )


def product(products: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Return the inner product of two points given as shares of displacements.

  Args:
    products: float64[..., N, N], inner products of displacements.
    x: float64[N] or [..., N].
    y: float64[N] or [..., N].

  Returns:
    float64[...].
  """
  return np.einsum('...i,...ij,...j->...', x, products, y)


def pairs_of(number: int) -> list[tuple[int, int]]:
  """Return the pairs (i, j) of models with i < j."""
  return [(i, j) for i in range(number) for j in range(i + 1, number)]


def check(number: int) -> None:
  """Raise a ValueError if there are too few models to locate the centre."""
  if number < LEAST:
    raise ValueError(
      f'The shell needs {LEAST} models or more, of which {LEAST - 2} or more '
      f'say where the centre is; here are {number}. Train more seeds, or with '
      'a greater merge.num_models.'
    )
