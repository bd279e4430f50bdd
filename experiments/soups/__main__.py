"""`python -m experiments.soups`: trains a grid of hyper-parameters."""

import argparse
import logging
import sys

import tabulate

from modelstock_jax.cli import interrupts
from modelstock_jax.cli import train


def main() -> None:
  """Train, and print what has become of every model."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.soups', description=__doc__
  )
  parser.add_argument(
    '--config', required=True, help='Python file with get_config()'
  )
  parser.add_argument(
    '--workdir',
    required=True,
    help='folder of the models; an interrupted grid there is resumed',
  )
  train.add_host_arguments(parser)
  parser.epilog = (
    'Hyper-parameters are drawn between --config.grid.*; '
    '--config.merge.num_models models are trained at a time.'
  )
  args, overrides = parser.parse_known_args()
  logging.basicConfig(format='%(asctime)s %(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)

  import jax

  from experiments.soups import members
  from experiments.soups import random_search
  from modelstock_jax.report import provenance

  config = members.load_config(args.config, overrides)
  train.join(args, config.hosts)
  with provenance.session(args.workdir):
    trained = random_search.train(config, args.workdir)
  if jax.process_index():
    return
  rows = [
    {**each.member._asdict(), 'validation': each.validation or each.status}
    for each in trained
  ]
  print(tabulate.tabulate(rows, 'keys', floatfmt='.3g'))
  print(f'The models are in {args.workdir}/{members.MODELS}.')


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.soups', main))
