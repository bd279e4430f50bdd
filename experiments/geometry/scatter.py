"""Accuracy in distribution and on shifts: models, soups, merges, WiSE-FT.

The paper's claim: Model Stock of two models lies above and to the right of
single models, and of the curves that WiSE-FT draws from the anchor to each.
"""

from collections.abc import Sequence
from typing import Any

import jax
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import points as points_lib
from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.report import plots
from modelstock_jax.report import results

LEAST = 2  # models
ALPHAS = tuple(np.linspace(0, 1, 11).round(2).tolist())
CURVES = 3  # models of which WiSE-FT is shown
PAIRS = 8  # of which average and merge are shown


def report(
  family: family_lib.Family,
  scorer: points_lib.Scorer,
  benchmarks: Sequence[str],
) -> dict[str, Any]:
  """Measure accuracy of the models, their merges, and WiSE-FT between.

  Args:
    family: models to merge by twos, in their order, and all together.
    scorer: the evaluation of its network.
    benchmarks: their names.

  Returns:
    'points', each with 'method', 'models' and 'accuracy' by benchmark; and
    'curves', each with 'models' and a list of points with 'alpha'.
  """
  models, names = family.models, family.names
  entries: list[tuple[str, list[str], Any]] = [('zero_shot', [], family.anchor)]
  entries += [
    ('fine_tuned', [name], model)
    for name, model in zip(names, models, strict=True)
  ]
  sets = [[i, i + 1] for i in range(0, len(models) - 1, 2)][:PAIRS]
  if len(models) > 2:
    sets.append(list(range(len(models))))
  for chosen in sets:
    some = [models[i] for i in chosen]
    merged = merging.model_stock(family.anchor, some, layers=clip.clip_layers)
    of = [names[i] for i in chosen]
    entries.append(('uniform_soup', of, family_lib.mean(some)))
    entries.append(('model_stock_end', of, jax.device_get(merged.params)))
  entries += [
    ('model_stock_epoch', [run], merged)
    for run, merged in family.epoch_merges.items()
  ]
  # A few at a time, as they all are whole models.
  accuracies = [
    accuracy
    for start in range(0, len(entries), scorer.chunk)
    for accuracy in _score(
      scorer, [e[2] for e in entries[start : start + scorer.chunk]], benchmarks
    )
  ]
  curves = []
  for name, model in zip(names[:CURVES], models, strict=False):
    curve = points_lib.by_point(
      scorer(
        _wise_ft,
        (family.anchor, model),
        np.array(ALPHAS, np.float32),
        benchmarks,
      )
    )
    curves.append(
      {
        'models': [name],
        'points': [
          {'alpha': alpha, 'accuracy': accuracy}
          for alpha, accuracy in zip(ALPHAS, curve, strict=True)
        ],
      }
    )
  return {
    'points': [
      {'method': method, 'models': of, 'accuracy': accuracy}
      for (method, of, _), accuracy in zip(entries, accuracies, strict=True)
    ],
    'curves': curves,
  }


def _score(
  scorer: points_lib.Scorer, models: list[Any], benchmarks: Sequence[str]
) -> list[dict[str, float]]:
  """Measure accuracy of whole models, by benchmark."""
  # Always as many, so that there is one program.
  padded = models + models[-1:] * (scorer.chunk - len(models))
  accuracies = scorer(
    points_lib.pick,
    points_lib.stack(padded),
    np.arange(scorer.chunk, dtype=np.int32),
    benchmarks,
  )
  return points_lib.by_point(accuracies)[: len(models)]


def _wise_ft(ends: tuple[Any, Any], alphas: jax.Array) -> Any:
  return merging.wise_ft(*ends, alpha=alphas)


def draw(report: drawing.Report) -> dict[str, mpl_figure.Figure]:
  """Draw accuracy in distribution against the mean of the shifts."""
  tests, shifts = drawing.split(report['points'][0]['accuracy'])
  figure = mpl_figure.Figure((6.6, 5.0), layout='constrained')
  ax = figure.add_subplot()

  def place(points: Sequence[drawing.Report]) -> np.ndarray:
    return 100 * np.array(
      [
        [
          np.mean([point['accuracy'][name] for name in names])
          for names in (tests, shifts or tests)
        ]
        for point in points
      ]
    )

  for k, curve in enumerate(report['curves']):
    _draw_curve(ax, curve, place(curve['points']), labelled=not k)
  most = max(len(point['models']) for point in report['points'])
  markers: dict[tuple[str, str, bool], list[drawing.Report]] = {}
  for point in report['points']:
    method, number = point['method'], len(point['models'])
    large = number == most and method in _SEVERAL
    title = results.title(method)
    if method in _SEVERAL:
      title = f'{_SEVERAL[method]} of {number}'
    markers.setdefault((title, method, large), []).append(point)
  for (title, method, large), points in markers.items():
    _draw_points(ax, points, place(points), title, method, large)
  ax.set_xlabel(f'Accuracy on {", ".join(tests)} (test), %')
  ax.set_ylabel(
    f'Mean accuracy on {len(shifts)} shifts, %'
    if shifts
    else f'Accuracy on {", ".join(tests)}, %'
  )
  ax.legend(loc='best')
  # 'scatter' is the name of a figure of the report.
  return {'_wise_ft': figure}


_SEVERAL = {'uniform_soup': 'Average', 'model_stock_end': 'Model Stock'}


def _draw_curve(
  ax: mpl_axes.Axes,
  curve: drawing.Report,
  places: np.ndarray,
  *,
  labelled: bool,
) -> None:
  """Draw WiSE-FT from the anchor to a model."""
  texts = [
    f'WiSE-FT {point["alpha"]:g} of {curve["models"][0]}: {x:.1f}, {y:.1f}'
    for point, (x, y) in zip(curve['points'], places, strict=True)
  ]
  label = 'WiSE-FT, from anchor to model' if labelled else None
  style = dict(color=plots.PURPLE, marker='.', ms=4, lw=1, zorder=2)
  plots.points(ax, places[:, 0], places[:, 1], texts, label=label, **style)


def _draw_points(
  ax: mpl_axes.Axes,
  points: Sequence[drawing.Report],
  places: np.ndarray,
  title: str,
  method: str,
  large: bool,
) -> None:
  """Draw the models of one method."""
  marker = {'zero_shot': 'X', 'fine_tuned': 'o'}.get(method, 's')
  texts = []
  for point, (x, y) in zip(points, places, strict=True):
    names = ''
    if len(point['models']) < 5:
      names = f' ({", ".join(point["models"]) or "anchor"})'
    texts.append(f'{title}{names}: {x:.1f}, {y:.1f}')
  plots.points(
    ax,
    places[:, 0],
    places[:, 1],
    texts,
    marker='*' if large else marker,
    color=plots.METHOD_COLORS.get(method, plots.SKY),
    ms=14 if large else 7 if method == 'zero_shot' else 5.5,
    ls='',
    mec='white',
    mew=0.7,
    label=title,
    zorder=5 if large else 4,
  )
