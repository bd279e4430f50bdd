"""Figures of a comparison, as PNG files."""

from collections.abc import Sequence
import itertools
import math
import os
import re

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
from matplotlib import transforms
import numpy as np

from modelstock_jax.analysis import merges as merges_lib
from modelstock_jax.analysis import results

PathLike = str | os.PathLike[str]

# A pixel where a label may stand, and on which side of it: (1, 0) is right.
Spot = tuple[np.ndarray, tuple[int, int]]

# The palette of Okabe and Ito, which the colour-blind can tell apart.
_BLUE = '#0072b2'
_ORANGE = '#e69f00'
_GREEN = '#009e73'
_PURPLE = '#cc79a7'
_RED = '#d55e00'
_SKY = '#56b4e9'
_GREY = '#666666'
_BLACK = '#000000'

_METHOD_COLORS = {
  'zero_shot': _GREY,
  'fine_tuned': _BLACK,
  'uniform_soup': _ORANGE,
  'wise_ft_0.5': _PURPLE,
  'model_stock_end': _BLUE,
  'model_stock_epoch': _GREEN,
}
_KIND_STYLES = {
  'attention': (_BLUE, 'o'),
  'mlp': (_RED, 's'),
  'norm': (_GREEN, '^'),
  'bias': (_PURPLE, 'v'),
  'embedding': (_ORANGE, 'D'),
  'head': (_BLACK, 'P'),
}
_STYLE = {
  'font.size': 9.0,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': '#888888',
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.titlesize': 9.5,
  'axes.titlelocation': 'left',
  'grid.color': '#e6e6e6',
  'grid.linewidth': 0.6,
  'xtick.color': '#444444',
  'ytick.color': '#444444',
  'legend.frameon': False,
}
_DASHES = (0, (4, 3))
_DPI = 200  # twice that of a screen
_ALPHA = re.compile(r'wise_ft_(\d*\.?\d+)')


def scatter(
  rows: Sequence[results.Row],
  path: PathLike,
  in_distribution: Sequence[str] | None = None,
) -> None:
  """Draws in-distribution accuracy against the mean accuracy of the shifts.

  A small marker for each seed, a large one for the mean with the sd over
  seeds. Where there are several alphas of WiSE-FT, a line leads through them
  from the zero-shot to the fine-tuned model. A zero-shot model far to the left
  of all others would leave them no room: then it is a level line.

  Args:
    rows: of a comparison, with at least one shift.
    path: of the PNG file to write.
    in_distribution: as `results.table` takes it.

  Raises:
    ValueError: if there are no in-distribution benchmarks or no shifts.
  """
  tests, shifts = results.benchmarks(rows, in_distribution)
  if not (tests and shifts):
    raise ValueError(
      'A scatter needs an in-distribution benchmark and a shift; there are '
      f'{tests} and {shifts}.'
    )
  points = _points(rows, tests, shifts)
  level = None  # zero-shot, where it is drawn as a line
  if 'zero_shot' in points and _is_far_left(points):
    level = points.pop('zero_shot').mean(0)
  colors = _colors(list(points))
  with mpl.rc_context(_STYLE):
    figure = mpl_figure.Figure((6.4, 4.8), dpi=_DPI, layout='constrained')
    ax = figure.add_subplot()
    curve = _wise_ft_curve(points)
    ax.plot(*curve.T, color=_PURPLE, linewidth=1.2, zorder=1)
    for method, values in points.items():
      _draw_seeds(ax, values, colors[method])
    if level is not None:
      ax.axhline(level[1], color=_GREY, linewidth=1, linestyle=_DASHES)
    ax.margins(0.28, 0.14)  # labels stand beside their points
    ax.set_xlabel(f'Accuracy on {", ".join(tests)} (test), %')
    ax.set_ylabel(f'Mean accuracy on {len(shifts)} shifts, %')
    seeds = len({row.seed for row in rows})
    if seeds > 1:
      ax.set_title(f'Mean and sd over {seeds} seeds; small: each seed')
    figure.draw_without_rendering()  # places the axes, for what follows
    taken = _boxes(ax, points, curve)
    if level is not None:
      text = f'Zero-shot: {level[1]:.1f} (test: {level[0]:.1f})'
      _write(ax, text, _GREY, _along(ax, level[1]), taken)
    for method, values in points.items():
      spots = _around(ax, values.mean(0))
      _write(ax, _label(method), colors[method], spots, taken, bold=True)
    figure.savefig(path)


