"""A grid of 16 models against stacked runs of as many models, on digits.

Both train the same recipe, 30 epochs of four steps, two models at a time, from
the config to the last file, compilation included: `random_search.train`, which
keeps a file of each model, and eight times `loop.train` with one merge at the
end, all with the same programs. They take turns; the ratio is of the least
times.

  python experiments/benchmarks/grid.py --repeats 3
"""

import argparse
import pathlib
import sys
import tempfile
import time

from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT))

from experiments.soups import random_search  # noqa: E402

MODELS = 16
# Nothing is drawn: the recipe of configs/digits.py.
SAME = (
  f'--config.grid.num_models={MODELS}',
  '--config.grid.epochs=(30, 30)',
  '--config.grid.learning_rate=(2e-3, 2e-3)',
  '--config.grid.weight_decay=(0.1, 0.1)',
  '--config.grid.label_smoothing=0.0',
  '--config.grid.mixup=0.0',
  # As often as a run of the pair saves.
  '--config.checkpoint.every_merges=15',
)


def main() -> None:
  """Prints the times and their ratio."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--repeats', type=int, default=3)
  args, overrides = parser.parse_known_args()
  of_grid = config_lib.load(
    ROOT / 'experiments/soups/digits_grid.py', [*SAME, *overrides]
  )
  of_pair = config_lib.load(
    ROOT / 'configs/digits.py', ['--config.merge.every=end', *overrides]
  )
  runs = MODELS // of_pair.merge.num_models
  times: dict[str, list[float]] = {'grid': [], 'runs': []}
  for _ in range(args.repeats):
    with tempfile.TemporaryDirectory() as folder:
      start = time.perf_counter()
      random_search.train(of_grid, pathlib.Path(folder, 'grid'))
      middle = time.perf_counter()
      setup = clip_task.prepare(of_pair)
      for run in range(runs):
        loop.train(of_pair, pathlib.Path(folder, str(run)), setup=setup)
      end = time.perf_counter()
    times['grid'].append(middle - start)
    times['runs'].append(end - middle)
  for name, values in times.items():
    print(f'{name}: ' + ', '.join(f'{value:.1f}' for value in values) + ' s')
  ratio = min(times['grid']) / min(times['runs'])
  print(f'grid of {MODELS} / {runs} stacked runs: {ratio:.2f}')


if __name__ == '__main__':
  main()
