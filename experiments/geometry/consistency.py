"""Angles and norms of displacements: by layer kind, by depth, over epochs.

The paper's claim: within a kind of layer, at a depth and at an epoch, the angle
between the displacements of two models and the norm of one hardly depend on
which models they are; biases, norms and the head agree more than matrices do.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker
import numpy as np

from experiments.geometry import centre
from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import plots

LEAST = 2  # models


def angles(products: np.ndarray) -> np.ndarray:
  """Return the pairwise angles between displacements.

  Args:
    products: float64[L, N, N], see `family.Gram`.

  Returns:
    float64[L, P], degrees; P = N(N-1)/2 pairs. NaN where a model of the pair
    has not moved.

  >>> angles(np.array([[[1.0, 1.0], [1.0, 2.0]]])).round(3).tolist()
  [[45.0]]
  """
  norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
  columns = []
  for i, j in centre.pairs_of(products.shape[-1]):
    under = norms[:, i] * norms[:, j]
    cosine = products[:, i, j] / np.where(under > 0, under, np.nan)
    columns.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
  return np.stack(columns, axis=1)


def report(gram: family_lib.Gram, family: family_lib.Family) -> dict[str, Any]:
  """Measure angles and norms as JSON values.

  Args:
    gram: of the family, N >= 2 models.
    family: the models, with the histories of their runs.

  Returns:
    'layers' and 'kinds' with mean and sd of 'angle' (degrees, over pairs) and
    'norm' (|d|, over models); of a kind its layers are averaged first, so that
    the sd is that over models alone. 'epochs' with the mean angle and norm of
    each kind and run, where the metrics have them.

  Raises:
    ValueError: there is only one model.
  """
  number = len(family.models)
  if number < 2:
    raise ValueError(f'Angles need two models or more; here are {number}.')
  angle = angles(gram.products)
  norm = np.sqrt(np.diagonal(gram.products, axis1=1, axis2=2))
  layers = [
    {**layer._asdict(), 'angle': _spread(angle[k]), 'norm': _spread(norm[k])}
    for k, layer in enumerate(gram.layers)
  ]
  kinds = {}
  for kind in gram.kinds:
    chosen = gram.of_kind(kind)
    kinds[kind] = {
      'layers': int(chosen.sum()),
      'angle': _spread(_known_mean(angle[chosen])),
      'norm': _spread(norm[chosen].mean(axis=0)),
    }
  return {
    'models': family.names,
    'diverged': family.diverged,
    'places': gram.places,
    'kinds': kinds,
    'layers': layers,
    'epochs': over_epochs(family.histories),
  }


def over_epochs(histories: Sequence[merges_lib.Lines]) -> dict[str, Any]:
  """Average angle and norm of each kind at each epoch, for each run.

  Args:
    histories: lines of metrics.jsonl, of runs that merged alike.

  Returns:
    'epochs', E numbers, and 'angle' (degrees) and 'norm' (|d|): for each kind
    a list of runs, each a list of E. Empty where no epoch is in all runs.
  """
  runs = [
    {line['epoch']: line for line in lines if line['kind'] == 'merge'}
    for lines in histories
  ]
  epochs = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
  if not epochs:
    return {}
  paths = list(runs[0][epochs[0]]['cosine'])
  groups, layers, _ = merges_lib.group_layers(paths)
  result: dict[str, Any] = {'epochs': epochs, 'angle': {}, 'norm': {}}
  for run in runs:
    cosine, squares = (
      np.array(
        [
          [
            combine([run[epoch][name][p] ** power for p in group])
            for group in groups.values()
          ]
          for epoch in epochs
        ]
      )
      for name, power, combine in (('cosine', 1, np.mean), ('norm', 2, np.sum))
    )
    for kind in {layer.kind: None for layer in layers}:
      chosen = [layer.kind == kind for layer in layers]
      angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
      angle[squares == 0] = np.nan  # what has not moved has none
      for name, values in (('angle', angle), ('norm', np.sqrt(squares))):
        means = _known_mean(values[:, chosen].T).tolist()
        result[name].setdefault(kind, []).append(means)
  return result


def _known_mean(values: np.ndarray) -> np.ndarray:
  """Return the mean over the layers that moved."""
  return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def _spread(values: np.ndarray) -> dict[str, float]:
  """Return the mean and, of several values, the standard deviation."""
  values = values[~np.isnan(values)]
  if not len(values):  # where nothing moved
    return {'mean': float('nan'), 'sd': float('nan')}
  sd = values.std(ddof=1) if len(values) > 1 else float('nan')
  return {'mean': float(values.mean()), 'sd': float(sd)}


def draw(report: drawing.Report) -> dict[str, mpl_figure.Figure]:
  """Draw angle and norm: by layer kind, by depth, and over epochs."""
  epochs, kinds = report['epochs'], list(report['kinds'])
  figure = mpl_figure.Figure(
    (8.4, 8.4 if epochs else 5.8), layout='constrained'
  )
  rows = figure.subplots(3 if epochs else 2, 2)
  for column, (name, unit, title) in enumerate(
    (
      ('angle', '°', 'Angle, degrees'),
      ('norm', '', 'Norm of the displacement'),
    )
  ):
    axes = rows[:, column]
    _draw_kinds(axes[0], report, name, unit)
    axes[0].set_title(title)
    _draw_depth(axes[1], report, name, unit)
    axes[1].set_title(f'{title}, by depth')
    axes[1].set_xlabel('Block')
    if epochs:
      _draw_epochs(axes[2], epochs, name, unit, kinds)
      axes[2].set_title(f'{title}, over epochs')
    for ax in axes:
      if name == 'norm':
        ax.set_yscale('log')
        ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
      else:
        ax.set_ylim(bottom=0)
  drawing.note(
    figure,
    f'Means and sd over {len(report["models"])} models, or their pairs; above, '
    'small: each layer, large: mean of its kind',
  )
  plots.legend(figure, rows[1, 0], len(kinds))
  return {'': figure}


def _draw_kinds(
  ax: mpl_axes.Axes, report: drawing.Report, name: str, unit: str
) -> None:
  """Draw the means of kinds with their sd over models; small: each layer."""
  kinds = list(report['kinds'])
  for x, kind in enumerate(kinds):
    color, marker = plots.KIND_STYLES[kind]
    layers = [
      layer
      for layer in report['layers']
      if layer['kind'] == kind and _is_drawn(name, layer[name]['mean'])
    ]
    if not layers:
      continue  # nothing of this kind has moved
    spread = np.linspace(-0.22, 0.22, len(layers)) if len(layers) > 1 else [0.0]
    means = [layer[name]['mean'] for layer in layers]
    texts = [
      f'{layer["name"]}: {mean:.3g}{unit}'
      for layer, mean in zip(layers, means, strict=True)
    ]
    style = dict(color=color, alpha=0.35, ms=3.5, ls='', mew=0)
    plots.points(ax, x + np.asarray(spread, float), means, texts, **style)
    value = report['kinds'][kind][name]
    sd = drawing.number(value['sd'])
    if np.isfinite(sd):
      ax.errorbar(
        x, value['mean'], sd, color=color, capsize=3, fmt='none', zorder=3
      )
    texts = [f'{kind}: {value["mean"]:.3g}{unit}, sd {sd:.2g}']
    style = dict(color=color, marker=marker, ms=8, ls='', mec='white', zorder=4)
    plots.points(ax, x, value['mean'], texts, **style)
  ax.set_xticks(range(len(kinds)), kinds)
  ax.xaxis.grid(False)


def _is_drawn(name: str, value: float | None) -> bool:
  """Return False for what has not moved: no angle, and no log of its norm."""
  return value is not None and bool(
    np.isfinite(value) and (name != 'norm' or value > 0)
  )


def _draw_depth(
  ax: mpl_axes.Axes, report: drawing.Report, name: str, unit: str
) -> None:
  """Draw a line through the means of each kind, with a band of one sd."""
  places = report['places']
  titles = [f'block {p}' if p.isdigit() else p for p in places]
  for kind in report['kinds']:
    by_place: dict[int, list[drawing.Report]] = {}
    for layer in report['layers']:
      if layer['kind'] == kind and _is_drawn(name, layer[name]['mean']):
        by_place.setdefault(layer['place'], []).append(layer[name])
    x = sorted(by_place)
    mean = np.array([np.mean([v['mean'] for v in by_place[p]]) for p in x])
    sd = np.array(
      [np.mean([drawing.number(v['sd']) for v in by_place[p]]) for p in x]
    )
    texts = [
      f'{kind}, {titles[p]}: {v:.3g}{unit}'
      for p, v in zip(x, mean, strict=True)
    ]
    drawing.kind_line(ax, kind, x, mean, sd, texts, label=kind)
  ax.set_xticks(range(len(places)), places)
  ax.xaxis.grid(False)


def _draw_epochs(
  ax: mpl_axes.Axes,
  epochs: drawing.Report,
  name: str,
  unit: str,
  kinds: Sequence[str],
) -> None:
  """Draw a line through the means over runs of each kind, with a band."""
  for kind in kinds:
    if kind not in epochs[name]:
      continue
    runs = np.array(epochs[name][kind], float)
    known = np.array([_is_drawn(name, v) for v in runs.mean(0)])
    at, runs = np.array(epochs['epochs'])[known], runs[:, known]
    mean = runs.mean(0)
    texts = [
      f'{kind}, epoch {e}: {v:.3g}{unit}' for e, v in zip(at, mean, strict=True)
    ]
    sd = runs.std(0, ddof=1) if len(runs) > 1 else np.full(len(at), np.nan)
    drawing.kind_line(ax, kind, at, mean, sd, texts)
  ax.set_xlabel('Epoch')
  ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
