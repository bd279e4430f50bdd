"""`python -m experiments.soups`: trains a grid of hyper-parameters."""

import argparse
import logging

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
  from modelstock_jax.training import config as config_lib

  config, _ = config_lib.load_with_hooks(
    args.config, overrides, sections={'grid': members.SECTION}
  )
  train.join(args, config.hosts)
  with provenance.session(args.workdir):
    trained = random_search.train(config, args.workdir)
  if jax.process_index():
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
  print(f'The models are in {args.workdir}/{members.MODELS}.')


if __name__ == '__main__':
  main()
