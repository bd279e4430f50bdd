"""`modelstock train`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  parser.add_argument(
    '--config', required=True, help='a Python file with get_config()'
  )
  parser.add_argument(
    '--workdir',
    required=True,
    help='takes checkpoints and metrics; an interrupted run there goes on',
  )
  parser.epilog = 'Any value of the config can be set: --config.train.epochs=3.'


def run(args: argparse.Namespace) -> None:
  """Trains, and prints where the result is."""
  from modelstock_jax.training import config as config_lib
  from modelstock_jax.training import loop

  config = config_lib.load(args.config, args.overrides)
  result = loop.train(config, args.workdir)
  print(
    f'Finished at step {result.step}; the merged model is in {args.workdir}.'
  )
