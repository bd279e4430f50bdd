"""`modelstock demo`."""

import argparse
import importlib
import pathlib
import sys
import types


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  add = parser.add_argument
  add(
    '--workdir',
    default='runs/digits',
    help='run directory; results.json, report.html and checkpoints are written '
    'there (default: %(default)s)',
  )
  add('--seeds', type=int, default=3, help='number of seeds (default: 3)')
  add(
    '--pretrain',
    action='store_true',
    help='pretrain the anchor again, in minutes; requires a clone of the '
    'repository (default: use the anchor of the package)',
  )
  parser.epilog = 'Any value of the config can be set: --config.train.epochs=3.'


def run(args: argparse.Namespace) -> None:
  """Train, evaluate and report."""
  from modelstock_jax.report import comparison
  from modelstock_jax.report import page
  from modelstock_jax.report import provenance
  from modelstock_jax.report import results
  from modelstock_jax.report import tables
  from modelstock_jax.training import config as config_lib
  from modelstock_jax.training import workdir as workdir_lib

  if args.seeds < 1:
    raise ValueError(f'--seeds={args.seeds}: must be at least 1.')
  workdir = pathlib.Path(args.workdir).expanduser()
  pretrain = _pretraining() if args.pretrain else None
  config = config_lib.load(digits_config(), args.overrides)
  if pretrain:
    weights = workdir.absolute() / 'anchor.safetensors'
    flag = f'--config.anchor.weights={weights}'
    config = config_lib.override(config, [flag])
    pretrain.check(config)
    with workdir_lib.claim(workdir, config.to_json()):
      if not weights.exists():  # of an earlier run of this workdir
        pretrain.pretrain(config, weights)
  num_models = config.merge.num_models
  print(
    f'{args.seeds} seeds, each with {num_models} models on '
    f'{config.data.dataset}/{config.data.train}, into {workdir}'
  )
  with provenance.session(workdir) as session:
    setup, models = comparison.train(config, workdir, seeds=args.seeds)
    measured = comparison.score(setup, models, config.evaluate.benchmarks)
    comparison.save(measured, workdir / 'results.json')
  path = page.write(workdir)
  rows = results.name_anchor(measured.rows, config.anchor.head)
  print(f'\n{tables.text_table(rows, num_models=num_models)}\n')
  print(
    f'{session["Time"]}, peak memory {session["Peak memory"]}. Report: {path}'
  )


def digits_config() -> str:
  """Return the path of configs/digits.py, which is installed."""
  from modelstock_jax.training import config as config_lib

  return config_lib.bundled('digits')


def _pretraining() -> types.ModuleType:
  """Return the module that pretrains the anchor, which only a clone has."""
  root = pathlib.Path(digits_config()).parents[1]
  if not (root / 'experiments' / 'digits').is_dir():
    raise FileNotFoundError(
      '--pretrain needs a clone of the repository, which has '
      'experiments/digits; the anchor that ships is in the package.'
    )
  sys.path.append(str(root))
  return importlib.import_module('experiments.digits.pretrain')
