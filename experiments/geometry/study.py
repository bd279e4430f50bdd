"""The models that the figures share: eight seeds of the demo's two runs.

  python -m experiments.geometry.study shell --workdir=runs/figures

trains sixteen models that are merged once, at the end, and eight runs that
merge every epoch, all from the anchor and with the settings of
configs/digits.py, if they are not there; then it makes one part of the analysis
of the models merged once.
"""

import argparse
import pathlib
import sys

from experiments.geometry import analyses
from modelstock_jax.cli import interrupts
from modelstock_jax.report import comparison
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'


def parser(
  description: str | None, *, workdir: str = 'runs/figures', seeds: int = 8
) -> argparse.ArgumentParser:
  """Return a parser of the flags that all programs on these models share.

  Args:
    description: of the program.
    workdir: the default of --workdir.
    seeds: the default of --seeds.
  """
  result = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  result.add_argument(
    '--workdir',
    default=workdir,
    type=pathlib.Path,
    help='folder of the models; missing ones are trained (default: '
    '%(default)s)',
  )
  result.add_argument(
    '--seeds', type=int, default=seeds, help='number of seeds (%(default)s)'
  )
  return result


def train(args: argparse.Namespace, overrides: list[str]) -> setup_lib.Setup:
  """Train the runs that are missing, and return what they share."""
  analyses.log_to_stderr()
  config = config_lib.load(CONFIG, overrides)
  return comparison.train(config, args.workdir, seeds=args.seeds)[0]


def main() -> None:
  """Make a part of the analysis, and the models before, if need be."""
  flags = parser(__doc__)
  flags.add_argument('part', choices=analyses.PARTS)
  args, overrides = flags.parse_known_args()
  train(args, overrides)
  for path in analyses.analyze(args.workdir, only=[args.part]):
    print(f'Wrote {path} and plots/{args.part}*.')


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.geometry.study', main))
