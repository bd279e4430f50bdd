"""`modelstock merge`."""

import argparse
import dataclasses
import logging
import re
from typing import Any

import numpy as np

from modelstock_jax import files
from modelstock_jax.files import methods
from modelstock_jax.files import processes
from modelstock_jax.merging import options as options_lib

_PATHS = ('anchor', 'models', 'output')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  add = parser.add_argument
  add(
    'recipe',
    nargs='*',
    metavar='RECIPE OUT',
    help='mergekit recipe (YAML) of the method model_stock, and the output; '
    'instead of --anchor, --models and --output',
  )
  add(
    '--anchor',
    metavar='A',
    help='pretrained checkpoint: Hugging Face folder, .safetensors, .pt, .pth, '
    '.bin, .ckpt, .msgpack or .npz file, run directory of modelstock, '
    'checkpoint of Scenic, or checkpoint or folder of checkpoints of Orbax',
  )
  add(
    '--models',
    nargs='+',
    metavar='B',
    help='checkpoints that were fine-tuned from the anchor, two or more unless '
    'by another method, or one that holds several replicas; or LoRA adapters '
    'of it; B+ADAPTER is a checkpoint with an adapter added',
  )
  add('--output', metavar='OUT', help='new folder or .safetensors file')
  add('--dry-run', action='store_true', help='`modelstock inspect` instead')
  add(
    '--method',
    choices=methods.METHODS,
    default='model_stock',
    help='model_stock (default); soup: mean of the models, no anchor needed; '
    'wise_ft: between the anchor and one model; lines: LiNeS, the mean scaled '
    'by depth',
  )
  add(
    '--decay',
    choices=methods.DECAYS,
    help='weights of a soup of checkpoints of one run, in their order, that '
    'stand for a decay of its learning rate',
  )
  alphas = (
    'of wise_ft, weight of the model (0.5), of lines, scale of the first '
  )
  alphas += 'block (0); several make a folder for each'
  add('--alphas', type=float, nargs='+', help=alphas)
  add('--weights', type=float, nargs='+', help='of a soup, one for each model')
  add('--beta', type=float, help='of lines, increase of the scale (1 - alpha)')
  add(
    '--num_processes',
    type=int_or_auto,
    default=1,
    help='number of processes that share the tensors, each started with the '
    'same arguments; all must see the same disk (1); auto takes both numbers '
    'from srun or mpirun',
  )
  add('--process_id', type=int, default=0, help='index of this process, from 0')
  add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
  """Add the flags that `modelstock inspect` has as well."""
  add = parser.add_argument
  add(
    '--unit',
    choices=options_lib.UNITS,
    help='part that shares a cosine: a layer, which is a tensor (default), a '
    'filter of a tensor, or the model',
  )
  add(
    '--average',
    choices=options_lib.AVERAGES,
    default=options_lib.StockOptions.average,
    help='mean to take over the pairs of more than two models: of cosines '
    '(default) or of angles',
  )
  add(
    '--no-clip',
    action='store_true',
    help='use negative cosines as they are, as mergekit does, instead of 0',
  )
  add('--strength', type=float, default=1.0, help='factor of every ratio (1.0)')
  add(
    '--dtype',
    help='dtype of the result: float32, bfloat16, float16 or float64 (default: '
    'that of the checkpoints)',
  )
  _add_tensors(parser)


def _add_tensors(parser: argparse.ArgumentParser) -> None:
  """Add the flags on which tensors are merged, and into what."""
  add = parser.add_argument
  add(
    '--layers',
    metavar='REGEX',
    help='regular expression; tensors whose names it matches with the same '
    r"groups share a cosine: '(.*)[.][qkv]_proj[.](.*)'",
  )
  add(
    '--select',
    metavar='REGEX',
    help='regular expression; only tensors whose names it matches are merged '
    "and written (default: all; of a checkpoint of Orbax its 'params')",
  )
  add(
    '--stacked',
    metavar='REGEX=AXIS',
    action='append',
    default=[],
    help='axis of stacked layers in tensors whose complete names match; '
    "REGEX=none: not stacked; repeatable (default: found below keys 'layers')",
  )
  add(
    '--common',
    action='store_true',
    help='leave out tensors that not all checkpoints have; of tensors with '
    'more rows in some (grown vocabularies) merge the first rows',
  )
  add(
    '--rank',
    type=int,
    help='largest rank of merged LoRA adapters (default: the sum: exact)',
  )
  add(
    '--dense',
    action='store_true',
    help='merge LoRA adapters into full weights; takes their base as --anchor',
  )
  add('--threads', type=int, help='largest number (default: cores, at most 8)')


def run(args: argparse.Namespace) -> files.Merge:
  """Merge, draw the cosines and ratios, and print a summary of them."""
  if args.num_processes == 'auto':
    if args.process_id:
      raise ValueError(
        f'--process_id {args.process_id}: --num_processes auto takes it from '
        'srun or mpirun. Give one of them.'
      )
    args.process_id, args.num_processes = processes.of_launcher()
  merged = merge(args)
  if args.process_id:
    print(f'Merged {len(merged.ratio)} of the tensors of {merged.output}.')
    return merged
  if merged.output is None:
    _print_groups(merged)
  else:
    _print_means(merged)
  for verdict in merged.verdicts.values():
    print(verdict)
  if merged.left_out:
    print(f'Left out: {", ".join(merged.left_out)}.')
  for name, rows in merged.cut.items():
    print(f'{name}: the first {rows} rows, which all have.')
  return merged


