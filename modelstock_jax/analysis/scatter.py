"""Accuracy in distribution and on shifts: models, soups, merges, WiSE-FT."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.analysis import family as family_lib
from modelstock_jax.analysis import points as points_lib

ALPHAS = tuple(np.linspace(0, 1, 11).round(2).tolist())
CURVES = 3  # models of which WiSE-FT is shown
PAIRS = 8  # of which average and merge are shown


def report(
  family: family_lib.Family,
  scorer: points_lib.Scorer,
  benchmarks: Sequence[str],
) -> dict[str, Any]:
  """Accuracy of everything there is between the anchor and the models.

  Args:
    family: its models are merged by twos, in their order, and all together.
    scorer: of its network.
    benchmarks: names.

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
  found = [
    accuracy
    for start in range(0, len(entries), scorer.chunk)
    for accuracy in _score(
      scorer, [e[2] for e in entries[start : start + scorer.chunk]], benchmarks
    )
  ]
  curves = []
  for name, model in zip(names[:CURVES], models, strict=False):
    line = scorer(
      _wise_ft,
      (family.anchor, model),
      np.array(ALPHAS, np.float32),
      benchmarks,
    )
    curves.append(
      {
        'models': [name],
        'points': [
          {'alpha': a, 'accuracy': {b: v[k] for b, v in line.items()}}
          for k, a in enumerate(ALPHAS)
        ],
      }
    )
  return {
    'points': [
      {'method': method, 'models': of, 'accuracy': accuracy}
      for (method, of, _), accuracy in zip(entries, found, strict=True)
    ],
    'curves': curves,
  }


def _score(
  scorer: points_lib.Scorer, models: list[Any], benchmarks: Sequence[str]
) -> list[dict[str, float]]:
  """Accuracy of whole models, by benchmark."""
  # Always as many, so that there is one program.
  padded = models + models[-1:] * (scorer.chunk - len(models))
  found = scorer(
    points_lib.pick,
    points_lib.stack(padded),
    np.arange(scorer.chunk, dtype=np.int32),
    benchmarks,
  )
  return [
    {name: values[k] for name, values in found.items()}
    for k in range(len(models))
  ]


def _wise_ft(ends: tuple[Any, Any], alphas: jax.Array) -> Any:
  return merging.wise_ft(*ends, alpha=alphas)
