"""Helpers that several figures of the analysis share."""

from collections.abc import Sequence
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from modelstock_jax.report import plots
from modelstock_jax.report import results

Report = dict[str, Any]  # the content of a JSON file of the analysis

NOTE = '#444444'


def note(figure: mpl_figure.Figure, text: str) -> None:
  """Write a remark below a figure."""
  figure.supxlabel(text, fontsize=8.5, color=NOTE)


def kind_line(
  ax: mpl_axes.Axes,
  kind: str,
  x: Sequence[int] | np.ndarray,
  mean: np.ndarray,
  sd: np.ndarray,
  texts: Sequence[str],
  *,
  label: str | None = None,
) -> None:
  """Draw the line of a kind of layer, and a band of one sd where it is known.

  Args:
    ax: where to draw.
    kind: of the layers.
    x: places of the points, [n].
    mean: float64[n].
    sd: float64[n]; NaN of a single value.
    texts: of the points.
    label: in the legend.
  """
  color, marker = plots.KIND_STYLES[kind]
  style = dict(color=color, marker=marker, label=label)
  plots.points(ax, x, mean, texts, ms=4.5, mec='white', lw=1.2, **style)
  if np.isfinite(sd).all():
    low = np.maximum(mean - sd, mean / 10)  # a log scale has no zero
    ax.fill_between(x, low, mean + sd, color=color, alpha=0.12, linewidth=0)


def split(accuracy: Report) -> tuple[list[str], list[str]]:
  """Split benchmarks into those in distribution and the shifts."""
  tests = [name for name in accuracy if name in results.IN_DISTRIBUTION]
  aside = (*tests, *results.EXCLUDED_FROM_MEAN)
  return tests, [name for name in accuracy if name not in aside]


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
  tests, shifts = split(accuracy)
  titles = {f'{", ".join(tests)} (test)': tests}
  if shifts:
    title = f'{len(shifts)} shifts (mean)' if len(shifts) > 1 else shifts[0]
    titles[title] = shifts
  figure = mpl_figure.Figure((4.4 * len(titles), 4.2), layout='constrained')
  axes = figure.subplots(1, len(titles), squeeze=False)[0]
  return figure, [
    (ax, title, names)
    for ax, (title, names) in zip(axes, titles.items(), strict=True)
  ]


def number(value: float | None) -> float:
  """Return a number of a JSON file: NaN for null."""
  return float('nan') if value is None else value
