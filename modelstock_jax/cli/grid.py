"""`modelstock grid`."""

import argparse
import logging

from modelstock_jax.cli import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  parser.add_argument(
    '--config', required=True, help='a Python file with get_config()'
  )
  parser.add_argument(
    '--workdir',
    required=True,
    help='takes the models; an interrupted grid there goes on',
  )
  train.add_host_arguments(parser)
  parser.epilog = (
    'What is drawn is --config.grid.*; so many are trained at a time as '
    '--config.merge.num_models says.'
  )


def run(args: argparse.Namespace) -> None:
  """Trains, and prints what has become of every model."""
  logging.basicConfig(format='%(asctime)s %(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)

  from modelstock_jax.training import config as config_lib
  from modelstock_jax.training import grid
  from modelstock_jax.training import hosts
  from modelstock_jax.training import loop
  from modelstock_jax.training import provenance

  config = config_lib.load(args.config, args.overrides)
  train.join(args)
  with provenance.session(args.workdir, together=(loop.Interrupted,)):
    trained = grid.train(config, args.workdir)
  if hosts.index():
    return
  print('model  epochs  learning rate  weight decay  smoothing  mixup  valid.')
  for each in trained:
    member, accuracy = each.member, each.validation
    shown = each.status if accuracy is None else f'{100 * accuracy:.2f} %'
    print(
      f'{member.index:5d}  {member.epochs:6d}  {member.learning_rate:13.2e}  '
      f'{member.weight_decay:12.2e}  {member.label_smoothing:9.3f}  '
      f'{member.mixup:5.3f}  {shown}'
    )
  print(f'The models are in {args.workdir}/{grid.MODELS}.')
