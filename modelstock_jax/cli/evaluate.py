"""`modelstock evaluate`."""

import argparse
import pathlib
import textwrap
from typing import TYPE_CHECKING

from modelstock_jax.cli import train

if TYPE_CHECKING:
  from modelstock_jax.report import comparison
  from modelstock_jax.training import config as config_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  target = parser.add_mutually_exclusive_group(required=True)
  target.add_argument(
    '--workdir', help='run directory, whose models and merge are compared'
  )
  target.add_argument(
    '--checkpoint',
    help='single model: run directory, one of its checkpoints, folder with '
    'a classifier.safetensors as `modelstock convert` writes it, or file of '
    'Model Soups or WiSE-FT with its classification_head',
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
    help='names, or SET/SPLIT of prepared data, separated by commas; with '
    '--workdir also validation, the split of the run; paper_b32 and paper_b16 '
    "are those of the paper's tables, whose figures are printed as well "
    '(default: those of the config, or else validation)',
  )
  add(
    '--corruptions',
    action='store_true',
    help='also evaluate the images that are in distribution under eight '
    'corruptions of ImageNet-C, severity 3',
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
    '--output',
    help='file to write (default: results.json next to the model, of a file '
    'NAME.results.json)',
  )
  add_activation(parser)
  parser.add_argument(
    '--allow-pickle',
    action='store_true',
    help='with --workdir: read an anchor that is a .npy file, which can run '
    'any code: only if you trust it',
  )
  train.add_host_arguments(parser)


def add_activation(parser: argparse.ArgumentParser) -> None:
  """Add the flag of what a state dict does not state."""
  parser.add_argument(
    '--activation',
    choices=('quick_gelu', 'gelu'),
    help='activation of the MLPs, for a state dict, which does not state it',
  )


def run(args: argparse.Namespace) -> None:
  """Evaluate, write results.json and print the table."""
  import jax

  from modelstock_jax.report import comparison
  from modelstock_jax.report import differences
  from modelstock_jax.report import results
  from modelstock_jax.report import tables
  from modelstock_jax.training import config as config_lib

  if args.batch_size < 1:
    raise ValueError(f'--batch_size={args.batch_size}: must be at least 1')
  train.join(args, config_lib.Config().hosts)
  names = tuple(filter(None, args.benchmarks.split(',')))
  evaluate = _run if args.workdir is not None else _checkpoint
  measured, folder, config = evaluate(args, names)
  if jax.process_index():
    return
  lone = folder.with_suffix('.results.json') if folder.is_file() else None
  output = pathlib.Path(args.output or lone or folder / 'results.json')
  output = output.expanduser()
  output.parent.mkdir(parents=True, exist_ok=True)
  comparison.save(measured, output)
  head = config.anchor.head if config else 'zero_shot'
  num_models = config.merge.num_models if config else 1
  rows, paired = (results.name_anchor(items, head) for items in measured)
  published = results.published(names, rows)
  print(tables.text_table(rows, published=published, num_models=num_models))
  if paired:
    print(f'\n{tables.text(tables.differences(rows, paired))}\n')
  for sentence in differences.verdict(paired):
    print(textwrap.fill(f'* {sentence}', 78, subsequent_indent='  '))
  print(f'Wrote {output}.')


def _run(
  args: argparse.Namespace, names: tuple[str, ...]
) -> 'tuple[comparison.Measured, pathlib.Path, config_lib.Config | None]':
  from modelstock_jax.report import comparison
  from modelstock_jax.report import results
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
  asked = names or config.evaluate.benchmarks
  if not get_source and (not asked or results.VALIDATION in asked):
    size = config.model.network().vision.image_size
    sources = clip_task.sources(config.data, config.augment, size)
  measured = comparison.evaluate(
    workdir, config, task, names, sources, corruptions=args.corruptions
  )
  return measured, workdir, config


def _checkpoint(
  args: argparse.Namespace, names: tuple[str, ...]
) -> 'tuple[comparison.Measured, pathlib.Path, config_lib.Config | None]':
  from modelstock_jax.report import comparison
  from modelstock_jax.report import models

  model = models.read(args.checkpoint, activation=args.activation)
  folder = pathlib.Path(args.checkpoint).expanduser()
  if model.step:
    folder = model.step.parents[1]
  measured = comparison.evaluate_model(
    model,
    folder.resolve().name,
    names,
    data_dir=args.data_dir,
    batch_size=args.batch_size,
    corruptions=args.corruptions,
  )
  return measured, folder, None
