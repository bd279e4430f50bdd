r"""The first run on ImageNet as a ladder: each rung is checked before the next.

  python -m experiments.first_run --config=configs/clip_vit_b32.py \
    --workdir=runs/first --config.data.data_dir=data

Every rung has figures that are expected, with their source, and a list of what
to check if they are not met: then the program ends, with status 1. Figures are
kept in first_run.json of the workdir. Rerun the same command to resume.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import functools
import json
import logging
import pathlib
import sys
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax import data
from modelstock_jax.formats import write
from modelstock_jax.report import comparison
from modelstock_jax.report import merges
from modelstock_jax.training import class_texts
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import metrics
from modelstock_jax.training import workdir as workdir_lib

FILE = 'first_run.json'
BENCHMARKS = ('imagenet', *data.IMAGENET_SHIFTS)
# Of the authors' pair of ViT-B/32 that is merged once, in degrees, read off to
# half a degree: by block, layers qkv, out, fc and proj.
ANGLES = {0: (61, 78, 70, 72), 6: (50, 46, 53, 51), 11: (42, 33, 41, 35)}
LAYERS = ('attention/qkv', 'attention/out', 'mlp/fc', 'mlp/proj')
HEAD_CLASSES = 10

Figures = dict[str, float]


class Rung(NamedTuple):
  """A measurement, and the figures that are expected of it.

  Attributes:
    measure: config, workdir -> figures by name.
    expected: least and greatest value by name.
    advice: what to check if they are not met.
  """

  measure: Callable[[config_lib.Config, pathlib.Path], Figures]
  expected: dict[str, tuple[float, float]]
  advice: str

  def missed(self, figures: Figures) -> list[str]:
    """Return a line for each figure that is not as expected."""
    return [
      f'{name}: {figures.get(name, float("nan")):.6g}, expected {least:.6g} to '
      f'{greatest:.6g}'
      for name, (least, greatest) in self.expected.items()
      if not least <= figures.get(name, float('nan')) <= greatest
    ]


def zero_shot(config: config_lib.Config, workdir: pathlib.Path) -> Figures:
  """Evaluate the anchor on ImageNet, in percent."""
  del workdir
  setup = clip_task.prepare(config)
  benchmark = data.find_benchmark('imagenet')
  (score,) = setup.evaluate([setup.anchor], benchmark)
  return {'imagenet': 100 * score.accuracy}


def head(config: config_lib.Config, workdir: pathlib.Path) -> Figures:
  """Compare the zero-shot head with one that `transformers` makes."""
  del workdir
  import torch
  import transformers

  names = data.class_names(
    config.data.dataset, data_dir=config.data.data_dir or None
  )
  prompts = class_texts.read_prompts(config.anchor.prompts, names)
  setup = clip_task.prepare(config)
  ours = np.asarray(setup.anchor['head']['kernel'])[:, :HEAD_CLASSES]
  weights = config.anchor.weights
  model = transformers.CLIPTextModelWithProjection.from_pretrained(weights)
  tokenizer = transformers.CLIPTokenizer.from_pretrained(weights)
  columns = []
  for name in prompts.names[:HEAD_CLASSES]:
    texts = [template.format(name) for template in prompts.templates]
    tokens = tokenizer(texts, padding=True, return_tensors='pt')
    with torch.no_grad():
      rows = model(**tokens).text_embeds.double().numpy()
    mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)
    columns.append(100 * mean / np.linalg.norm(mean))
  return {
    'largest difference': float(np.abs(ours - np.stack(columns, 1)).max())
  }


def train(
  config: config_lib.Config, workdir: pathlib.Path, *, name: str, **changes: Any
) -> Figures:
  """Train and evaluate one run: ImageNet and the mean of the shifts, percent.

  Args:
    config: of the ladder.
    workdir: of the ladder.
    name: of the folder of the run.
    **changes: of the run, `train__epochs=1`.
  """
  flags = [f'--config.{k.replace("__", ".")}={v}' for k, v in changes.items()]
  run = config_lib.override(config, flags)
  folder = workdir / name
  setup = functools.partial(clip_task.prepare, run)
  loop.train(run, folder, setup=setup, title=name)
  rows = comparison.evaluate(folder, run, clip_task.task(run), BENCHMARKS)
  merged = {
    row.benchmark: 100 * row.accuracy
    for row in rows
    if row.method != 'zero_shot'
  }
  shifts = [merged[name] for name in data.IMAGENET_SHIFTS]
  return {'imagenet': merged['imagenet'], 'shifts': float(np.mean(shifts))}


def merged_once(config: config_lib.Config, workdir: pathlib.Path) -> Figures:
  """Train with one merge at the end, and measure the angles by depth."""
  figures = train(config, workdir, name='merged_once', merge__every='end')
  lines = metrics.read(workdir / 'merged_once')
  cosine = [line['cosine'] for line in lines if line['kind'] == 'merge'][-1]
  groups, _, _ = merges.group_layers(list(cosine))
  for block in ANGLES:
    for layer in LAYERS:
      paths = groups.get(f'image/block_{block}/{layer}/kernel')
      if paths:
        angle = np.degrees(np.arccos(np.clip(cosine[paths[0]], -1, 1)))
        figures[f'angle of {layer} in block {block}'] = float(angle)
  return figures


RUNGS = {
  'zero_shot': Rung(
    zero_shot,
    {'imagenet': (63.24, 63.44)},  # the paper: 63.34
    'the weights (config.anchor.weights), the activation (quick_gelu), the '
    'prompts and class names (imagenet), the transform of images (224 px, '
    'bicubic), the order of the labels: `modelstock data check`.',
  ),
  'head': Rung(
    head,
    {'largest difference': (0.0, 1e-3)},  # of weights of length 100
    'the tokenizer, the templates, the file of the head next to the weights: '
    'remove it to make it again.',
  ),
  'one_epoch': Rung(
    functools.partial(train, name='one_epoch', train__epochs=1),
    {'imagenet': (63.34, 79.89)},  # the paper: zero-shot, and the last epoch
    'the learning rate and warm-up in metrics.jsonl, the loss (it falls from '
    'the first line on), and the mean ratio of the merge.',
  ),
  'merged_once': Rung(
    merged_once,
    {
      'imagenet': (79.17, 80.17),  # of the authors' checkpoints: 79.67
      'shifts': (51.69, 53.69),  # 52.69
      **{
        f'angle of {layer} in block {block}': (angle - 10, angle + 10)
        for block, angles in ANGLES.items()
        for layer, angle in zip(LAYERS, angles, strict=True)
      },
    },
    'the order of the data (it differs between the models), weight decay and '
    'learning rate (larger ones, larger angles), float32 weights.',
  ),
  'final': Rung(
    functools.partial(train, name='merged_every_epoch', merge__every='epoch'),
    {'imagenet': (79.39, 80.39), 'shifts': (49.99, 51.99)},  # 79.89, 50.99
    'the keys merge.anchor and merge.opt_state, which the paper does not '
    'publish, and the mean ratio by epoch.',
  ),
}


def climb(
  config: config_lib.Config,
  workdir: pathlib.Path,
  names: Sequence[str],
  *,
  keep_going: bool,
) -> bool:
  """Measure rungs that have not been measured, and print all of them.

  Args:
    config: of the ladder.
    workdir: takes the runs and first_run.json.
    names: of `RUNGS`.
    keep_going: go on after a figure that is not as expected.

  Returns:
    True if all figures are as expected.
  """
  workdir = workdir_lib.claim(workdir, config.to_json())
  path = workdir / FILE
  measured = json.loads(path.read_text('utf-8')) if path.exists() else {}
  passed = True
  for name in names:
    rung = RUNGS[name]
    if name not in measured:
      measured[name] = rung.measure(config, workdir)
      write.write_text(path, json.dumps(measured, indent=2))
    missed = rung.missed(measured[name])
    figures = ', '.join(f'{k} {v:.4g}' for k, v in measured[name].items())
    print(f'{name}: {"missed" if missed else "as expected"} ({figures})')
    if missed:
      passed = False
      print('  ' + '\n  '.join(missed) + f'\n  Check {rung.advice}')
      if not keep_going:
        print(f'  To measure it again, remove {name!r} from {path}.')
        break
  return passed


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return 1 if a figure is not as expected."""
  parser = argparse.ArgumentParser(prog='python -m experiments.first_run')
  parser.add_argument('--config', required=True, help='configs/clip_vit_b32.py')
  parser.add_argument(
    '--workdir', required=True, type=pathlib.Path, help='takes all runs'
  )
  parser.add_argument(
    '--rungs',
    default=','.join(RUNGS),
    help='names, separated by commas; by default %(default)s',
  )
  parser.add_argument(
    '--keep_going',
    action='store_true',
    help='do not stop at a figure that is not as expected',
  )
  args, overrides = parser.parse_known_args(argv)
  names = args.rungs.split(',')
  if unknown := sorted({*names} - {*RUNGS}):
    parser.error(f'--rungs: {unknown} are not among {list(RUNGS)}')
  logging.basicConfig(format='%(asctime)s %(message)s')
  config = config_lib.load(args.config, overrides)
  return (
    0 if climb(config, args.workdir, names, keep_going=args.keep_going) else 1
  )


if __name__ == '__main__':
  sys.exit(main())