def by_depth(merges: merges_lib.Merges, path: PathLike) -> None:
  """Draws cosine and ratio of the last merge against depth, by layer kind.

  A small marker for each layer, a line through the means of each kind; all are
  means over seeds.

  Args:
    merges: as `merges.collect` gives them.
    path: of the PNG file to write.
  """
  with mpl.rc_context(_STYLE):
    figure = mpl_figure.Figure((8.4, 3.8), dpi=_DPI, layout='constrained')
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, name, values in zip(
      panels,
      ('Cosine between displacements', 'Ratio (0: anchor, 1: plain average)'),
      (merges.cosine, merges.ratio),
      strict=True,
    ):
      last = values[:, -1].mean(0)
      _draw_depth(ax, merges, last)
      ax.set_title(name)
      ax.set_xlabel('Block')
      ax.set_xticks(range(len(merges.places)), merges.places)
      ax.xaxis.grid(False)
      ax.yaxis.set_tick_params(labelleft=True)
    low = min(merges.cosine[:, -1].mean(0).min(), 0.9)
    panels[0].set_ylim(math.floor(10 * low) / 10 - 0.02, 1.03)
    _legend(figure, panels[0], len(merges.kinds))
    figure.savefig(path)


def over_epochs(merges: merges_lib.Merges, path: PathLike) -> None:
  """Draws cosine and ratio against the epoch, by layer kind and by depth.

  Every line is a mean over layers and seeds.

  Args:
    merges: as `merges.collect` gives them.
    path: of the PNG file to write.
  """
  with mpl.rc_context(_STYLE):
    figure = mpl_figure.Figure((8.4, 6.0), dpi=_DPI, layout='constrained')
    panels = figure.subplots(2, 2, sharex=True, sharey='row')
    for row, name, values in (
      (0, 'Cosine', merges.cosine.mean(0)),
      (1, 'Ratio (1: plain average)', merges.ratio.mean(0)),
    ):
      by_kind, by_place = panels[row]
      for kind in merges.kinds:
        color, marker = _KIND_STYLES[kind]
        by_kind.plot(
          merges.epochs,
          values[:, merges.of_kind(kind)].mean(1),
          color=color,
          marker=marker,
          markersize=3.5,
          linewidth=1.2,
          label=kind,
        )
      colors = mpl.colormaps['viridis'](np.linspace(0, 0.9, len(merges.places)))
      for place, color in enumerate(colors):
        if merges.at_place(place).any():
          by_place.plot(
            merges.epochs,
            values[:, merges.at_place(place)].mean(1),
            color=color,
            marker='o',
            markersize=3,
            linewidth=1.2,
            label=_place_title(merges.places[place]),
          )
      by_kind.set_title(f'{name}, by layer kind')
      by_place.set_title(f'{name}, by depth')
      for ax in (by_kind, by_place):
        ax.axhline(1, color='#888888', linewidth=1, linestyle=_DASHES)
      panels[1, row].set_xlabel('Merge after epoch')
    for ax in panels[0]:
      ax.legend(loc='lower right', ncols=2, fontsize=8)
    panels[1, 0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.savefig(path)


def _points(
  rows: Sequence[results.Row], tests: Sequence[str], shifts: Sequence[str]
) -> dict[str, np.ndarray]:
  """For each method [S, 2]: accuracy on tests and shifts by seed, percent."""
  points = {}
  for method in results.methods(rows):
    x = results.per_seed(rows, method, tests)
    y = results.per_seed(rows, method, shifts)
    both = [(100 * x[seed], 100 * y[seed]) for seed in x if seed in y]
    if both:
      points[method] = np.array(both)
  return points


def _is_far_left(points: dict[str, np.ndarray]) -> bool:
  if len(points) < 2:
    return False
  others = np.concatenate(
    [values[:, 0] for method, values in points.items() if method != 'zero_shot']
  )
  gap = others.min() - points['zero_shot'][:, 0].mean()
  return gap > 2 * max(np.ptp(others), 1.0)


def _colors(methods: Sequence[str]) -> dict[str, str]:
  spare = [_RED, _SKY, '#a6761d', '#332288']
  others = [method for method in methods if method not in _METHOD_COLORS]
  return _METHOD_COLORS | {
    method: _PURPLE if _alpha(method) else spare[index % len(spare)]
    for index, method in enumerate(others)
  }


def _alpha(method: str) -> str | None:
  match = _ALPHA.fullmatch(method)
  return match[1] if match else None


def _label(method: str) -> str:
  # Of a curve's points only the known one says what they are.
  known = method in results.METHODS
  return results.title(method) if known else _alpha(method) or method


def _wise_ft_curve(points: dict[str, np.ndarray]) -> np.ndarray:
  """Means [K, 2] of several alphas of WiSE-FT, ascending; K = 0 if of one."""
  curve = {
    float(alpha): values.mean(0)
    for method, values in points.items()
    if (alpha := _alpha(method))
  }
  if len(curve) < 2:
    return np.zeros((0, 2))
  for alpha, method in ((0.0, 'zero_shot'), (1.0, 'fine_tuned')):
    if method in points:
      curve.setdefault(alpha, points[method].mean(0))
  return np.array([curve[alpha] for alpha in sorted(curve)])


def _draw_seeds(ax: mpl_axes.Axes, values: np.ndarray, color: str) -> None:
  """Points [S, 2], their mean and, of several, their sd."""
  mean = values.mean(0)
  ax.plot(*values.T, 'o', color=color, alpha=0.35, markersize=4, mew=0)
  if len(values) > 1:
    sd = values.std(0, ddof=1)
    ax.errorbar(
      mean[0],
      mean[1],
      yerr=sd[1],
      xerr=sd[0],
      color=color,
      elinewidth=1,
      fmt='none',
      zorder=3,
    )
  ax.plot(*mean, 'o', color=color, markersize=9, mec='white', mew=1, zorder=4)


def _draw_depth(
  ax: mpl_axes.Axes, merges: merges_lib.Merges, values: np.ndarray
) -> None:
  """Values [L] against place; kinds are set side by side."""
  places = np.array([layer.place for layer in merges.layers])
  for index, kind in enumerate(merges.kinds):
    color, marker = _KIND_STYLES[kind]
    chosen = merges.of_kind(kind)
    shift = 0.07 * (index - (len(merges.kinds) - 1) / 2)
    ax.plot(
      places[chosen] + shift,
      values[chosen],
      marker,
      color=color,
      alpha=0.35,
      markersize=4,
      mew=0,
    )
    at = np.unique(places[chosen])
    ax.plot(
      at + shift,
      [values[chosen & (places == place)].mean() for place in at],
      color=color,
      marker=marker,
      markersize=6,
      mec='white',
      mew=0.7,
      linewidth=1.2,
      label=kind,
    )
  # A layer that stands apart is worth its name.
  lowest = int(values.argmin())
  left = places[lowest] > (len(merges.places) - 1) / 2
  ax.annotate(
    merges.layers[lowest].name,
    (places[lowest], values[lowest]),
    (-12 if left else 12, 0),
    textcoords='offset points',
    ha='right' if left else 'left',
    va='center',
    fontsize=8,
    color='#444444',
  )


def _place_title(place: str) -> str:
  return f'block {place}' if place.isdigit() else place


def _legend(figure: mpl_figure.Figure, ax: mpl_axes.Axes, columns: int) -> None:
  handles, labels = ax.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper center', ncols=columns)


def _boxes(
  ax: mpl_axes.Axes, points: dict[str, np.ndarray], curve: np.ndarray
) -> list[transforms.Bbox]:
  """Where markers, error bars and the curve are, in pixels."""
  boxes = []

  def add(low: np.ndarray, high: np.ndarray, margin: float) -> None:
    corners = ax.transData.transform([low, high])
    box = transforms.Bbox(corners).padded(margin * _DPI / 72)
    boxes.append(box)

  for values in points.values():
    mean = values.mean(0)
    add(mean, mean, 6)
    for value in values:
      add(value, value, 2)
    if len(values) > 1:
      sd = values.std(0, ddof=1)
      for direction in np.eye(2):
        add(mean - sd * direction, mean + sd * direction, 2)
  for start, end in itertools.pairwise(curve):
    for along in np.linspace(0, 1, 30):
      at = start + along * (end - start)
      add(at, at, 2)
  return boxes


def _around(ax: mpl_axes.Axes, point: np.ndarray) -> list[Spot]:
  """Spots for the label of a point, the best first."""
  center = ax.transData.transform(point)
  sides = ((1, 1), (0, 1), (1, 0), (-1, 1), (0, -1), (1, -1), (-1, 0), (-1, -1))
  return [
    (center + distance * _DPI / 72 * np.array(side), side)
    for distance in (8, 14, 22)
    for side in sides
  ]


def _along(ax: mpl_axes.Axes, y: float) -> list[Spot]:
  """Spots for the label of a level line: above or below, at its ends."""
  frame = ax.get_window_extent()
  height = ax.transData.transform((0, y))[1]
  margin = 2 * _DPI / 72
  return [
    (np.array([x, height + up * margin]), (side, up))
    for up in (-1, 1)
    for x, side in ((frame.x0 + 3 * margin, 1), (frame.x1 - margin, -1))
  ]


def _write(
  ax: mpl_axes.Axes,
  text: str,
  color: str,
  spots: Sequence[Spot],
  taken: list[transforms.Bbox],
  *,
  bold: bool = False,
) -> None:
  """Writes a label at the spot where it covers least, and notes the place."""
  drawn = ax.text(
    0,
    0,
    text,
    color=color,
    fontweight='bold' if bold else 'normal',
    ha='center',
    va='center',
    transform=None,  # pixels
    in_layout=False,
    zorder=5,
  )
  size = np.array(drawn.get_window_extent().size)
  frame = ax.get_window_extent()
  choices = []
  for corner, side in spots:
    center = corner + np.array(side) * size / 2
    box = transforms.Bbox([center - size / 2, center + size / 2])
    outside = size.prod() - _overlap(box, frame)
    covered = sum(_overlap(box, other) for other in taken)
    choices.append((covered + 10 * outside, len(choices), center, box))
  _, _, center, box = min(choices, key=lambda choice: choice[:2])
  drawn.set_position((center[0], center[1]))
  taken.append(box)


def _overlap(one: transforms.Bbox, other: transforms.Bbox) -> float:
  """The area two boxes share, in square pixels."""
  width = min(one.x1, other.x1) - max(one.x0, other.x0)
  height = min(one.y1, other.y1) - max(one.y0, other.y0)
  return max(width, 0) * max(height, 0)
