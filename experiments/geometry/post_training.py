"""Post-training merges of N = 2, 3 and 4 models: average against Model Stock.

Claim: Model Stock is nearer to the centre of all fine-tuned weights than the
average of the same models, as accurate in distribution and more robust.

The models are those of `study.py`, 16 of one recipe, in groups of N that share
none. The distance |w - mu| is over all weights, mu the mean of the models that
are not in the group. It still has noise of its own, so |mean_N - mu| is longer
than R / sqrt(N), by the same in both columns.

  python -m experiments.geometry.post_training --workdir=runs/figures
"""

import sys

import numpy as np

from experiments import intervals
from experiments.geometry import drawing
from experiments.geometry import family as family_lib
from experiments.geometry import gram as gram_lib
from experiments.geometry import points
from experiments.geometry import study
from modelstock_jax import data
from modelstock_jax.cli import interrupts

NUMBERS = (2, 3, 4)
METHODS = {'average': 'averages', 'Model Stock': 'merges'}


def main() -> None:
  """Train the study if it is not there, and print the table."""
  args, overrides = study.parser(__doc__).parse_known_args()
  study.train(args, overrides)
  family, config = family_lib.read(args.workdir)
  gram, count = family.gram, len(family.models)
  score = points.scorer(config, family, ('digits', *data.SHIFTS))
  print('| N | groups | method | digits | mean of shifts | distance |')
  print('|--:|--:|:--|--:|--:|--:|')
  for number in NUMBERS:
    starts = range(0, count - number + 1, number)
    groups = [list(range(start, start + number)) for start in starts]
    rest = [[i for i in range(count) if i not in group] for group in groups]
    centres = np.stack([gram.mixture(others, 'averages') for others in rest])
    both = []
    for method, kind in METHODS.items():
      shares = np.stack([gram.mixture(group, kind) for group in groups])
      measured = score([({}, share) for share in shares])
      digits = drawing.percent(measured, ['digits'])
      shifts = drawing.percent(measured, data.SHIFTS)
      both.append(np.stack([digits, shifts]))
      away = shares - centres
      squares = gram_lib.product(gram.products, away, away).sum(axis=1)
      distances = np.sqrt(squares)
      print(
        f'| {number} | {len(groups)} | {method} | {digits.mean():.1f} '
        f'| {shifts.mean():.1f} | {np.mean(distances):.2f} |'
      )
    paired = [intervals.interval(x, sign='+') for x in both[1] - both[0]]
    print(f'| {number} | | paired | {paired[0]} | {paired[1]} | |')


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.geometry.post_training', main))
