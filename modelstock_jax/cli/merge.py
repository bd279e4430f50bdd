"""`modelstock merge`."""

import argparse
import dataclasses
import logging
from typing import Any

from modelstock_jax.merging import options as options_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  parser.add_argument(
    'recipe',
    nargs='*',
    metavar='RECIPE OUT',
    help="in place of --anchor, --models and --output: mergekit's YAML of "
    'its method model_stock, and what to write',
  )
  parser.add_argument(
    '--anchor',
    metavar='A',
    help='the pretrained checkpoint: a folder of Hugging Face, a .safetensors '
    'file, a run of modelstock, or a checkpoint of Scenic',
  )
  parser.add_argument(
    '--models',
    nargs='+',
    metavar='B',
    help='two checkpoints or more that were fine-tuned from it',
  )
  parser.add_argument(
    '--output', metavar='OUT', help='a new folder, or a new .safetensors file'
  )
  parser.add_argument(
    '--unit',
    choices=options_lib.UNITS,
    help='what shares a cosine: a layer, which is a tensor (the default), a '
    'filter of it, the whole model',
  )
  parser.add_argument(
    '--average',
    choices=options_lib.AVERAGES,
    default=options_lib.StockOptions.average,
    help='of more than two models, the mean of the cosines or of the angles',
  )
  parser.add_argument(
    '--no-clip',
    action='store_true',
    help='take cosines as they are, negative ones too, as mergekit does',
  )
  parser.add_argument(
    '--strength', type=float, default=1.0, help='multiplies every ratio'
  )
  parser.add_argument(
    '--dtype', help='of the result: float32, bfloat16, float16 or float64'
  )
  parser.add_argument(
    '--layers',
    metavar='REGEX',
    help='tensors whose names it matches with the same groups share a cosine: '
    r"'(.*)[.][qkv]_proj[.](.*)'",
  )
  parser.add_argument(
    '--common',
    action='store_true',
    help='leave out tensors that not all checkpoints have; of tensors with '
    'more rows in some (grown vocabularies) merge the first rows',
  )
  parser.add_argument(
    '--threads', type=int, help='at most; by default one for each core, up to 8'
  )


def run(args: argparse.Namespace) -> None:
  """Merge, draw, and print what came out."""
  logging.basicConfig(format='%(message)s')
  logging.getLogger('modelstock_jax').setLevel(logging.INFO)
  import tqdm

  from modelstock_jax import files
  from modelstock_jax.report import merged_files

  arguments = _arguments(args)
  with tqdm.tqdm(unit='B', unit_scale=True, desc='merge') as bar:

    def progress(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    merged = files.merge(**arguments, progress=progress)
  figure = merged_files.draw(merged)
  print(
    f'Wrote {merged.output}: {len(merged.cosine)} tensors, cosine '
    f'{_range(merged.cosine)}, ratio {_range(merged.ratio)} (least, mean, '
    'most).'
  )
  negative = _negative(merged.cosine, arguments['options'].unit)
  if negative:
    clipped = arguments['options'].clip
    taken = 'as 0: they stay the anchor' if clipped else 'as they are'
    print(f'{negative} cosines are negative, taken {taken}.')
  if merged.left_out:
    print(f'Left out: {", ".join(merged.left_out)}.')
  for name, rows in merged.cut.items():
    print(f'{name}: the first {rows} rows, which all have.')
  if figure:
    print(f'Every tensor: {figure.with_suffix(".json")}, {figure}.')


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
  """Return the arguments of `files.merge`."""
  arguments: dict[str, Any] = {
    'anchor': args.anchor,
    'models': args.models,
    'output': args.output,
    'options': options_lib.StockOptions(),
  }
  if args.recipe:
    flags = [name for name in ('anchor', 'models', 'output') if arguments[name]]
    if len(args.recipe) != 2 or flags:
      raise ValueError(
        f'{" ".join(args.recipe)}: give RECIPE OUT and none of --anchor, '
        '--models, --output; or those three and no recipe.'
      )
    from modelstock_jax import files

    arguments |= files.read_recipe(args.recipe[0])
    arguments['output'] = args.recipe[1]
  missing = [
    name for name in ('anchor', 'models', 'output') if not arguments[name]
  ]
  if missing:
    raise ValueError(
      f'{", ".join("--" + name for name in missing)}: not given. A merge takes '
      '--anchor A --models B C --output OUT, or RECIPE OUT.'
    )
  if args.dtype:
    arguments['dtype'] = args.dtype
  stock = arguments['options']
  return arguments | {
    'options': dataclasses.replace(
      stock,
      unit=args.unit or stock.unit,
      average=args.average,
      clip=stock.clip and not args.no_clip,
    ),
    'strength': args.strength,
    'layers': args.layers,
    'common': args.common,
    'threads': args.threads,
  }


def _negative(cosines: dict[str, Any], unit: str | None) -> int:
  """Return how many cosines are negative."""
  import numpy as np

  count = sum(int(np.sum(np.less(value, 0))) for value in cosines.values())
  return min(count, 1) if unit == 'model' else count


def _range(values: dict[str, Any]) -> str:
  """Return the least, mean and greatest of the means of tensors."""
  import numpy as np

  if not values:
    return 'of none'
  means = [float(np.mean(value)) for value in values.values()]
  return f'{min(means):.3f}, {sum(means) / len(means):.3f}, {max(means):.3f}'
