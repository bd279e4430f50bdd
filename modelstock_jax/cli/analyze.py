"""`modelstock analyze`."""

import argparse
import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  parser.add_argument(
    '--workdir',
    required=True,
    help='of `modelstock train`, `demo` or `grid`, come to its end; takes '
    'analysis/*.json and plots/*',
  )
  parser.add_argument(
    '--only',
    default='',
    help='parts, separated by commas: consistency, shell, landscape, '
    'distance, scatter; by default all for which there are enough models',
  )
  parser.add_argument(
    '--benchmarks',
    default='',
    help='names, separated by commas; by default those of the config',
  )


def run(args: argparse.Namespace) -> None:
  """Analyses, and prints what was written."""
  logging.basicConfig(format='%(asctime)s %(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)

  from modelstock_jax.analysis import analyses

  if args.overrides:
    raise ValueError(
      f'{" ".join(args.overrides)}: the config is that of the workdir.'
    )
  written = analyses.analyze(
    args.workdir,
    only=tuple(filter(None, args.only.split(','))),
    benchmarks=tuple(filter(None, args.benchmarks.split(','))),
  )
  print(
    f'Wrote {", ".join(path.name for path in written)} to {written[0].parent} '
    f'and the figures to {written[0].parents[1] / "plots"}.'
  )
