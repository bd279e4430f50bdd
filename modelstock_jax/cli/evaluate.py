"""`modelstock evaluate`."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from modelstock_jax.cli import train

if TYPE_CHECKING:
  from modelstock_jax.training import evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  target = parser.add_mutually_exclusive_group(required=True)
  target.add_argument(
    '--workdir', help='run directory, whose anchor and merge are evaluated'
  )
  target.add_argument(
    '--checkpoint',
    help='single model: run directory, one of its checkpoints, or folder with '
    'a classifier.safetensors as `modelstock convert` writes it',
  )
  add = parser.add_argument
  add(
    '--config',
    help='config file of the run, with --workdir; required if it defines the '
    'task, as no code of a run directory is executed',
  )
  add(
    '--benchmarks',
    default='',
    help='names, separated by commas (default: those of the config, or else '
    'the validation examples of its get_source)',
  )
  add(
    '--data_dir',
    help='folder of the prepared data sets, with --checkpoint (default: that '
    'of the run, or the data sets of the package)',
  )
  add(
    '--batch_size',
    type=int,
    default=256,
    help='images per step, with --checkpoint (default: 256)',
  )
  add(
    '--output', help='file to write (default: results.json next to the model)'
  )
  parser.add_argument(
    '--allow-pickle',
    action='store_true',
    help='with --workdir: read an anchor that is a .npy file, which can run '
    'any code: only if you trust it',
  )
  train.add_host_arguments(parser)


def run(args: argparse.Namespace) -> None:
  """Evaluate, write results.json and print the table."""
  import jax

  from modelstock_jax.report import results
  from modelstock_jax.report import tables
  from modelstock_jax.training import config as config_lib

  if args.batch_size < 1:
    raise ValueError(f'--batch_size={args.batch_size}: must be at least 1')
  train.join(args, config_lib.Config().hosts)
  names = tuple(filter(None, args.benchmarks.split(',')))
  evaluate = _run if args.workdir is not None else _checkpoint
  rows, folder, num_models = evaluate(args, names)
  if jax.process_index():
    return
  output = pathlib.Path(args.output or folder / 'results.json').expanduser()
  output.parent.mkdir(parents=True, exist_ok=True)
  results.save(rows, output)
  print(tables.text_table(rows, num_models=num_models))
  print(f'Wrote {output}.')


def _run(
  args: argparse.Namespace, names: tuple[str, ...]
) -> 'tuple[list[evaluation.Row], pathlib.Path, int]':
  from modelstock_jax.report import comparison
  from modelstock_jax.training import clip_task
  from modelstock_jax.training import config as config_lib

  if args.data_dir is not None:
    raise ValueError(
      f'--data_dir={args.data_dir}: a run reads its own data_dir. Give '
      '--checkpoint in place of --workdir to evaluate on other data.'
    )
  workdir = pathlib.Path(args.workdir).expanduser()
  config = config_lib.from_json(
    workdir / 'config.json', allow_pickle=args.allow_pickle
  )
  hooks = config_lib.load_with_hooks(args.config)[1] if args.config else {}
  get_task = hooks.get('get_task')
  config_lib.check_task(config.hooks, f'--workdir={workdir}', get_task)
  task = (get_task or clip_task.task)(config)
  get_source = hooks.get('get_source')
  sources = get_source(config) if get_source else None
  rows = comparison.evaluate(workdir, config, task, names, sources)
  return rows, workdir, config.merge.num_models


def _checkpoint(
  args: argparse.Namespace, names: tuple[str, ...]
) -> 'tuple[list[evaluation.Row], pathlib.Path, int]':
  from modelstock_jax.report import comparison
  from modelstock_jax.report import models

  model = models.read(args.checkpoint)
  folder = pathlib.Path(args.checkpoint).expanduser()
  if model.step:
    folder = model.step.parents[1]
  rows = comparison.evaluate_model(
    model,
    folder.resolve().name,
    names,
    data_dir=args.data_dir,
    batch_size=args.batch_size,
  )
  return rows, folder, 1
