"""Intervals of means, as the tables of the experiments print them."""

import numpy as np
from scipy import stats


def interval(values: np.ndarray, sign: str = '', digits: int = 1) -> str:
  """Return mean and 95 % confidence interval (Student's t) as text.

  Args:
    values: float64[S], such as differences paired by seed.
    sign: '+' writes the sign of a positive mean.
    digits: after the point.

  >>> interval(np.array([1.0, 2.0, 3.0]), sign='+')
  '+2.0 ± 2.5'
  """
  half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return f'{values.mean():{sign}.{digits}f} ± {half:.{digits}f}'
