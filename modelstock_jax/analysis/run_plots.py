"""Figures of a run and of a comparison: accuracy, merges, training."""

from collections.abc import Sequence
import itertools
import math
import re
from typing import Any

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
from matplotlib import transforms
import numpy as np

from modelstock_jax.analysis import merges as merges_lib
from modelstock_jax.analysis import plots
from modelstock_jax.analysis import results

# A pixel where a label may stand, and on which side of it: (1, 0) is right.
Spot = tuple[np.ndarray, tuple[int, int]]

_DASHES = (0, (4, 3))
_ALPHA = re.compile(r'wise_ft_(\d*\.?\d+)')


def scatter(
  rows: Sequence[results.Row],
  in_distribution: Sequence[str] | None = None,
  *,
  narrow: bool = False,
) -> mpl_figure.Figure:
  """Draws in-distribution accuracy against the mean accuracy of the shifts.

  A small marker for each seed, a large one for the mean with the sd over
  seeds. Where there are several alphas of WiSE-FT, a line leads through them
  from the zero-shot to the fine-tuned model. A zero-shot model far to the left
  of all others would leave them no room: then it is a level line.

  Args:
    rows: of a comparison, with at least one shift.
    in_distribution: as `results.table` takes it.
    narrow: to be read on a telephone.

  Returns:
    The figure, for `plots.save`.

  Raises:
    ValueError: if there are no in-distribution benchmarks or no shifts.
  """
  tests, shifts = results.benchmarks(rows, in_distribution)
  if not (tests and shifts):
    raise ValueError(
      'A scatter needs an in-distribution benchmark and a shift; there are '
      f'{tests} and {shifts}.'
    )
  by_seed = _points(rows, tests, shifts)
  points = {
    method: np.array(list(values.values()))
    for method, values in by_seed.items()
  }
  level = None  # zero-shot, where it is drawn as a line
  if 'zero_shot' in points and _is_far_left(points):
    level = points.pop('zero_shot').mean(0)
  colors = _colors(list(points))
  small = {'font.size': 8.0} if narrow else {}
  with mpl.rc_context(plots.STYLE | small):
    size = (4.5, 4.5) if narrow else (6.4, 4.8)
    figure = mpl_figure.Figure(size, layout='constrained')
    ax = figure.add_subplot()
    curve = _wise_ft_curve(points)
    ax.plot(*curve.T, color=plots.PURPLE, linewidth=1.2, zorder=1)
    for method, values in points.items():
      seeds = list(by_seed[method])
      _draw_seeds(ax, method, seeds, values, colors[method])
    if level is not None:
      line = ax.axhline(
        level[1], color=plots.GREY, linewidth=1, linestyle=_DASHES
      )
      plots.hover(line, [_says(results.title('zero_shot'), *level)])
    # Labels stand beside their points.
    ax.margins(0.5 if narrow else 0.28, 0.14)
    ax.set_xlabel(f'Accuracy on {", ".join(tests)} (test), %')
    ax.set_ylabel(f'Mean accuracy on {len(shifts)} shifts, %')
    number = len({row.seed for row in rows})
    if number > 1:
      ax.set_title(f'Mean and sd over {number} seeds; small: each seed')
    figure.draw_without_rendering()  # places the axes, for what follows
    taken = _boxes(ax, points, curve)
    if level is not None:
      text = f'Zero-shot: {level[1]:.1f} (test: {level[0]:.1f})'
      _write(ax, text, plots.GREY, _along(ax, level[1]), taken)
    for method, values in points.items():
      spots = _around(ax, values.mean(0))
      _write(ax, _label(method), colors[method], spots, taken, weight='bold')
    figure.set_layout_engine('none')  # labels were placed for this one
  return figure


def by_depth(
  merges: merges_lib.Merges, *, narrow: bool = False
) -> mpl_figure.Figure:
  """Draws cosine and ratio of the last merge against depth, by layer kind.

  A small marker for each layer, a line through the means of each kind; all are
  means over seeds.

  Args:
    merges: as `merges.collect` gives them.
    narrow: to be read on a telephone.

  Returns:
    The figure, for `plots.save`.
  """
  with mpl.rc_context(plots.STYLE):
    size = (4.5, 6.6) if narrow else (8.4, 3.8)
    figure = mpl_figure.Figure(size, layout='constrained')
    panels = figure.subplots(
      *((2, 1) if narrow else (1, 2)), sharex=True, sharey=True
    )
    for ax, name, values in zip(
      panels,
      ('Cosine between displacements', 'Ratio (0: anchor, 1: plain average)'),
      (merges.cosine, merges.ratio),
      strict=True,
    ):
      _draw_depth(ax, merges, values[:, -1].mean(0), name.split()[0].lower())
      ax.set_title(name)
      ax.set_xlabel('Block')
      ax.set_xticks(range(len(merges.places)), merges.places)
      ax.xaxis.grid(False)
      ax.yaxis.set_tick_params(labelleft=True)
    low = min(merges.cosine[:, -1].mean(0).min(), 0.9)
    panels[0].set_ylim(math.floor(10 * low) / 10 - 0.02, 1.03)
    _legend(figure, panels[0], 3 if narrow else len(merges.kinds))
  return figure


