"""Accuracies of models in percent, and intervals of their means."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from modelstock_jax import data
from modelstock_jax.training import setup as setup_lib


def accuracies(
  setup: setup_lib.Setup,
  models: Sequence[Any],
  benchmarks: Sequence[data.Benchmark],
) -> np.ndarray:
  """Evaluate models in distribution and on shifts.

  Args:
    setup: of the run.
    models: params of M models.
    benchmarks: the one in distribution, and the shifts.

  Returns:
    float64[2, M], percent: in distribution, and the mean of the shifts.
  """
  first, *others = (
    [100 * score.accuracy for score in setup.evaluate(models, benchmark)]
    for benchmark in benchmarks
  )
  return np.stack([first, np.mean(others, axis=0)])


def interval(values: np.ndarray, sign: str = '', digits: int = 1) -> str:
  """Return mean and 95 % confidence interval (Student's t) as text.

  Args:
    values: float64[...], all of them, such as differences paired by seed.
    sign: '+' writes the sign of a positive mean.
    digits: after the point.

  >>> interval(np.array([1.0, 2.0, 3.0]), sign='+')
  '+2.0 ± 2.5'
  """
  values = np.ravel(values)
  half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return f'{values.mean():{sign}.{digits}f} ± {half:.{digits}f}'
