"""`modelstock merge`."""

import argparse
import dataclasses
import logging
from typing import Any

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
    '.bin or .ckpt file, run directory of modelstock, checkpoint of Scenic, or '
    'checkpoint or folder of checkpoints of Orbax',
  )
  add(
    '--models',
    nargs='+',
    metavar='B',
    help='two or more checkpoints that were fine-tuned from the anchor',
  )
  add('--output', metavar='OUT', help='new folder or .safetensors file')
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
    '--common',
    action='store_true',
    help='leave out tensors that not all checkpoints have; of tensors with '
    'more rows in some (grown vocabularies) merge the first rows',
  )
  add('--threads', type=int, help='largest number (default: cores, at most 8)')


def run(args: argparse.Namespace) -> None:
  """Merge, draw the cosines and ratios, and print a summary of them."""
  logging.basicConfig(format='%(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)
  import numpy as np
  import tqdm

  from modelstock_jax import files
  from modelstock_jax.report import run_plots

  arguments = _arguments(args)
  options = arguments['options']
  with tqdm.tqdm(unit='B', unit_scale=True, desc='merge', delay=1) as bar:

    def progress(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    merged = files.merge(
      **arguments, progress=progress, draw=run_plots.of_files
    )
  print(f'Wrote {merged.output}: {len(merged.cosine)} tensors.')
  if merged.cosine:
    for name, values in (('Cosine', merged.cosine), ('Ratio', merged.ratio)):
      means = [np.mean(value) for value in values.values()]
      print(
        f'{name} of a tensor: {min(means):.3f} to {max(means):.3f}, mean '
        f'{np.mean(means):.3f}.'
      )
    figure = merged.report.with_suffix('.svg')
    print(f'Every tensor: {merged.report}, {figure}.')
  negative = sum(np.sum(np.less(x, 0)) for x in merged.cosine.values())
  if negative:
    count = 1 if options.unit == 'model' else negative
    taken = 'as 0: they stay the anchor' if options.clip else 'as they are'
    print(f'{count} cosines are negative, taken {taken}.')
  if merged.left_out:
    print(f'Left out: {", ".join(merged.left_out)}.')
  for name, rows in merged.cut.items():
    print(f'{name}: the first {rows} rows, which all have.')


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
  """Return the arguments of `files.merge`."""
  from modelstock_jax import files

  missing = [f'--{name}' for name in _PATHS if not getattr(args, name)]
  if args.recipe:
    if len(args.recipe) != 2 or len(missing) < len(_PATHS):
      raise ValueError(
        f'{" ".join(args.recipe)}: give RECIPE OUT and none of --anchor, '
        '--models, --output; or those three and no recipe.'
      )
    path, output = args.recipe
    arguments = {**files.read_recipe(path), 'output': output}
  elif missing:
    raise ValueError(
      f'{", ".join(missing)}: not given. A merge takes --anchor A --models B C '
      '--output OUT, or RECIPE OUT.'
    )
  else:
    arguments = {name: getattr(args, name) for name in _PATHS}
  options = arguments.get('options', options_lib.StockOptions())
  return arguments | {
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
    'common': args.common,
    'threads': args.threads,
  }
