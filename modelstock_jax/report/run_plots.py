"""Figures of a run: merges and training."""

from collections.abc import Sequence
import math
from typing import Any

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
import numpy as np

from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import plots


def by_depth(merges: merges_lib.Merges) -> mpl_figure.Figure:
  """Draw cosine and ratio of the last merge against depth, by layer kind.

  A small marker for each layer, a line through the means of each kind; all are
  means over seeds.

  Args:
    merges: as `merges.collect` returns them.

  Returns:
    The figure, for `plots.save`.
  """
  with mpl.rc_context(plots.STYLE):
    figure = mpl_figure.Figure((8.4, 3.8), layout='constrained')
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
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
    plots.legend(figure, panels[0], len(merges.kinds))
  return figure


def over_epochs(merges: merges_lib.Merges) -> mpl_figure.Figure:
  """Draw cosine and ratio against the epoch, by layer kind and by depth.

  Every line is a mean over layers and seeds.

  Args:
    merges: as `merges.collect` returns them.

  Returns:
    The figure, for `plots.save`.
  """
  with mpl.rc_context(plots.STYLE):
    figure = mpl_figure.Figure((8.4, 6.0), layout='constrained')
    panels = figure.subplots(2, 2, sharex=True)
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
        ax.axhline(1, color='#888888', linewidth=1, linestyle=plots.DASHES)
    for ax in panels[0]:
      ax.legend(loc='lower right', ncols=2, fontsize=8)
    for ax in panels[1]:
      ax.set_xlabel('Merge after epoch')
    panels[1, 0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  return figure


def over_steps(lines: merges_lib.Lines) -> mpl_figure.Figure:
  """Draw loss and validation accuracy of a run against the step.

  Args:
    lines: of its metrics.jsonl.

  Returns:
    The figure, for `plots.save`.
  """
  colors = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE, plots.RED)
  train = [line for line in lines if line['kind'] == 'train']
  tested = [line for line in lines if line['kind'] == 'validation']
  with mpl.rc_context(plots.STYLE):
    figure = mpl_figure.Figure((8.4, 3.2), layout='constrained')
    left, right = figure.subplots(1, 2, sharex=True)
    steps = [line['step'] for line in train]
    for model in range(len(train[0]['loss']) if train else 0):
      # null, a number that is not finite, leaves a gap
      losses = np.array([line['loss'][model] for line in train], float)
      points = left.plot(
        steps,
        losses,
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
          for step, value in zip(steps, losses, strict=True)
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
    for ax in (left, right):
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
  """Draw values [E] against the epoch."""
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


def _draw_depth(
  ax: mpl_axes.Axes,
  merges: merges_lib.Merges,
  values: np.ndarray,
  quantity: str,
) -> None:
  """Draw values [L] against place, with kinds side by side."""
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
