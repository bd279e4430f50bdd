"""Post-training merges of N = 2, 3 and 4 models: average against Model Stock.

Claim: Model Stock is nearer to the centre of all fine-tuned weights than the
average of the same models, as accurate in distribution and more robust.

The models are those of `study.py`, 16 of one recipe, in groups of N that share
none. The distance |w - mu| is over all weights, mu the mean of the models that
are not in the group. It still has noise of its own, so |mean_N - mu| is longer
than R / sqrt(N), by the same in both columns.

  python -m experiments.geometry.post_training --workdir=runs/figures
"""

from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments.geometry import family as family_lib
from experiments.geometry import study
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib

NUMBERS = (2, 3, 4)
METHODS = ('average', 'Model Stock')


def merges(
  family: family_lib.Family, number: int
) -> list[dict[str, tuple[Any, float]]]:
  """Return for each group the merged params by method, and |w - mu|."""
  models, found = family.models, []
  for first in range(0, len(models) - number + 1, number):
    group = models[first : first + number]
    rest = models[:first] + models[first + number :]
    centre = merging.uniform_soup(rest)
    merged = {
      'average': merging.uniform_soup(group),
      'Model Stock': merging.model_stock(
        family.anchor, group, layers=clip.clip_layers
      ).params,
    }
    found.append({k: (w, _distance(w, centre)) for k, w in merged.items()})
  return found


def _distance(params: Any, other: Any) -> float:
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
  squares = [
    np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    for a, b in pairs
  ]
  return float(np.sqrt(sum(squares)))


def main() -> None:
  """Train the study if it is not there, and print the table."""
  args, overrides = study.parser(__doc__).parse_known_args()
  study.train(args.workdir, args.seeds, overrides)
  config = config_lib.load(study.CONFIG, overrides)
  setup = clip_task.prepare(config)
  family, _ = family_lib.read(args.workdir)
  tests = [data.find_benchmark('digits')]
  shifts = [data.find_benchmark(name) for name in data.SHIFTS]
  print('| N | groups | method | digits | mean of shifts | distance |')
  print('|--:|--:|:--|--:|--:|--:|')
  for number in NUMBERS:
    groups = merges(family, number)
    scores = {}
    for method in METHODS:
      chosen = [group[method][0] for group in groups]
      scores[method] = [
        100
        * np.mean(
          [[s.accuracy for s in setup.evaluate(chosen, b)] for b in where],
          axis=0,
        )
        for where in (tests, shifts)
      ]
      distance = np.mean([group[method][1] for group in groups])
      digits, shifted = (values.mean() for values in scores[method])
      print(
        f'| {number} | {len(groups)} | {method} | {digits:.1f} | {shifted:.1f} '
        f'| {distance:.2f} |'
      )
    differences = [
      _interval(stock - average)
      for average, stock in zip(*(scores[m] for m in METHODS), strict=True)
    ]
    print(f'| {number} | | paired | {differences[0]} | {differences[1]} | |')


def _interval(values: np.ndarray) -> str:
  """Mean and 95 % confidence interval (Student's t)."""
  half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return f'{values.mean():+.1f} ± {half:.1f}'


if __name__ == '__main__':
  main()