def over_epochs(
  merges: merges_lib.Merges, *, narrow: bool = False
) -> mpl_figure.Figure:
  """Draws cosine and ratio against the epoch, by layer kind and by depth.

  Every line is a mean over layers and seeds.

  Args:
    merges: as `merges.collect` gives them.
    narrow: to be read on a telephone.

  Returns:
    The figure, for `plots.save`.
  """
  with mpl.rc_context(plots.STYLE):
    size = (4.5, 10.5) if narrow else (8.4, 6.0)
    figure = mpl_figure.Figure(size, layout='constrained')
    panels = figure.subplots(
      *((4, 1) if narrow else (2, 2)), sharex=True, squeeze=False
    ).reshape(2, 2)
    for row, name, values in (
      (panels[0], 'Cosine', merges.cosine.mean(0)),
      (panels[1], 'Ratio (1: plain average)', merges.ratio.mean(0)),
    ):
      by_kind, by_place = row
      by_place.sharey(by_kind)
      quantity = name.split()[0].lower()
      for kind in merges.kinds:
        color, marker = plots.KIND_STYLES[kind]
        chosen = values[:, merges.of_kind(kind)].mean(1)
        _draw_history(
          by_kind, merges.epochs, chosen, kind, quantity, color, marker
        )
      colors = mpl.colormaps['viridis'](np.linspace(0, 0.9, len(merges.places)))
      for place, color in enumerate(colors):
        if merges.at_place(place).any():
          chosen = values[:, merges.at_place(place)].mean(1)
          title = _place_title(merges.places[place])
          _draw_history(
            by_place, merges.epochs, chosen, title, quantity, color, 'o'
          )
      by_kind.set_title(f'{name}, by layer kind')
      by_place.set_title(f'{name}, by depth')
      for ax in row:
        ax.axhline(1, color='#888888', linewidth=1, linestyle=_DASHES)
    for ax in panels[0]:
      ax.legend(loc='lower right', ncols=2, fontsize=8)
    for ax in [panels[1, 1]] if narrow else panels[1]:
      ax.set_xlabel('Merge after epoch')
    panels[1, 0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  return figure


def over_steps(
  lines: merges_lib.Lines, *, narrow: bool = False
) -> mpl_figure.Figure:
  """Draws loss and validation accuracy of a run against the step.

  Args:
    lines: of its metrics.jsonl.
    narrow: to be read on a telephone.

  Returns:
    The figure, for `plots.save`.
  """
  colors = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE, plots.RED)
  train = [line for line in lines if line['kind'] == 'train']
  tested = [line for line in lines if line['kind'] == 'validation']
  with mpl.rc_context(plots.STYLE):
    size = (4.5, 5.4) if narrow else (8.4, 3.2)
    figure = mpl_figure.Figure(size, layout='constrained')
    left, right = figure.subplots(*((2, 1) if narrow else (1, 2)), sharex=True)
    steps = [line['step'] for line in train]
    for model in range(len(train[0]['loss']) if train else 0):
      # null: a number that is not finite
      losses = [line['loss'][model] for line in train]
      values = np.array(losses, float)
      known = np.isfinite(values)
      points = left.plot(
        np.array(steps)[known],
        values[known],
        color=colors[model % len(colors)],
        marker='o',
        markersize=2.5,
        linewidth=1,
        label=f'model {model}',
      )
      plots.hover(
        points,
        [
          f'model {model}, step {step}: loss {value:.4g}'
          for step, value in zip(steps, values, strict=True)
          if np.isfinite(value)
        ],
      )
    if train:
      left.legend(loc='upper right')
    points = right.plot(
      [line['step'] for line in tested],
      [100 * line['accuracy'] for line in tested],
      color=plots.BLACK,
      marker='o',
      markersize=3.5,
      linewidth=1.2,
    )
    plots.hover(
      points,
      [
        f'after epoch {line["epoch"]}: {100 * line["accuracy"]:.2f} %'
        for line in tested
      ],
    )
    left.set_title('Training loss of a batch')
    right.set_title('Accuracy of the merge on the validation split, %')
    for ax in [right] if narrow else [left, right]:
      ax.set_xlabel('Step')
    right.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  return figure


def _draw_history(
  ax: mpl_axes.Axes,
  epochs: Sequence[int],
  values: np.ndarray,
  label: str,
  quantity: str,
  color: Any,
  marker: str,
) -> None:
  """Values [E] against the epoch."""
  points = ax.plot(
    epochs,
    values,
    color=color,
    marker=marker,
    markersize=3.5,
    linewidth=1.2,
    label=label,
  )
  plots.hover(
    points,
    [
      f'{label}, after epoch {epoch}: mean {quantity} {value:.3f}'
      for epoch, value in zip(epochs, values, strict=True)
    ],
  )


