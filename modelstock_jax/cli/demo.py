"""`modelstock demo`."""

import argparse
import importlib.util
import json
import pathlib
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
  from modelstock_jax.training import provenance

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
  session = provenance.here()
  found = comparison.compare(config, workdir, seeds=args.seeds)
  results.save(found.rows, workdir / 'results.json')
  _join(found.histories, workdir / metrics.FILE)
  seconds = {f'Time of {k}': f'{v:.1f} s' for k, v in found.seconds.items()}
  memory = {'Peak memory': provenance.peak_memory()}
  provenance.add(workdir, session | seconds | memory)
  path = report.write(workdir)
  print()
  print(results.text_table(found.rows, num_models=config.merge.num_models))
  print(
    f'\n{time.perf_counter() - start:.1f} s, peak memory '
    f'{provenance.peak_memory()}. Report: {path}'
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
