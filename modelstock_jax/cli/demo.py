"""`modelstock demo`."""

import argparse
import datetime
from importlib import metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import shlex
import sys
import time
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
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
    help='redo the pretraining of the anchor, which ships (a few minutes)',
  )


def run(args: argparse.Namespace) -> None:
  """Trains, evaluates, reports."""
  start = time.perf_counter()
  from modelstock_jax.analysis import comparison
  from modelstock_jax.analysis import report
  from modelstock_jax.analysis import results
  from modelstock_jax.training import config as config_lib
  from modelstock_jax.training import loop
  from modelstock_jax.training import metrics

  if args.seeds < 1:
    raise ValueError(f'--seeds={args.seeds}: must be at least 1.')
  workdir = pathlib.Path(args.workdir).expanduser()
  weights = workdir.absolute() / 'anchor.safetensors'
  overrides = list(args.overrides)
  if args.pretrain:
    overrides.append(f'--config.anchor.weights={weights}')
  config = config_lib.load(digits_config(), overrides)
  if args.pretrain:
    loop.claim(workdir, config)
    _pretrain(config, weights)
  print(
    f'{args.seeds} seeds, each with {config.merge.num_models} models on '
    f'{config.data.dataset}/{config.data.train}, into {workdir}'
  )
  found = comparison.compare(config, workdir, seeds=args.seeds)
  results.save(found.rows, workdir / 'results.json')
  _join(found.histories, workdir / metrics.FILE)
  facts = {
    'Command': shlex.join(['modelstock', *sys.argv[1:]]),
    **_machine(),
    **{f'Time of {k}': f'{v:.1f} s' for k, v in found.seconds.items()},
    'Peak memory': f'{_peak_memory() / 2**30:.2f} GiB',
  }
  num_models = config.merge.num_models
  report.write(
    workdir,
    found.rows,
    found.histories,
    config_lib.to_json(config),
    facts,
    num_models=num_models,
  )
  print()
  print(results.text_table(found.rows, num_models=num_models))
  print(
    f'\n{time.perf_counter() - start:.1f} s, peak memory '
    f'{_peak_memory() / 2**30:.2f} GiB. Report: {workdir / "report.md"}'
  )


def digits_config() -> str:
  """The path of configs/digits.py, which is installed with the package."""
  spec = importlib.util.find_spec('modelstock_jax.configs.digits')
  if spec is None or spec.origin is None:
    raise FileNotFoundError(
      'configs/digits.py is not installed; install the package with pip.'
    )
  return spec.origin


def _pretrain(config: Any, weights: pathlib.Path) -> None:
  """Trains the anchor, unless an earlier run of this workdir has done so."""
  if weights.exists():
    return
  from modelstock_jax.training import metrics
  from modelstock_jax.training import pretrain

  with metrics.progress(
    config.pretrain.steps, start=0, title='pretrain'
  ) as bar:

    def report(step: int, loss: float) -> None:
      bar.update(step - bar.n)
      bar.set_postfix_str(f'loss {loss:.3f}')

    pretrain.pretrain(config, weights, report=report)


def _join(
  histories: dict[tuple[int, str], list[dict[str, Any]]], path: pathlib.Path
) -> None:
  """All runs' metrics in one file."""
  lines = [
    json.dumps({'seed': seed, 'merge': mode, **line})
    for (seed, mode), history in histories.items()
    for line in history
  ]
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def _machine() -> dict[str, str]:
  import jax

  import modelstock_jax

  device = jax.devices()[0]
  names = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  versions = [f'{name} {metadata.version(name)}' for name in names]
  return {
    'Date': datetime.date.today().isoformat(),
    'Hardware': f'{len(jax.devices())} x {device.device_kind}, '
    f'{os.cpu_count()} CPU cores',
    'Versions': f'modelstock_jax {modelstock_jax.__version__}, Python '
    f'{platform.python_version()}, ' + ', '.join(versions),
  }


def _peak_memory() -> int:
  """Of this process, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024
