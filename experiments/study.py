"""The models that the figures share: eight seeds of the demo's two runs.

Sixteen models that were merged once, at the end, and eight runs that merged
every epoch, all from the anchor and with the settings of configs/digits.py.
"""

import argparse
import logging
import pathlib

from modelstock_jax.analysis import analyses
from modelstock_jax.analysis import comparison
from modelstock_jax.analysis import family
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'digits.py'
SEEDS = 8


def draw(part: str, description: str) -> None:
  """Makes one part of the analysis, and the models before, if need be.

  Args:
    part: one of `analyses.PARTS`.
    description: of the script.
  """
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--workdir',
    default='runs/figures',
    help='of the models, trained if they are not there (default: %(default)s)',
  )
  parser.add_argument('--seeds', type=int, default=SEEDS)
  args, overrides = parser.parse_known_args()
  logging.basicConfig(format='%(asctime)s %(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)
  train(args.workdir, args.seeds, overrides)
  for path in analyses.analyze(args.workdir, only=[part]):
    print(f'Wrote {path} and plots/{part}*.')


def train(workdir: str, seeds: int, overrides: list[str]) -> None:
  """Trains what is not there; runs that have come to their end stay."""
  config = config_lib.load(CONFIG, overrides)
  folder = pathlib.Path(workdir).expanduser()
  missing = [
    run
    for seed in range(config.seed, config.seed + seeds)
    for mode in comparison.MODES
    if family.unfinished(run := folder / f'seed_{seed}' / mode)
  ]
  if missing:
    comparison.train(config, workdir, seeds=seeds)
  else:
    loop.claim(workdir, config)  # refuses models of another config
