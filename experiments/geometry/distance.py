"""Accuracy against the distance from the centre of all models.

Noise around the centre, averages of models and merges of them are all points
at some distance; if distance is what counts, they fall on one curve. The
paper's claim: noise loses accuracy with its distance, averages of N are
R / sqrt(N) away, and Model Stock of N models is nearer than their average.
"""

from collections.abc import Sequence
from typing import Any

import jax
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
import numpy as np

from experiments.geometry import centre
from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import points as points_lib
from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.report import plots

LEAST = centre.LEAST
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the radius
DRAWS = 4
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of averages and merges
GROUPS = 4  # disjoint sets of models, at the most, for each size


def noise(
  center: Any, radius: dict[str, float], rng: np.random.Generator
) -> Any:
  """Draw Gaussian noise with a given norm for every layer.

  Args:
    center: a tree of numpy arrays with the paths of CLIP.
    radius: the norm of each layer, by its name; parameters that share a cosine
      are one layer.
    rng: draws it.

  Returns:
    A tree like `center`, float32.

  >>> tree = {'head': {'bias': np.zeros(3, np.float32)}}
  >>> drawn = noise(tree, {'head/bias': 2.0}, np.random.default_rng(0))
  >>> round(float(np.linalg.norm(drawn['head']['bias'])), 5)
  2.0
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(center)
  names = []
  for path, _ in flat:
    name = merging.path_name(path)
    names.append(clip.clip_layers(name, None).group or name)
  drawn = [rng.standard_normal(leaf.shape) for _, leaf in flat]
  squares: dict[str, float] = {}
  for name, leaf in zip(names, drawn, strict=True):
    squares[name] = squares.get(name, 0.0) + float(np.square(leaf).sum())
  leaves = [
    (leaf * (radius[name] / np.sqrt(squares[name]))).astype(np.float32)
    for name, leaf in zip(names, drawn, strict=True)
  ]
  return jax.tree.unflatten(treedef, leaves)


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


def report(
  family: family_lib.Family,
  gram: family_lib.Gram,
  scorer: points_lib.Scorer,
  benchmarks: Sequence[str],
  *,
  seed: int = 0,
) -> dict[str, Any]:
  """Measure accuracy of noise around the centre, of averages and of merges.

  The distance of an average or a merge is estimated with the models that have
  no part in it. The centre of the noise is the mean of all N models, which is
  itself R / sqrt(N) away from the one of all models there could be: a noise of
  s R is at the distance R sqrt(s^2 + 1/N).

  Args:
    family: N >= 4 models.
    gram: of the family.
    scorer: the evaluation of its network.
    benchmarks: their names.
    seed: of the noise.

  Returns:
    'radius', R over all layers; 'predicted', R / sqrt(n) for averages of n;
    'noise', 'averages' and 'merges': lists of points with 'distance' and
    'accuracy' by benchmark, and 'scale' or 'n'.

  Raises:
    ValueError: there are fewer than four models.
  """
  number = len(family.models)
  centre.check(number)
  one = np.eye(number)
  squares = np.mean(
    [
      centre.from_centre(gram.products, one[i], one[i], one[i] == 0)
      for i in range(number)
    ],
    axis=0,
  )  # of the radius of each layer
  squares = np.maximum(squares, 0)
  radius = float(np.sqrt(squares.sum()))
  norms = {
    layer.name: float(np.sqrt(square))
    for layer, square in zip(gram.layers, squares, strict=True)
  }
  rng = np.random.default_rng(seed)
  mean = family_lib.mean(family.models)
  basis = [mean, *(noise(mean, norms, rng) for _ in range(DRAWS))]
  mixtures = _mixtures(family, gram, scorer, benchmarks)
  return {
    'radius': radius,
    'models': number,
    'noise': [
      {
        'scale': scale,
        'distance': radius * float(np.sqrt(scale**2 + 1 / number)),
        'accuracy': accuracy,
      }
      for scale, accuracy in _noise(basis, scorer, benchmarks)
    ],
    'predicted': {
      str(point['n']): radius / np.sqrt(point['n'])
      for point in mixtures['averages']
    },
    **mixtures,
  }


def _noise(
  basis: Sequence[Any], scorer: points_lib.Scorer, benchmarks: Sequence[str]
) -> list[tuple[float, dict[str, float]]]:
  """Measure the centre plus scaled noise: pairs of scale and accuracy.

  Args:
    basis: the centre, and `DRAWS` trees of noise.
    scorer: the evaluation of the network.
    benchmarks: their names.
  """
  places = [
    (scale, draw)
    for scale in SCALES
    for draw in range(DRAWS if scale else 1)  # without noise all are one
  ]
  shares = np.zeros((len(places), 1 + DRAWS), np.float32)
  shares[:, 0] = 1
  for row, (scale, draw) in zip(shares, places, strict=True):
    row[1 + draw] = scale
  accuracies = points_lib.by_point(
    scorer(points_lib.combine, points_lib.stack(basis), shares, benchmarks)
  )
  return [
    (scale, accuracy)
    for (scale, _), accuracy in zip(places, accuracies, strict=True)
  ]


def _mixtures(
  family: family_lib.Family,
  gram: family_lib.Gram,
  scorer: points_lib.Scorer,
  benchmarks: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
  """Measure averages and merges of disjoint sets of models."""
  number = len(family.models)
  sets = [
    (kind, chosen)
    for size in SIZES
    for chosen in groups(number, size)
    for kind in ('averages', 'merges')[: 1 if size == 1 else 2]
  ]
  shares = [mixture(gram.products, chosen, kind) for kind, chosen in sets]
  accuracies = points_lib.by_point(
    scorer(
      points_lib.combine,
      points_lib.stack([family.anchor, *family.models]),
      _of_leaves(family.anchor, gram, np.stack(shares)),
      benchmarks,
    )
  )
  points: dict[str, list[dict[str, Any]]] = {'averages': [], 'merges': []}
  for (kind, chosen), share, accuracy in zip(
    sets, shares, accuracies, strict=True
  ):
    others = ~np.isin(np.arange(number), chosen)
    square = centre.from_centre(gram.products, share, share, others).sum()
    points[kind].append(
      {
        'n': len(chosen),
        'models': [family.names[i] for i in chosen],
        'distance': float(np.sqrt(max(square, 0))),
        'accuracy': accuracy,
      }
    )
  return points


def mixture(
  products: np.ndarray, chosen: Sequence[int], kind: str
) -> np.ndarray:
  """Return the average of models, or their merge, as shares of displacements.

  Args:
    products: float64[L, N, N], see `family.Gram`.
    chosen: n of the models.
    kind: 'averages', or 'merges' for Model Stock of them.

  Returns:
    float64[L, N]; the anchor has the remaining share, up to one.

  >>> mixture(np.array([[[1.0, 0.5], [0.5, 1.0]]]), [0, 1], 'merges').round(3)
  array([[0.333, 0.333]])
  """
  number = len(chosen)
  shares = np.zeros(products.shape[:2])
  shares[:, list(chosen)] = 1 / number
  if kind == 'averages':
    return shares
  inner = products[:, list(chosen)][:, :, list(chosen)]
  norms = np.sqrt(np.diagonal(inner, axis1=1, axis2=2))
  cosines = []
  for i, j in centre.pairs_of(number):
    under = norms[:, i] * norms[:, j]
    still = under == 0  # has no angle, and counts as orthogonal
    dot = inner[:, i, j] / np.where(still, 1, under)
    cosines.append(np.where(still, 0, dot))
  cosine = np.clip(np.mean(cosines, axis=0), 0, 1)
  ratio = number * cosine / (1 + (number - 1) * cosine)
  return shares * ratio[:, None]


def _of_leaves(anchor: Any, gram: family_lib.Gram, mixtures: np.ndarray) -> Any:
  """Return shares of anchor and models for every leaf, as of its layer.

  Args:
    anchor: a tree with the leaves.
    gram: the layers.
    mixtures: float64[P, L, N].

  Returns:
    A tree like the anchor of float32[P, 1 + N].
  """
  rows = {layer.name: k for k, layer in enumerate(gram.layers)}

  def leaf(path, _):
    name = merging.path_name(path)
    shares = mixtures[:, rows[clip.clip_layers(name, None).group or name]]
    left = 1 - shares.sum(1, keepdims=True)
    return np.concatenate([left, shares], axis=1).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, anchor)


def draw(report: drawing.Report) -> dict[str, mpl_figure.Figure]:
  """Draw accuracy of noise, averages and merges against the distance."""
  figure, panels = drawing.panels(report['noise'][0]['accuracy'])
  curves = (
    ('noise', 'scale', 'noise of {:g} R', plots.GREY, '.', 'centre + noise'),
    ('averages', 'n', None, plots.ORANGE, 'o', 'average of n models'),
    ('merges', 'n', None, plots.BLUE, 's', 'Model Stock of n'),
  )
  for ax, title, names in panels:
    for key, by, text, color, marker, label in curves:
      groups: dict[float, list[drawing.Report]] = {}
      for point in report[key]:
        groups.setdefault(point[by], []).append(point)
      if not groups:
        continue
      text = text or f'{label}, n = {{}}'
      x, y = _draw_curve(
        ax,
        list(groups.values()),
        names,
        [text.format(value) for value in groups],
        dict(color=color, marker=marker, label=label),
      )
      if key != 'noise':
        sizes = [int(size) for size in groups]
        _write_sizes(ax, sizes, x, y, color, 1 if key == 'averages' else -1)
    ax.set_title(f'Accuracy on {title}, %')
    ax.set_xlabel(r'Distance from $\mu$')
    ax.axvline(report['radius'], color=plots.BLACK, linewidth=0.8)
    ax.annotate(
      'R',
      (report['radius'], 0),
      (3, 3),
      xycoords=('data', 'axes fraction'),
      textcoords='offset points',
      color=drawing.NOTE,
    )
  plots.legend(figure, panels[0][0], 3)
  return {'': figure}


def _draw_curve(
  ax: mpl_axes.Axes,
  groups: Sequence[Sequence[drawing.Report]],
  names: Sequence[str],
  texts: Sequence[str],
  style: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
  """Draw a line through the means of groups of points, with their sd."""
  x = np.array([np.mean([p['distance'] for p in group]) for group in groups])
  values = [
    [100 * np.mean([p['accuracy'][n] for n in names]) for p in group]
    for group in groups
  ]
  y = np.array([np.mean(v) for v in values])
  sd = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
  ax.errorbar(
    x, y, sd, color=style['color'], elinewidth=0.8, alpha=0.5, fmt='none'
  )
  texts = [
    f'{text}: {b:.1f} % at {a:.2f}'
    for text, a, b in zip(texts, x, y, strict=True)
  ]
  plots.points(ax, x, y, texts, lw=1.2, mec='white', ms=7, **style)
  return x, y


def _write_sizes(
  ax: mpl_axes.Axes,
  sizes: Sequence[int],
  x: np.ndarray,
  y: np.ndarray,
  color: str,
  side: int,
) -> None:
  """Write the number of models beside its point: 1 right, -1 left of it."""
  for size, a, b in zip(sizes, x, y, strict=True):
    if size & (size - 1):  # room for the powers of two
      continue
    ax.annotate(
      str(size),
      (a, b),
      (7 * side, 4 * side),
      textcoords='offset points',
      ha='left' if side > 0 else 'right',
      va='bottom' if side > 0 else 'top',
      fontsize=7.5,
      color=color,
    )
