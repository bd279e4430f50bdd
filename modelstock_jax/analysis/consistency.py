"""Angles and norms of displacements: by layer kind, by depth, over epochs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelstock_jax.analysis import family as family_lib
from modelstock_jax.analysis import merges as merges_lib
from modelstock_jax.analysis import shell


def angles(products: np.ndarray) -> np.ndarray:
  """Pairwise angles between displacements.

  Args:
    products: float64[L, N, N], see `family.Gram`.

  Returns:
    float64[L, P], degrees; P = N(N-1)/2 pairs. NaN where a model of the pair
    has not moved.

  >>> angles(np.array([[[1.0, 1.0], [1.0, 2.0]]])).round(3).tolist()
  [[45.0]]
  """
  norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
  found = []
  for i, j in shell.pairs_of(products.shape[-1]):
    under = norms[:, i] * norms[:, j]
    cosine = products[:, i, j] / np.where(under > 0, under, np.nan)
    found.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
  return np.stack(found, axis=1)


def report(gram: family_lib.Gram, family: family_lib.Family) -> dict[str, Any]:
  """Angles and norms as JSON values.

  Args:
    gram: of the family, N >= 2 models.
    family: whose histories say how angles came about.

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
  """Mean angle and norm of each kind at each epoch, for each run.

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
  found: dict[str, Any] = {'epochs': epochs, 'angle': {}, 'norm': {}}
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
        found[name].setdefault(kind, []).append(means)
  return found


def _known_mean(values: np.ndarray) -> np.ndarray:
  """The mean over layers, of those that moved."""
  return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def _spread(values: np.ndarray) -> dict[str, float]:
  """Mean and, of several, standard deviation."""
  values = values[~np.isnan(values)]
  if not len(values):  # where nothing moved
    return {'mean': float('nan'), 'sd': float('nan')}
  sd = values.std(ddof=1) if len(values) > 1 else float('nan')
  return {'mean': float(values.mean()), 'sd': float(sd)}
