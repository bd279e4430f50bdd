"""`modelstock plan`."""

import argparse
import json
import os
import sys
from typing import Any

from modelstock_jax.cli import xla


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  add = parser.add_argument
  add(
    '--config',
    required=True,
    help='Python file with get_config(), or the name of one of the package',
  )
  add(
    '--topology',
    required=True,
    help='chip and devices of a slice: v4:2x2x1, v5e:4x4, v6e:16x16, ...',
  )
  add('--slices', type=int, default=1, help='number of slices (default: 1)')
  add(
    '--num_classes',
    type=int,
    help='number of classes (default: that of the data set, if it is prepared '
    'here or ImageNet)',
  )
  xla.add_argument(parser)
  add('--json', action='store_true', help='print JSON instead of tables')
  parser.epilog = (
    'No TPU, data or weights are needed. Any value of the config can be set: '
    '--config.train.accumulate=2.'
  )


def run(args: argparse.Namespace) -> None:
  """Compile the run ahead of time, and print what it needs of a TPU."""
  # Before jax starts: should there be a TPU, it is left alone.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  xla.set_flags(args.xla)
  from modelstock_jax.planning import plan as plan_lib
  from modelstock_jax.training import config as config_lib

  config, hooks = config_lib.load_with_hooks(args.config, args.overrides)
  if args.num_classes is not None and 'get_task' in hooks:
    raise ValueError(
      f'--num_classes={args.num_classes}: {args.config} defines its own task, '
      'which knows its classes. Leave it out.'
    )
  plan = plan_lib.plan(
    config,
    args.topology,
    slices=args.slices,
    num_classes=args.num_classes,
    get_task=hooks.get('get_task'),
    get_optimizer=hooks.get('get_optimizer'),
    say=lambda line: print(line, file=sys.stderr, flush=True),
  )
  print(json.dumps(plan, indent=2) if args.json else to_text(plan))


def to_text(plan: dict[str, Any]) -> str:
  """Return a plan as text; all figures are of one device."""
  from modelstock_jax.report import rendering
  from modelstock_jax.training import memory

  advice = memory.in_words(plan['suggestions'])
  return rendering.render('plan.txt.jinja', plan=plan, advice=advice)