def _points(
  rows: Sequence[results.Row], tests: Sequence[str], shifts: Sequence[str]
) -> dict[str, dict[int, np.ndarray]]:
  """By method and seed [2]: accuracy on tests and on shifts, percent."""
  points = {}
  for method in results.methods(rows):
    x = results.per_seed(rows, method, tests)
    y = results.per_seed(rows, method, shifts)
    both = {k: np.array([100 * x[k], 100 * y[k]]) for k in x if k in y}
    if both:
      points[method] = both
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
  spare = [plots.RED, plots.SKY, '#a6761d', '#332288']
  others = [method for method in methods if method not in plots.METHOD_COLORS]
  return plots.METHOD_COLORS | {
    method: plots.PURPLE if _alpha(method) else spare[index % len(spare)]
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


def _draw_seeds(
  ax: mpl_axes.Axes,
  method: str,
  seeds: Sequence[int],
  values: np.ndarray,
  color: str,
) -> None:
  """Points [S, 2], their mean and, of several, their sd."""
  name = results.title(method)
  mean = values.mean(0)
  text = _says(name, *mean)
  if len(values) > 1:
    small = ax.plot(*values.T, 'o', color=color, alpha=0.35, ms=4, mew=0)
    plots.hover(
      small,
      [
        _says(f'{name}, seed {seed}', *at)
        for seed, at in zip(seeds, values, strict=True)
      ],
    )
    sd = values.std(0, ddof=1)
    text = _says(f'{name}, mean of {len(values)} seeds', *mean, *sd)
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
  large = ax.plot(*mean, 'o', color=color, ms=9, mec='white', mew=1, zorder=4)
  plots.hover(large, [text])


def _says(
  name: str,
  test: float,
  shifts: float,
  test_sd: float | None = None,
  shifts_sd: float | None = None,
) -> str:
  """What a point of the scatter is, in percent."""
  numbers = [
    f'{what} {mean:.1f}' + ('' if sd is None else f' ± {sd:.1f}') + ' %'
    for what, mean, sd in (
      ('test', test, test_sd),
      ('mean of shifts', shifts, shifts_sd),
    )
  ]
  return f'{name}: {", ".join(numbers)}'


def _draw_depth(
  ax: mpl_axes.Axes,
  merges: merges_lib.Merges,
  values: np.ndarray,
  quantity: str,
) -> None:
  """Values [L] against place; kinds are set side by side."""
  places = np.array([layer.place for layer in merges.layers])
  for index, kind in enumerate(merges.kinds):
    color, marker = plots.KIND_STYLES[kind]
    chosen = merges.of_kind(kind)
    shift = 0.07 * (index - (len(merges.kinds) - 1) / 2)
    small = ax.plot(
      places[chosen] + shift,
      values[chosen],
      marker,
      color=color,
      alpha=0.35,
      markersize=4,
      mew=0,
    )
    plots.hover(
      small,
      [
        f'{merges.layers[layer].name}: {quantity} {values[layer]:.3f}'
        for layer in np.flatnonzero(chosen)
      ],
    )
    at = np.unique(places[chosen])
    means = [values[chosen & (places == place)].mean() for place in at]
    large = ax.plot(
      at + shift,
      means,
      color=color,
      marker=marker,
      markersize=6,
      mec='white',
      mew=0.7,
      linewidth=1.2,
      label=kind,
    )
    plots.hover(
      large,
      [
        f'{kind}, {_place_title(merges.places[place])}: mean {quantity} '
        f'{mean:.3f}'
        for place, mean in zip(at, means, strict=True)
      ],
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
    box = transforms.Bbox(corners).padded(margin * plots.DPI / 72)
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
    (center + distance * plots.DPI / 72 * np.array(side), side)
    for distance in (8, 14, 22)
    for side in sides
  ]


def _along(ax: mpl_axes.Axes, y: float) -> list[Spot]:
  """Spots for the label of a level line: above or below, at its ends."""
  frame = ax.get_window_extent()
  height = ax.transData.transform((0, y))[1]
  margin = 2 * plots.DPI / 72
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
  weight: str = 'normal',
) -> None:
  """Writes a label at the spot where it covers least, and notes the place."""
  drawn = ax.text(
    0,
    0,
    text,
    color=color,
    fontweight=weight,
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
  # In parts of the axes: an SVG has other pixels.
  drawn.set_transform(ax.transAxes)
  x, y = ax.transAxes.inverted().transform(center)
  drawn.set_position((x, y))
  taken.append(box)


def _overlap(one: transforms.Bbox, other: transforms.Bbox) -> float:
  """The area two boxes share, in square pixels."""
  width = min(one.x1, other.x1) - max(one.x0, other.x0)
  height = min(one.y1, other.y1) - max(one.y0, other.y0)
  return max(width, 0) * max(height, 0)
