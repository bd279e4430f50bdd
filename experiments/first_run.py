r"""The first run on ImageNet as a ladder: each rung is checked before the next.

  python -m experiments.first_run --config=configs/clip_vit_b32.py \
    --workdir=runs/first --config.data.data_dir=data

Every rung has figures that are expected, with their source. If they are not met
the program ends with status 1; docs/first_run.md lists what to check. Figures
are kept in first_run.json of the workdir. Rerun the same command to resume.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import functools
import json
import logging
import pathlib
import sys

import numpy as np

from modelstock_jax import data
from modelstock_jax.cli import interrupts
from modelstock_jax.formats import write
from modelstock_jax.report import comparison
from modelstock_jax.report import merges
from modelstock_jax.report import models
from modelstock_jax.training import class_texts
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import metrics
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import workdir as workdir_lib

FILE = 'first_run.json'
BENCHMARKS = ('imagenet', *data.IMAGENET_SHIFTS)
# Of the authors' pair of ViT-B/32 that is merged once, in degrees, read off to
# half a degree: by block, layers qkv, out, fc and proj.
ANGLES = {0: (61, 78, 70, 72), 6: (50, 46, 53, 51), 11: (42, 33, 41, 35)}
LAYERS = ('attention/qkv', 'attention/out', 'mlp/fc', 'mlp/proj')
HEAD_CLASSES = 10
ADVICE = 'What to check is in docs/first_run.md, "If a rung fails".'

Figures = dict[str, float]


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

  task = clip_task.task(config)
  params, _, _ = setup_lib.start(task, sharding.place(), config.seed)
  ours = np.asarray(params['head']['kernel'])[:, :HEAD_CLASSES]
  names = data.class_names(config.data.dataset, data_dir=config.data.data_dir)
  prompts = class_texts.read_prompts(config.anchor.prompts, names)
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
  config: config_lib.Config, workdir: pathlib.Path, *, name: str, flag: str
) -> Figures:
  """Train and evaluate one run: ImageNet and the mean of the shifts, percent.

  Args:
    config: of the ladder.
    workdir: of the ladder.
    name: of the folder of the run.
    flag: that sets the run apart.
  """
  run = config_lib.override(config, [flag])
  folder = workdir / name
  setup = functools.partial(clip_task.prepare, run)
  loop.train(run, folder, setup=setup, title=name)
  rows, _ = comparison.evaluate(folder, run, clip_task.task(run), BENCHMARKS)
  merged = {
    row.benchmark: 100 * row.accuracy
    for row in rows
    if row.method == models.method_of(run.merge)
  }
  shifts = [merged[name] for name in data.IMAGENET_SHIFTS]
  return {'imagenet': merged['imagenet'], 'shifts': float(np.mean(shifts))}


def merged_once(config: config_lib.Config, workdir: pathlib.Path) -> Figures:
  """Train with one merge at the end, and measure the angles by depth."""
  flag = '--config.merge.every=end'
  figures = train(config, workdir, name='merged_once', flag=flag)
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


RUNGS: dict[str, Callable[[config_lib.Config, pathlib.Path], Figures]] = {
  'zero_shot': zero_shot,
  'head': head,
  'one_epoch': functools.partial(
    train, name='one_epoch', flag='--config.train.epochs=1'
  ),
  'merged_once': merged_once,
  'final': functools.partial(
    train, name='merged_every_epoch', flag='--config.merge.every=epoch'
  ),
}
# Least and greatest value of figures.
EXPECTED = {
  'zero_shot': {'imagenet': (63.24, 63.44)},  # the paper: 63.34
  'head': {'largest difference': (0.0, 1e-3)},  # of weights of length 100
  # The paper: zero-shot, and the last epoch.
  'one_epoch': {'imagenet': (63.34, 79.89)},
  'merged_once': {
    'imagenet': (79.17, 80.17),  # of the authors' checkpoints: 79.67
    'shifts': (51.69, 53.69),  # 52.69
    **{
      f'angle of {layer} in block {block}': (angle - 10, angle + 10)
      for block, angles in ANGLES.items()
      for layer, angle in zip(LAYERS, angles, strict=True)
    },
  },
  'final': {'imagenet': (79.39, 80.39), 'shifts': (49.99, 51.99)},
}


def missed(name: str, figures: Figures) -> list[str]:
  """Return a line for each figure of a rung that is not as expected."""
  lines = []
  for figure, (least, greatest) in EXPECTED[name].items():
    value = figures.get(figure, float('nan'))
    if not least <= value <= greatest:
      expected = f'expected {least:.6g} to {greatest:.6g}'
      lines.append(f'{figure}: {value:.6g}, {expected}')
  return lines


def climb(name: str, config: config_lib.Config, workdir: pathlib.Path) -> bool:
  """Measure a rung that has not been measured, and print its figures.

  Args:
    name: of `RUNGS`.
    config: of the ladder.
    workdir: folder of the runs and first_run.json.

  Returns:
    True if all figures are as expected.
  """
  path = workdir / FILE
  measured = json.loads(path.read_text('utf-8')) if path.exists() else {}
  if name not in measured:
    measured[name] = RUNGS[name](config, workdir)
    write.write_text(path, json.dumps(measured, indent=2))
  figures = ', '.join(f'{k} {v:.4g}' for k, v in measured[name].items())
  problems = missed(name, measured[name])
  print(f'{name}: {"missed" if problems else "as expected"} ({figures})')
  if problems:
    again = f'To measure it again, remove {name!r} from {path}.'
    print('  ' + '\n  '.join([*problems, ADVICE, again]))
  return not problems


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return 1 if a figure is not as expected."""
  parser = argparse.ArgumentParser(prog='python -m experiments.first_run')
  parser.add_argument('--config', required=True, help='configs/clip_vit_b32.py')
  parser.add_argument(
    '--workdir', required=True, type=pathlib.Path, help='folder of all runs'
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
  passed = True
  with workdir_lib.claim(args.workdir, config.to_json()) as workdir:
    for name in names:
      passed = climb(name, config, workdir) and passed
      if not (passed or args.keep_going):
        break
  return 0 if passed else 1


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.first_run', main))
