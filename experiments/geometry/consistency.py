"""Angles and norms of displacements: by layer kind, by depth, over epochs.

The paper's claim: within a kind of layer, at a depth and at an epoch, the angle
between the displacements of two models and the norm of one hardly depend on
which models they are; biases, norms and the head agree more than matrices do.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import gram as gram_lib
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import plots

LEAST = 2  # models


def report(family: family_lib.Family) -> dict[str, Any]:
  """Measure angles and norms as JSON values.

  Args:
    family: N >= 2 models, with the histories of their runs.

  Returns:
    'layers' and 'kinds' with mean and sd of 'angle' (degrees, over pairs) and
    'norm' (|d|, over models); of a kind its layers are averaged first, so that
    the sd is that over models alone. 'epochs' with the mean angle and norm of
    each kind and run, where the metrics have them.
  """
  gram, kinds = family.gram, {}
  angle = _degrees(gram_lib.cosines(gram.products))
  norm = np.sqrt(np.diagonal(gram.products, axis1=1, axis2=2))
  for kind, chosen in merges_lib.by_kind(gram.layers).items():
    kinds[kind] = {
      'layers': int(chosen.sum()),
      'angle': drawing.spread(_known_mean(angle[chosen])),
      'norm': drawing.spread(norm[chosen].mean(axis=0)),
    }
  layers = [
    {
      **layer._asdict(),
      'angle': drawing.spread(angle[index]),
      'norm': drawing.spread(norm[index]),
    }
    for index, layer in enumerate(gram.layers)
  ]
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
    {x['epoch']: x for x in lines if x['kind'] == 'merge' and x['cosine']}
    for lines in histories
  ]
  epochs = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
  if not epochs:
    return {}
  paths = list(runs[0][epochs[0]]['cosine'])
  groups, layers, _ = merges_lib.group_layers(paths)
  # bool[L, number of paths], True where a path is of a layer.
  member = np.array([[p in group for p in paths] for group in groups.values()])
  result: dict[str, Any] = {'epochs': epochs, 'angle': {}, 'norm': {}}
  for run in runs:
    cosine, norm = (
      np.array([[run[epoch][name][path] for epoch in epochs] for path in paths])
      for name in ('cosine', 'norm')
    )
    angle = _degrees(member @ cosine / member.sum(axis=1, keepdims=True))
    norm = np.sqrt(member @ norm**2)
    angle[norm == 0] = np.nan  # what has not moved has none
    for kind, chosen in merges_lib.by_kind(layers).items():
      for name, values in (('angle', angle), ('norm', norm)):
        means = _known_mean(values[chosen]).tolist()
        result[name].setdefault(kind, []).append(means)
  return result


def _degrees(cosine: np.ndarray) -> np.ndarray:
  return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def _known_mean(values: np.ndarray) -> np.ndarray:
  """Return the mean over the layers that moved."""
  return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def draw(report: drawing.Report) -> mpl_figure.Figure:
  """Draw angle and norm: by layer kind, by depth, and over epochs."""
  kinds, epochs = list(report['kinds']), report['epochs']
  number = 3 if epochs else 2
  figure = mpl_figure.Figure((8.4, 2.8 * number), layout='constrained')
  columns = figure.subplots(number, 2).T
  titles = {'angle': 'Angle, degrees', 'norm': 'Norm of the displacement'}
  for axes, (name, title) in zip(columns, titles.items(), strict=True):
    for x, kind in enumerate(kinds):
      _draw_line(axes[0], kind, [x], [report['kinds'][kind][name]])
      _draw_depth(axes[1], kind, name, report)
      if epochs:
        runs = np.array(epochs[name][kind], float)
        spreads = [drawing.spread(values) for values in runs.T]
        _draw_line(axes[2], kind, epochs['epochs'], spreads)
    axes[0].set_xticks(range(len(kinds)), kinds)
    axes[1].set_xticks(range(len(report['places'])), report['places'])
    whens = ('by kind', 'by depth, in blocks', 'over epochs')
    for ax, when in zip(axes, whens, strict=False):
      ax.set_title(f'{title}, {when}')
      if name == 'norm':
        ax.set_yscale('log')
      else:
        ax.set_ylim(bottom=0)
  models = len(report['models'])
  drawing.note(figure, f'Means and sd over {models} models, or their pairs')
  plots.legend(figure, columns[0, 1], len(kinds))
  return figure


def _draw_depth(
  ax: mpl_axes.Axes, kind: str, name: str, report: drawing.Report
) -> None:
  """Draw a line through the means of a kind by depth, with a band of one sd."""
  layers = [layer for layer in report['layers'] if layer['kind'] == kind]
  places = sorted({layer['place'] for layer in layers})
  spreads = []
  for place in places:
    here = [layer[name] for layer in layers if layer['place'] == place]
    means = np.array([[s['mean'], s['sd']] for s in here], float).mean(axis=0)
    spreads.append(dict(zip(('mean', 'sd'), means, strict=True)))
  _draw_line(ax, kind, places, spreads)


def _draw_line(
  ax: mpl_axes.Axes, kind: str, x: list[int], spreads: list[drawing.Report]
) -> None:
  """Draw a line of a kind with bars of one sd, without what has not moved."""
  color, marker = plots.KIND_STYLES[kind]
  mean, sd = np.array([[s['mean'], s['sd']] for s in spreads], float).T
  mean = np.where(mean > 0, mean, np.nan)
  style = dict(color=color, marker=marker, ms=4.5, mec='white', capsize=2)
  ax.errorbar(x, mean, np.nan_to_num(sd), label=kind, **style)
