"""Accuracy against the distance from the centre of all models.

Noise around the centre, averages of models and merges of them are all points
at some distance; if distance is what counts, they fall on one curve. The
paper's claim: noise loses accuracy with its distance, averages of N are
R / sqrt(N) away, and Model Stock of N models is nearer than their average.
"""

from typing import Any

import jax
from matplotlib import figure as mpl_figure
import numpy as np

from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import gram as gram_lib
from experiments.geometry import points
from modelstock_jax import merging
from modelstock_jax.report import plots

LEAST = gram_lib.LEAST
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the radius
DRAWS = 4
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of averages and merges
GROUPS = 4  # disjoint sets of models, at the most, for each size


def groups(number: int, size: int) -> list[list[int]]:
  """Return disjoint sets of `size` models that leave two or more over.

  >>> groups(6, 2)
  [[0, 1], [2, 3], [4, 5]]
  >>> groups(6, 5)
  []
  """
  if number - size < 2:
    return []
  starts = range(0, number - size + 1, size)
  return [list(range(s, s + size)) for s in starts][:GROUPS]


def report(family: family_lib.Family, score: points.Score) -> dict[str, Any]:
  """Measure accuracy of noise around the centre, of averages and of merges.

  The distance of an average or a merge is estimated with the models that have
  no part in it. The centre of the noise is the mean of all N models, which is
  itself R / sqrt(N) away from the one of all models there could be: a noise of
  s R is at the distance R sqrt(s^2 + 1/N).

  Args:
    family: N >= 4 models.
    score: the evaluation of its network.

  Returns:
    'radius', R over all layers; 'predicted', R / sqrt(n) for averages of n;
    'noise', 'averages' and 'merges': lists of points with 'distance' and
    'accuracy' by benchmark, and 'scale' or 'n'.
  """
  gram, number = family.gram, len(family.models)
  squares = np.maximum(gram_lib.squared_radii(gram.products).mean(axis=1), 0)
  radius = float(np.sqrt(squares.sum()))
  averages = _mixtures(family, score, 'averages')
  return {
    'radius': radius,
    'models': number,
    'noise': _noise(family, squares, score),
    'predicted': {p['n']: radius / np.sqrt(p['n']) for p in averages},
    'averages': averages,
    'merges': _mixtures(family, score, 'merges'),
  }


def _noise(
  family: family_lib.Family, squares: np.ndarray, score: points.Score
) -> list[dict[str, Any]]:
  """Measure the mean of all models plus noise, scaled layer by layer.

  Args:
    family: N models.
    squares: float64[L], of the radius of each layer.
    score: the evaluation of their network.
  """
  number = len(family.models)
  mean = jax.device_get(merging.uniform_soup(list(family.models.values())))
  rng = np.random.default_rng(0)
  noisy, norms = [], []
  for _ in range(DRAWS):
    drawn = jax.tree.map(lambda w: w + rng.standard_normal(w.shape), mean)
    noisy.append(drawn)
    norms.append(np.sqrt(gram_lib.measure(mean, [drawn]).products[:, 0, 0]))
  places = []
  for scale in SCALES:
    distance = np.sqrt(squares.sum() * (scale**2 + 1 / number))
    about = {'scale': scale, 'distance': float(distance)}
    for draw in range(DRAWS if scale else 1):  # 0 has no noise to draw
      share = np.zeros((len(squares), 1 + DRAWS))
      share[:, 1 + draw] = scale * np.sqrt(squares) / norms[draw]
      share[:, 0] = 1 - share[:, 1 + draw]
      places.append((about, share))
  return score(places, [mean, *noisy])


def _mixtures(
  family: family_lib.Family, score: points.Score, kind: str
) -> list[dict[str, Any]]:
  """Measure averages or merges of disjoint sets of models."""
  gram, number = family.gram, len(family.models)
  places = []
  for size in SIZES if kind == 'averages' else SIZES[1:]:
    for chosen in groups(number, size):
      share = gram.mixture(chosen, kind)
      others = ~np.isin(np.arange(number), chosen)
      square = gram_lib.from_centre(gram.products, share, share, others).sum()
      about = {
        'n': size,
        'models': [family.names[i] for i in chosen],
        'distance': float(np.sqrt(max(square, 0))),
      }
      places.append((about, share))
  return score(places) if places else []


_CURVES = {  # key of the size, label, colour, marker
  'noise': ('scale', 'centre + noise', plots.GREY, '.'),
  'averages': ('n', 'average of n models', plots.ORANGE, 'o'),
  'merges': ('n', 'Model Stock of n', plots.BLUE, 's'),
}


def draw(report: drawing.Report) -> mpl_figure.Figure:
  """Draw accuracy of noise, averages and merges against the distance.

  Each has a line through the means of points of one size, with their sd.
  """
  figure, panels = drawing.panels(report['noise'][0]['accuracy'])
  for ax, title, names in panels:
    for curve, (key, label, color, marker) in _CURVES.items():
      accuracy = drawing.percent(report[curve], names)
      distance = np.array([point['distance'] for point in report[curve]])
      sizes = np.array([point[key] for point in report[curve]])
      same = [sizes == size for size in dict.fromkeys(sizes)]
      x = [distance[chosen].mean() for chosen in same]
      spreads = [drawing.spread(accuracy[chosen]) for chosen in same]
      mean = [spread['mean'] for spread in spreads]
      sd = np.nan_to_num([spread['sd'] for spread in spreads])
      style = dict(color=color, marker=marker, mec='white', label=label)
      ax.errorbar(x, mean, sd, elinewidth=0.8, **style)
    ax.set_title(f'Accuracy on {title}, %')
    ax.set_xlabel(r'Distance from $\mu$')
    ax.axvline(report['radius'], color=plots.BLACK, linewidth=0.8)
  drawing.note(figure, 'Vertical line: R. Points: mean and sd of sets of n')
  plots.legend(figure, panels[0][0], 3)
  return figure
