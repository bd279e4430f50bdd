"""Helpers that several figures of the analysis share."""

from collections.abc import Sequence
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from modelstock_jax.report import results

Report = dict[str, Any]  # the content of a JSON file of the analysis

NOTE = '#444444'


def note(figure: mpl_figure.Figure, text: str) -> None:
  """Write a remark below a figure."""
  figure.supxlabel(text, fontsize=8.5, color=NOTE)


def spread(values: np.ndarray) -> dict[str, float]:
  """Return mean and standard deviation of what is finite, NaN if unknown.

  >>> spread(np.array([1.0, 3.0, np.nan]))
  {'mean': 2.0, 'sd': 1.4142135623730951}
  """
  values = values[np.isfinite(values)]
  return {
    'mean': float(values.mean()) if values.size else float('nan'),
    'sd': float(values.std(ddof=1)) if values.size > 1 else float('nan'),
  }


def panels(
  accuracy: Report,
) -> tuple[mpl_figure.Figure, list[tuple[mpl_axes.Axes, str, list[str]]]]:
  """Create a figure with a panel for the tests, and one for shifts if any.

  Args:
    accuracy: a dict with the names of the benchmarks.

  Returns:
    The figure, and for each panel its axes, title and the benchmarks of which
    it shows the mean.
  """
  tests, shifts = results.split(accuracy)
  titles = {f'{", ".join(tests)} (test)': tests}
  if shifts:
    titles[f'{len(shifts)} shifts (mean)'] = shifts
  figure = mpl_figure.Figure((4.4 * len(titles), 4.2), layout='constrained')
  axes = figure.subplots(1, len(titles), squeeze=False)[0]
  return figure, list(zip(axes, titles, titles.values(), strict=True))


def percent(points: Sequence[Report], names: Sequence[str]) -> np.ndarray:
  """Return the mean accuracy of points over benchmarks: float64[P], percent."""
  return np.array(
    [100 * np.mean([point['accuracy'][n] for n in names]) for point in points]
  )
