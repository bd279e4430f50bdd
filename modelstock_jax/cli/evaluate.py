"""`modelstock evaluate`."""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  parser.add_argument(
    '--workdir', required=True, help='of a run of `modelstock train`'
  )
  parser.add_argument(
    '--benchmarks',
    default='',
    help='names, separated by commas; by default those of the config',
  )


def run(args: argparse.Namespace) -> None:
  """Evaluates the merged model, writes results.json and prints the table."""
  from modelstock_jax.analysis import comparison
  from modelstock_jax.analysis import results
  from modelstock_jax.training import config as config_lib

  if args.overrides:
    raise ValueError(
      f'{" ".join(args.overrides)}: the config is that of the workdir.'
    )
  workdir = pathlib.Path(args.workdir)
  config = config_lib.from_json(workdir / 'config.json')
  names = tuple(filter(None, args.benchmarks.split(',')))
  rows = comparison.evaluate(
    config, workdir, names or config.evaluate.benchmarks
  )
  results.save(rows, workdir / 'results.json')
  print(results.text_table(rows, num_models=config.merge.num_models))
