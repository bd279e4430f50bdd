"""`modelstock demo`."""

import argparse
import importlib
import importlib.util
import json
import pathlib
import sys
import time
import types


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  parser.add_argument(
    '--workdir',
    default='runs/digits',
    help='takes results, plots, report and checkpoints (default: %(default)s)',
  )
  parser.add_argument(
    '--seeds', type=int, default=3, help='runs to average (default: 3)'
  )
  parser.add_argument(
    '--pretrain',
    action='store_true',
    help='redo the pretraining of the anchor, which ships (a few minutes); '
    'needs a clone of the repository',
  )


def run(args: argparse.Namespace) -> None:
  """Train, evaluate, report."""
  start = time.perf_counter()
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
  weights = workdir.absolute() / 'anchor.safetensors'
  overrides = list(args.overrides)
  pretrain = _pretraining() if args.pretrain else None
  if pretrain:
    overrides.append(f'--config.anchor.weights={weights}')
  config = config_lib.load(digits_config(), overrides)
  if pretrain:
    workdir_lib.claim(workdir, config.to_json())
    if not weights.exists():  # of an earlier run of this workdir
      pretrain.pretrain(config, weights)
  print(
    f'{args.seeds} seeds, each with {config.merge.num_models} models on '
    f'{config.data.dataset}/{config.data.train}, into {workdir}'
  )
  session = provenance.here()
  times = [time.perf_counter()]
  setup, models = comparison.train(config, workdir, seeds=args.seeds)
  times.append(time.perf_counter())
  rows = comparison.score(setup, models, config.evaluate.benchmarks)
  times.append(time.perf_counter())
  results.save(rows, workdir / 'results.json')
  _join(workdir, range(config.seed, config.seed + args.seeds))
  figures = {
    'Time of training': f'{times[1] - times[0]:.1f} s',
    'Time of evaluation': f'{times[2] - times[1]:.1f} s',
    'Peak memory': provenance.peak_memory(),
  }
  provenance.add(workdir, session | figures)
  path = page.write(workdir)
  print()
  print(tables.text_table(rows, num_models=config.merge.num_models))
  print(
    f'\n{time.perf_counter() - start:.1f} s, peak memory '
    f'{provenance.peak_memory()}. Report: {path}'
  )


def digits_config() -> str:
  """Return the path of configs/digits.py, which is installed."""
  spec = importlib.util.find_spec('modelstock_jax.configs.digits')
  if spec is None or spec.origin is None:
    raise FileNotFoundError(
      'configs/digits.py is not installed; install the package with pip.'
    )
  return spec.origin


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


def _join(workdir: pathlib.Path, seeds: range) -> None:
  """Write the metrics of all runs into one file."""
  from modelstock_jax.report import comparison
  from modelstock_jax.training import metrics

  lines = [
    json.dumps({'seed': seed, 'merge': mode, **line}) + '\n'
    for seed in seeds
    for mode in comparison.MODES
    for line in metrics.read(workdir / f'seed_{seed}' / mode)
  ]
  (workdir / metrics.FILE).write_text(''.join(lines), encoding='utf-8')
