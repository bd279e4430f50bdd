"""`modelstock evaluate`."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from modelstock_jax.cli import train

if TYPE_CHECKING:
  from modelstock_jax.training import evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    '--workdir', help='of a run of `modelstock train`: its anchor and its merge'
  )
  what.add_argument(
    '--checkpoint',
    help='one model: a workdir or one of its checkpoints, or a folder with a '
    'classifier.safetensors as `modelstock convert` writes it',
  )
  parser.add_argument(
    '--config',
    help='the config file of the run, with --workdir: needed if it defines the '
    'task; nothing of a workdir is ever run',
  )
  parser.add_argument(
    '--benchmarks',
    default='',
    help='names, separated by commas; of a run by default those of its config, '
    'or the validation examples of its get_source',
  )
  parser.add_argument(
    '--data_dir',
    help='folder of the prepared data sets, with --checkpoint; by default that '
    'of the run, or what comes with the package',
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    default=256,
    help='images in a step, with --checkpoint (default: 256)',
  )
  parser.add_argument(
    '--output', help='by default results.json in the workdir or folder'
  )
  train.add_host_arguments(parser)


def run(args: argparse.Namespace) -> None:
  """Evaluates, writes results.json and prints the table."""
  import jax

  from modelstock_jax.report import results
  from modelstock_jax.report import tables
  from modelstock_jax.training import config as config_lib

  if args.batch_size < 1:
    raise ValueError(f'--batch_size={args.batch_size}: must be at least 1')
  train.join(args, config_lib.Config().hosts)
  names = tuple(filter(None, args.benchmarks.split(',')))
  if args.workdir is not None:
    rows, folder, num_models = _of_run(args, names)
  else:
    rows, folder = _of_checkpoint(args, names)
    num_models = 1
  if jax.process_index():  # process 0 says it for all
    return
  output = pathlib.Path(args.output or folder / 'results.json').expanduser()
  output.parent.mkdir(parents=True, exist_ok=True)
  results.save(rows, output)
  print(tables.text_table(rows, num_models=num_models))
  print(f'Wrote {output}.')


def _of_run(
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
  config = config_lib.from_json(workdir / 'config.json')
  hooks = config_lib.load_with_hooks(args.config)[1] if args.config else {}
  get_task = hooks.get('get_task')
  config_lib.check_task(config.hooks, f'--workdir={workdir}', get_task)
  task = (get_task or clip_task.task)(config)
  get_source = hooks.get('get_source')
  sources = get_source(config) if get_source else None
  rows = comparison.evaluate(workdir, names, task, sources)
  return rows, workdir, config.merge.num_models


def _of_checkpoint(
  args: argparse.Namespace, names: tuple[str, ...]
) -> 'tuple[list[evaluation.Row], pathlib.Path]':
  from modelstock_jax import clip
  from modelstock_jax import data
  from modelstock_jax.cli import convert
  from modelstock_jax.formats import runs
  from modelstock_jax.report import comparison
  from modelstock_jax.training import config as config_lib

  path = pathlib.Path(args.checkpoint).expanduser()
  if not path.is_dir():
    raise FileNotFoundError(f'--checkpoint={path}: there is no such folder.')
  step, data_dir = runs.find(path), args.data_dir
  if step is None:  # a folder of Hugging Face or open_clip with a head
    folder, method, seed, dtype = path, path.resolve().name, 0, 'float32'
    head, labels = clip.load_head(path)
    model, params = clip.load_pretrained(path)
    params = {'image': params['image'], 'head': head}
    mean, std = convert.pixels(path, path, model.config.vision.channels)
  else:
    folder = step.parents[1]
    config = config_lib.from_json(folder / 'config.json')
    config_lib.check_task(
      config.hooks, f'--checkpoint={step}: give --workdir instead', None
    )
    method, seed = comparison.method_of(config.merge), config.seed
    dtype, mean, std = config.model.dtype, config.data.mean, config.data.std
    names = names or config.evaluate.benchmarks
    model, params = clip.load_pretrained(step)
    own_data_dir = config.data.data_dir or None
    data_dir = data_dir or own_data_dir
    try:
      labels = data.class_names(config.data.dataset, data_dir=own_data_dir)
    except FileNotFoundError:  # the training data need not be here
      labels = None
  if not names:
    raise ValueError(
      f'No benchmarks: give --benchmarks=a,b; known are '
      f'{", ".join(data.BENCHMARKS)}.'
    )
  rows = comparison.evaluate_classifier(
    model.config,
    params,
    names,
    labels=labels,
    mean=mean,
    std=std,
    dtype=dtype,
    method=method,
    seed=seed,
    data_dir=data_dir,
    batch_size=args.batch_size,
  )
  return rows, folder
