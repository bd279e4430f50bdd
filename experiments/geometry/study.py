"""The models that the figures share: eight seeds of the demo's two runs.

  python -m experiments.geometry.study shell --workdir=runs/figures

trains sixteen models that are merged once, at the end, and eight runs that
merge every epoch, all from the anchor and with the settings of
configs/digits.py, if they are not there; then it makes one part of the analysis
of the models merged once.
"""

import argparse
import pathlib

from experiments.geometry import analyses
from experiments.geometry import family
from modelstock_jax.report import comparison
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import workdir as workdir_lib

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'
SEEDS = 8


def parser(description: str | None) -> argparse.ArgumentParser:
  """Return a parser of the flags that all programs on these models share."""
  result = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument(
    '--workdir',
    default='runs/figures',
    help='folder of the models, which are trained if they are not there '
    '(default: %(default)s)',
  )
  result.add_argument('--seeds', type=int, default=SEEDS)
  return result


def main() -> None:
  """Make a part of the analysis, and the models before, if need be."""
  flags = parser(__doc__)
  flags.add_argument('part', choices=analyses.PARTS)
  args, overrides = flags.parse_known_args()
  analyses.log_to_stderr()
  train(args.workdir, args.seeds, overrides)
  for path in analyses.analyze(args.workdir, only=[args.part]):
    print(f'Wrote {path} and plots/{args.part}*.')


def train(workdir: str, seeds: int, overrides: list[str]) -> None:
  """Train the missing runs; finished ones stay."""
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
    workdir_lib.claim(
      workdir, config.to_json()
    )  # raises for models of another config


if __name__ == '__main__':
  main()
