"""Accuracy against the distance from the centre of all models.

Noise around the centre, averages of models and merges of them are all points
at some distance; if distance is what counts, they fall on one curve.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.analysis import family as family_lib
from modelstock_jax.analysis import points as points_lib
from modelstock_jax.analysis import shell

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the radius
DRAWS = 4
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of averages and merges
GROUPS = 4  # disjoint sets of models, at the most, for each size


def noise(
  center: Any, radius: dict[str, float], rng: np.random.Generator
) -> Any:
  """Gaussian noise whose norm is given for every layer.

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
  """Disjoint sets of `size` models that leave two or more over.

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
  """Accuracy of noise around the centre, of averages and of merges.

  The distance of an average or a merge is estimated with the models that have
  no part in it. The centre of the noise is the mean of all N models, which is
  itself R / sqrt(N) away from the one of all models there could be: a noise of
  s R is at the distance R sqrt(s^2 + 1/N).

  Args:
    family: N >= 4 models.
    gram: of the family.
    scorer: of its network.
    benchmarks: names.
    seed: of the noise.

  Returns:
    'radius', R over all layers; 'predicted', R / sqrt(n) for averages of n;
    'noise', 'averages' and 'merges': lists of points with 'distance' and
    'accuracy' by benchmark, and 'scale' or 'n'.

  Raises:
    ValueError: there are fewer than four models.
  """
  number = len(family.models)
  shell.check(number)
  one = np.eye(number)
  squares = np.mean(
    [
      shell.from_centre(gram.products, one[i], one[i], one[i] == 0)
      for i in range(number)
    ],
    axis=0,
  )  # of the radius of each layer
  squares = np.maximum(squares, 0)
  radius = float(np.sqrt(squares.sum()))
  center = family_lib.mean(family.models)
  norms = {
    layer.name: float(np.sqrt(square))
    for layer, square in zip(gram.layers, squares, strict=True)
  }
  rng = np.random.default_rng(seed)
  basis = points_lib.stack(
    [center, *(noise(center, norms, rng) for _ in range(DRAWS))]
  )
  places = [
    (scale, draw)
    for scale in SCALES
    for draw in range(DRAWS if scale else 1)  # without noise all are one
  ]
  shares = np.zeros((len(places), 1 + DRAWS), np.float32)
  shares[:, 0] = 1
  for row, (scale, draw) in zip(shares, places, strict=True):
    row[1 + draw] = scale
  found = scorer(points_lib.combine, basis, shares, benchmarks)
  result: dict[str, Any] = {
    'radius': radius,
    'models': number,
    'noise': [
      {
        'scale': scale,
        'distance': radius * float(np.sqrt(scale**2 + 1 / number)),
        'accuracy': {name: values[k] for name, values in found.items()},
      }
      for k, (scale, _) in enumerate(places)
    ],
    'predicted': {},
    'averages': [],
    'merges': [],
  }
  sets = [
    (kind, chosen)
    for size in SIZES
    for chosen in groups(number, size)
    for kind in ('averages', 'merges')[: 1 if size == 1 else 2]
  ]
  mixtures = [mixture(gram.products, chosen, kind) for kind, chosen in sets]
  stacked = points_lib.stack([family.anchor, *family.models])
  found = scorer(
    points_lib.combine,
    stacked,
    _of_leaves(family.anchor, gram, np.stack(mixtures)),
    benchmarks,
  )
  for k, ((kind, chosen), shares) in enumerate(
    zip(sets, mixtures, strict=True)
  ):
    others = ~np.isin(np.arange(number), chosen)
    square = shell.from_centre(gram.products, shares, shares, others).sum()
    result['predicted'][str(len(chosen))] = radius / np.sqrt(len(chosen))
    result[kind].append(
      {
        'n': len(chosen),
        'models': [family.names[i] for i in chosen],
        'distance': float(np.sqrt(max(square, 0))),
        'accuracy': {name: values[k] for name, values in found.items()},
      }
    )
  return result


def mixture(
  products: np.ndarray, chosen: Sequence[int], kind: str
) -> np.ndarray:
  """The average of some models, or their merge, as shares of displacements.

  Args:
    products: float64[L, N, N], see `family.Gram`.
    chosen: n of the models.
    kind: 'averages', or 'merges' for Model Stock of them.

  Returns:
    float64[L, N]: what is left of one is the share of the anchor.

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
  for i, j in shell.pairs_of(number):
    under = norms[:, i] * norms[:, j]
    still = under == 0  # has no angle, and counts as orthogonal
    dot = inner[:, i, j] / np.where(still, 1, under)
    cosines.append(np.where(still, 0, dot))
  cosine = np.clip(np.mean(cosines, axis=0), 0, 1)
  ratio = number * cosine / (1 + (number - 1) * cosine)
  return shares * ratio[:, None]


def _of_leaves(anchor: Any, gram: family_lib.Gram, mixtures: np.ndarray) -> Any:
  """Shares of anchor and models for every leaf, from those of its layer.

  Args:
    anchor: tells the leaves.
    gram: tells the layers.
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
