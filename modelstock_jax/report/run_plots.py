"""Figures of merges, of a run or of files, and of training."""

import math

import matplotlib as mpl
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
import numpy as np

from modelstock_jax import files
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import plots


@mpl.rc_context(plots.STYLE)
def by_depth(merges: merges_lib.Merges) -> mpl_figure.Figure:
  """Draw cosine and ratio of the last merge against depth, by layer kind.

  A small marker for each layer, a line through the means of each kind; all are
  means over seeds.

  Args:
    merges: as `merges.collect` returns them.

  Returns:
    The figure, for `plots.save`.
  """
  figure = mpl_figure.Figure((8.4, 3.8), layout='constrained')
  panels = figure.subplots(1, 2, sharex=True, sharey=True)
  ticks = range(0, len(merges.places), math.ceil(len(merges.places) / 20))
  cosine, ratio = merges.cosine[:, -1].mean(0), merges.ratio[:, -1].mean(0)
  for ax, title, values in (
    (panels[0], 'Cosine between displacements', cosine),
    (panels[1], 'Ratio (0: anchor, 1: plain average)', ratio),
  ):
    _draw_depth(ax, merges, values, title.split()[0].lower())
    ax.set_title(title)
    ax.set_xlabel('Block')
    ax.set_xticks(ticks, [merges.places[tick] for tick in ticks])
    ax.xaxis.grid(False)
    ax.yaxis.set_tick_params(labelleft=True)
  # A ratio far below 0 would leave the others no room.
  low = min(cosine.min(), max(ratio.min(), 0.0), 0.9)
  panels[0].set_ylim(low - 0.05, 1.03)
  plots.legend(figure, panels[0], len(plots.KIND_STYLES))
  return figure


def of_files(merged: files.Merge) -> dict[str, bytes]:
  """Draw a merge of files as .svg and .png, of `unit='filter'` the means.

  Args:
    merged: the merge.

  Returns:
    The contents of the two files by name; none if no tensor was merged.
  """
  if not merged.cosine:
    return {}
  stem = merged.report.stem
  line = {'cosine': merged.cosine, 'ratio': merged.ratio}
  figure = by_depth(merges_lib.collect([{0: line}]))
  return {
    f'{stem}.svg': plots.svg(figure).encode(),
    f'{stem}.png': plots.png(figure),
  }


@mpl.rc_context(plots.STYLE)
def over_epochs(merges: merges_lib.Merges) -> mpl_figure.Figure:
  """Draw cosine and ratio against the epoch, by layer kind and by depth.

  Every line is a mean over layers and seeds.

  Args:
    merges: as `merges.collect` returns them.

  Returns:
    The figure, for `plots.save`.
  """
  figure = mpl_figure.Figure((8.4, 6.0), layout='constrained')
  panels = figure.subplots(2, 2, sharex=True, sharey='row')
  colors = mpl.colormaps['viridis'](np.linspace(0, 0.9, len(merges.places)))
  kinds = [
    (kind, chosen, *plots.KIND_STYLES[kind])
    for kind, chosen in merges_lib.by_kind(merges.layers).items()
  ]
  place_of = np.array([layer.place for layer in merges.layers])
  places = [
    (_place_title(merges.places[k]), place_of == k, colors[k], 'o')
    for k in np.unique(place_of)
  ]
  for row, name, values in (
    (panels[0], 'Cosine', merges.cosine.mean(0)),
    (panels[1], 'Ratio (1: plain average)', merges.ratio.mean(0)),
  ):
    quantity = name.split()[0].lower()
    for ax, by, groups in (
      (row[0], 'layer kind', kinds),
      (row[1], 'depth', places),
    ):
      for label, chosen, color, marker in groups:
        means = values[:, chosen].mean(1)
        texts = [
          f'{label}, after epoch {epoch}: mean {quantity} {mean:.3f}'
          for epoch, mean in zip(merges.epochs, means, strict=True)
        ]
        style = dict(color=color, marker=marker, label=label)
        plots.points(ax, merges.epochs, means, texts, ms=3.5, lw=1.2, **style)
      ax.set_title(f'{name}, by {by}')
      ax.axhline(1, color=plots.GREY, linewidth=1, linestyle=plots.DASHES)
  for top, bottom in panels.T:
    top.legend(loc='lower right', ncols=2, fontsize=8)
    bottom.set_xlabel('Merge after epoch')
  panels[1, 0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  return figure


@mpl.rc_context(plots.STYLE)
def over_steps(lines: merges_lib.Lines) -> mpl_figure.Figure:
  """Draw loss and validation accuracy of a run against the step.

  Args:
    lines: of its metrics.jsonl.

  Returns:
    The figure, for `plots.save`.
  """
  figure = mpl_figure.Figure((8.4, 3.2), layout='constrained')
  left, right = figure.subplots(1, 2, sharex=True)
  train = [line for line in lines if line['kind'] == 'train']
  steps = [line['step'] for line in train]
  # null, a number that is not finite, leaves a gap
  losses = np.array([line['loss'] for line in train], float)
  for model, values in enumerate(losses.T):
    texts = [
      f'model {model}, step {step}: loss {value:.4g}'
      for step, value in zip(steps, values, strict=True)
    ]
    style = dict(ms=2.5, lw=1, label=f'model {model}')
    plots.points(left, steps, values, texts, **style)
  if train:
    left.legend(loc='upper right')
  validation = [line for line in lines if line['kind'] == 'validation']
  steps = [line['step'] for line in validation]
  percent = [100 * line['accuracy'] for line in validation]
  texts = [
    f'after epoch {line["epoch"]}: {100 * line["accuracy"]:.2f} %'
    for line in validation
  ]
  style = dict(ms=3.5, lw=1.2, color=plots.BLACK)
  plots.points(right, steps, percent, texts, **style)
  left.set_title('Training loss of a batch')
  right.set_title('Accuracy of the merge on the validation split, %')
  for ax in (left, right):
    ax.set_xlabel('Step')
  right.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  return figure


def _draw_depth(
  ax: mpl_axes.Axes,
  merges: merges_lib.Merges,
  values: np.ndarray,
  quantity: str,
) -> None:
  """Draw values [L] against place, with kinds side by side."""
  places = np.array([layer.place for layer in merges.layers])
  kinds = merges_lib.by_kind(merges.layers)
  for index, (kind, chosen) in enumerate(kinds.items()):
    color, marker = plots.KIND_STYLES[kind]
    shift = 0.07 * (index - (len(kinds) - 1) / 2)
    texts = [
      f'{merges.layers[layer].name}: {quantity} {values[layer]:.3f}'
      for layer in np.flatnonzero(chosen)
    ]
    style = dict(color=color, marker=marker)
    x, y = places[chosen] + shift, values[chosen]
    plots.points(ax, x, y, texts, ms=4, ls='', alpha=0.35, mew=0, **style)
    at = np.unique(places[chosen])
    means = [values[chosen & (places == place)].mean() for place in at]
    texts = [
      f'{kind}, {_place_title(merges.places[place])}: mean {quantity} '
      f'{mean:.3f}'
      for place, mean in zip(at, means, strict=True)
    ]
    style |= dict(mec='white', mew=0.7, label=kind)
    plots.points(ax, at + shift, means, texts, ms=6, lw=1.2, **style)


def _place_title(place: str) -> str:
  return f'block {place}' if place.isdigit() else place
