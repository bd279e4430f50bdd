"""Chooses the demo's learning rate, on validation data only.

For each learning rate the demo's runs (one merge at the end, one every
epoch) are made from several seeds, and all methods are evaluated on the
validation digits and on the seven shifts of them that are functions of an
image (the held-out fonts are test data). No test image is read.

  python -m experiments.digits.sweep --rates 1e-3 2e-3 3e-3 4e-3
"""

import argparse
import pathlib
import tempfile

import numpy as np
import tabulate

from modelstock_jax import data
from modelstock_jax.report import comparison
from modelstock_jax.training import config as config_lib

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'

IN_DISTRIBUTION = data.Benchmark('validation', 'digits', 'validation')
SHIFTED = [
  spec._replace(split='validation')
  for spec in data.BENCHMARKS.values()
  if spec.shift
]


def main() -> None:
  """Print a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rates', type=float, nargs='+', required=True)
  parser.add_argument('--seeds', type=int, default=3)
  args, overrides = parser.parse_known_args()
  accuracies = {
    rate: measure(
      config_lib.load(
        CONFIG, [*overrides, f'--config.train.learning_rate={rate}']
      ),
      args.seeds,
    )
    for rate in args.rates
  }
  rows = [
    {'learning rate': rate}
    | {k: f'{100 * a:.1f} / {100 * b:.1f}' for k, (a, b) in methods.items()}
    for rate, methods in accuracies.items()
  ]
  print('validation accuracy / mean of seven shifts, %, mean of seeds')
  print(tabulate.tabulate(rows, 'keys', 'github'))


def measure(
  config: config_lib.ConfigDict, seeds: int
) -> dict[str, tuple[float, float]]:
  """Return mean accuracies of each method, in and out of distribution."""
  with tempfile.TemporaryDirectory() as folder:
    setup, models = comparison.train(config, folder, seeds=seeds)
  accuracy = np.array(
    [
      [score.accuracy for score in setup.evaluate(list(models.values()), spec)]
      for spec in [IN_DISTRIBUTION, *SHIFTED]
    ]
  )
  figures = {}
  for method in dict.fromkeys(method for method, _ in models):
    columns = [i for i, (name, _) in enumerate(models) if name == method]
    chosen = accuracy[:, columns].mean(axis=1)
    figures[method] = (float(chosen[0]), float(chosen[1:].mean()))
  return figures


if __name__ == '__main__':
  main()
