"""Ablations of the merge: unit, number of models, and period.

Claim: one cosine for each layer is the best unit; more models help little.

  python -m experiments.geometry.ablations --workdir=runs/ablations

Two seeds of `study.py` give four models, of which the first two are merged with
each unit, and 2 to 4 by layer. Everything is measured on the validation digits
and on shifts of them that are functions of an image, and chosen there: of each
ablation the setting with the highest mean of the two. The chosen ones, and the
defaults, are then measured on the test benchmarks, once.
"""

import sys
from typing import Any

import numpy as np

from experiments.geometry import family as family_lib
from experiments.geometry import study
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.cli import interrupts
from modelstock_jax.training import setup as setup_lib

# The first of each is the default.
SETTINGS: dict[str, tuple[Any, ...]] = {
  'unit': ('layer', 'filter', 'model'),
  'number': (2, 3, 4),
  'period': ('end', 'epoch'),
}

# The validation digits, and the shifts that are functions of an image.
ON_VALIDATION = [
  benchmark._replace(split='validation')
  for benchmark in data.BENCHMARKS.values()
  if benchmark.dataset == 'digits'
]
ON_TEST = [data.find_benchmark(name) for name in ('digits', *data.SHIFTS)]

# For each ablation and setting the merged models, one for each two seeds.
Models = dict[tuple[str, Any], list[Any]]


def merge(family: family_lib.Family) -> Models:
  """Return the merged models of every setting."""
  trees = list(family.models.values())

  def stock(number: int, unit: Any) -> list[Any]:
    return [
      merging.model_stock(
        family.anchor,
        trees[first : first + number],
        unit=unit,
        layers=clip.clip_layers,
      ).params
      for first in range(0, len(trees), 4)
    ]

  return {
    **{('unit', unit): stock(2, unit) for unit in SETTINGS['unit']},
    **{('number', n): stock(n, 'layer') for n in SETTINGS['number']},
    ('period', 'end'): stock(2, 'layer'),
    ('period', 'epoch'): list(family.epoch_merges.values())[::2],
  }


def measure(
  setup: setup_lib.Setup, models: Models, benchmarks: list[data.Benchmark]
) -> dict[tuple[str, Any], np.ndarray]:
  """Evaluate all models in distribution and on shifts.

  Args:
    setup: of the runs.
    models: S for each setting.
    benchmarks: the one in distribution, and the shifts.

  Returns:
    float64[2, S] for each setting, percent: in distribution, and the mean of
    the shifts.
  """
  flat = [model for merged in models.values() for model in merged]
  first, *others = (
    [100 * score.accuracy for score in setup.evaluate(flat, benchmark)]
    for benchmark in benchmarks
  )
  both = np.stack([first, np.mean(others, axis=0)])
  return dict(zip(models, np.split(both, len(models), axis=1), strict=True))


def main() -> None:
  """Train what is missing, measure, choose, and print."""
  parser = study.parser(__doc__, workdir='runs/ablations', seeds=10)
  args, overrides = parser.parse_known_args()
  setup = study.train(args, overrides)
  family, _ = family_lib.read(args.workdir)
  models = merge(family)
  validation = measure(setup, models, ON_VALIDATION)
  chosen = {
    (ablation, max(settings, key=lambda x, a=ablation: validation[a, x].mean()))
    for ablation, settings in SETTINGS.items()
  }
  defaults = {(ablation, each[0]) for ablation, each in SETTINGS.items()}
  shown = {key: models[key] for key in models if key in chosen | defaults}
  test = measure(setup, shown, ON_TEST)
  for part, measured in (('validation', validation), ('test', test)):
    print(f'{part}: in distribution / mean of shifts, %, mean ± sd of seeds')
    for key, both in measured.items():
      cells = [f'{x.mean():.1f} ± {x.std(ddof=1):.1f}' for x in both]
      mark = '*' if key in chosen else ' '
      print(f'{mark} {key[0]:>9} {key[1]!s:>7}  {" / ".join(cells)}')


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.geometry.ablations', main))