def merge(args: argparse.Namespace) -> files.Merge:
  """Merge, or measure for `--dry-run`, with a progress bar."""
  logging.basicConfig(format='%(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)
  import tqdm

  from modelstock_jax.report import run_plots

  def anchor_of_runs(weights, steps):
    from modelstock_jax.training import anchor

    return anchor.of_runs(weights, steps)

  arguments = _arguments(args)
  with tqdm.tqdm(unit='B', unit_scale=True, desc='merge', delay=1) as bar:

    def progress(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    return files.merge(
      **arguments,
      progress=progress,
      draw=run_plots.of_files,
      anchor_of_runs=anchor_of_runs,
    )


def _print_groups(merged: files.Merge) -> None:
  shares = ('returned', 'unmoved', 'rounded')
  means = ('cosine', 'ratio', 'spread')
  table = [['layers', 'parameters', *means, 'norms', *shares]]
  for name, group in merged.groups.items():
    norms = ' '.join(f'{norm:.2g}' for norm in group['norms'] or ())
    cells = [*(f'{group[key]:.3f}' for key in means), norms]
    cells += [f'{group[key]:.0%}' for key in shares]
    table.append([name, f'{group["parameters"]:,}', *cells])
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  for row in table:
    print('  '.join(map(str.ljust, row, widths)).rstrip())


def _print_means(merged: files.Merge) -> None:
  print(f'Wrote {merged.output}: {len(merged.ratio)} tensors.')
  if merged.cosine:
    for name, values in (('Cosine', merged.cosine), ('Ratio', merged.ratio)):
      means = [np.mean(value) for value in values.values()]
      print(
        f'{name} of a tensor: {min(means):.3f} to {max(means):.3f}, mean '
        f'{np.mean(means):.3f}.'
      )
    figure = merged.report.with_suffix('.svg')
    print(f'Every tensor: {merged.report}, {figure}.')
  if rank := merged.settings['rank']:
    errors = merged.error.values()
    print(f'Rank {rank} loses at most {max(errors):.3g} of a tensor.')
  negative = sum(np.sum(np.less(x, 0)) for x in merged.cosine.values())
  if negative and merged.verdicts:
    count = 1 if merged.settings['unit'] == 'model' else negative
    clip = merged.settings['clip']
    taken = 'as 0: they stay the anchor' if clip else 'as they are'
    print(f'{count} cosines are negative, taken {taken}.')


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
  """Return the arguments of `files.merge`."""
  missing = [f'--{name}' for name in _PATHS if not getattr(args, name)]
  needed = {*missing}.difference(['--output'] * args.dry_run)
  needed = needed.difference(['--anchor'] * (args.method == 'soup'))
  if args.recipe:
    wrong = not 2 - args.dry_run <= len(args.recipe) <= 2
    if wrong or len(missing) < len(_PATHS):
      raise ValueError(
        f'{" ".join(args.recipe)}: give RECIPE OUT and none of --anchor, '
        '--models, --output; or those three and no recipe.'
      )
    arguments = files.read_recipe(args.recipe[0])
    arguments['output'] = args.recipe[-1]
  elif needed:
    raise ValueError(
      f'{", ".join(sorted(needed))}: not given. A merge takes --anchor A '
      '--models B C --output OUT, or RECIPE OUT.'
    )
  else:
    arguments = {name: getattr(args, name) for name in _PATHS}
  options = arguments.get('options', options_lib.StockOptions())
  if args.dry_run:
    arguments['output'] = None
    if args.method != 'model_stock':
      raise ValueError(f'--dry-run: is of model_stock, not {args.method}.')
  return arguments | {
    'method': methods.Method(
      args.method, args.weights, args.decay, args.alphas, args.beta
    ),
    'options': dataclasses.replace(
      options,
      unit=args.unit or options.unit,
      average=args.average,
      clip=options.clip and not args.no_clip,
    ),
    'dtype': args.dtype or arguments.get('dtype'),
    'strength': args.strength,
    'layers': args.layers,
    'select': args.select,
    'stacked': dict(map(_stacked, args.stacked)),
    'common': args.common,
    'rank': args.rank,
    'dense': args.dense,
    'threads': args.threads,
    'process_id': args.process_id,
    'num_processes': args.num_processes,
  }


def int_or_auto(value: str) -> int | str:
  """Parse a number of processes."""
  return value if value == 'auto' else int(value)


def _stacked(value: str) -> tuple[str, int | None]:
  matched = re.fullmatch(r'(.+)=(none|-?\d{1,3})', value)
  if matched is None:
    raise ValueError(f'--stacked {value}: must be REGEX=AXIS, or REGEX=none.')
  return matched[1], None if matched[2] == 'none' else int(matched[2])
