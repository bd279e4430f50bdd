"""Accuracy in distribution and on shifts: models, soups, merges, WiSE-FT.

The paper's claim: Model Stock of two models lies above and to the right of
single models, and of the curves that WiSE-FT draws from the anchor to each.
"""

from typing import Any

from matplotlib import figure as mpl_figure
import numpy as np

from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import points as points_lib
from modelstock_jax.report import plots
from modelstock_jax.report import results

LEAST = 2  # models
ALPHAS = tuple(np.linspace(0, 1, 11).round(2).tolist())
CURVES = 3  # models of which WiSE-FT is shown
PAIRS = 8  # of which average and merge are shown
_KINDS = {'uniform_soup': 'averages', 'model_stock_end': 'merges'}


def report(
  family: family_lib.Family, score: points_lib.Score
) -> dict[str, Any]:
  """Measure accuracy of the models, their merges, and WiSE-FT between.

  Args:
    family: models to merge by twos, in their order, and all together.
    score: the evaluation of its network.

  Returns:
    'points', each with 'method', 'models' and 'accuracy' by benchmark; and
    'curves', each with 'models' and a list of points with 'alpha'.
  """
  names, one = family.names, np.eye(len(family.models))
  points: list[Any] = [({'method': 'zero_shot', 'models': []}, 0 * one[0])]
  for name, share in zip(names, one, strict=True):
    points.append(({'method': 'fine_tuned', 'models': [name]}, share))
  sets = [[i, i + 1] for i in range(0, len(one) - 1, 2)][:PAIRS]
  if len(one) > 2:
    sets.append(list(range(len(one))))
  for chosen in sets:
    some = [names[i] for i in chosen]
    for method, kind in _KINDS.items():
      share = family.gram.mixture(chosen, kind)
      points.append(({'method': method, 'models': some}, share))
  measured = score(points)
  if merged := family.epoch_merges:
    about = [{'method': 'model_stock_epoch', 'models': [run]} for run in merged]
    at_merges = zip(about, np.eye(len(merged)), strict=True)
    measured += score(list(at_merges), list(merged.values()))
  curves = [
    {
      'models': [names[i]],
      'points': score([({'alpha': a}, a * one[i]) for a in ALPHAS]),
    }
    for i in range(min(CURVES, len(one)))
  ]
  return {'points': measured, 'curves': curves}


def draw(report: drawing.Report) -> mpl_figure.Figure:
  """Draw accuracy in distribution against the mean of the shifts."""
  tests, shifts = results.split(report['points'][0]['accuracy'])
  shifts = shifts or tests
  figure = mpl_figure.Figure((6.6, 5.0), layout='constrained')
  ax = figure.add_subplot()

  def plot(points: list[drawing.Report], marker: str, **style: Any) -> None:
    places = [drawing.percent(points, names) for names in (tests, shifts)]
    ax.plot(*places, marker, mec='white', mew=0.7, **style)

  for curve in report['curves']:
    label = 'WiSE-FT, from anchor to model'
    if curve is not report['curves'][0]:
      label = None
    plot(curve['points'], '.-', color=plots.PURPLE, ms=4, lw=1, label=label)
  most = max(len(point['models']) for point in report['points'])
  groups: dict[tuple[str, int], list[drawing.Report]] = {}
  for point in report['points']:
    key = point['method'], len(point['models'])
    groups.setdefault(key, []).append(point)
  for (method, number), points in groups.items():
    title, _, color = results.find_method(method)
    if number > 1:
      title += f', {number} models'
    marker = {'zero_shot': 'X', 'fine_tuned': 'o'}.get(method, 's')
    large = number == most > 1
    style = dict(color=color, ms=14 if large else 6, label=title, zorder=4)
    plot(points, '*' if large else marker, **style)
  ax.set_xlabel(f'Accuracy on {", ".join(tests)} (test), %')
  ax.set_ylabel(f'Mean accuracy on {len(shifts)} shifts, %')
  ax.legend(loc='best')
  return figure
