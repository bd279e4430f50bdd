"""`modelstock plan`."""

import argparse
import collections
import json
import os
import sys
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
  from modelstock_jax.planning import plan as plan_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  add = parser.add_argument
  add('--config', required=True, help='Python file with get_config()')
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
  add('--json', action='store_true', help='print JSON instead of tables')
  parser.epilog = (
    'No TPU, data or weights are needed. Any value of the config can be set: '
    '--config.train.accumulate=2.'
  )


def run(args: argparse.Namespace) -> None:
  """Compile the run ahead of time, and print what it needs of a TPU."""
  # Before jax starts: should there be a TPU, it is left alone.
  os.environ['JAX_PLATFORMS'] = 'cpu'
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
  if args.json:
    print(json.dumps(to_dict(plan), indent=2))
  else:
    print(to_text(plan))


def to_dict(plan: 'plan_lib.Plan') -> dict[str, Any]:
  """Return a plan as JSON has it.

  All figures are of one device. `flops_per_step` is of the products of forward
  and backward pass; a program's `flops` are XLA's. What did not compile is
  null.
  """
  return {
    'topology': plan.topology,
    'slices': plan.slices,
    'devices': plan.devices,
    'mesh': dict(zip(('stock', 'data'), plan.mesh, strict=True)),
    'num_models': plan.models,
    'batch_size': plan.batch_size,
    'parameters': plan.parameters,
    'fits': plan.fits,
    'peak_bytes': plan.peak_bytes,
    'hbm_bytes': plan.chip.hbm_bytes,
    'flops_per_step': plan.flops_per_step,
    'peak_flops': plan.chip.peak_flops,
    'seconds_per_step_at_peak': plan.seconds_per_step,
    'images_per_second_at_peak': plan.images_per_second,
    **{
      name: _program(program, plan.used_bytes(name))
      for name, program in plan.programs.items()
    },
    'suggestions': plan.suggestions,
  }


def _program(program: 'plan_lib.Program', peak_bytes: int) -> dict[str, Any]:
  from modelstock_jax.planning import collectives as collectives_lib

  if program.failure:
    return {
      'failure': program.failure,
      'peak_bytes': peak_bytes or None,
      'cross_stock_bytes': None,
      'cross_slice_bytes': None,
    }
  moved = program.collectives
  return program._asdict() | {
    'peak_bytes': peak_bytes,
    'cross_stock_bytes': collectives_lib.crossing(moved, 'stock'),
    'cross_slice_bytes': collectives_lib.crossing_slices(moved),
    'exact': all(each.exact for each in moved),
    'collectives': _totals(moved),
  }


def _totals(moved: Any) -> list[dict[str, Any]]:
  """Add up the collectives of one kind on the same axes, most bytes first."""
  groups = collections.defaultdict(list)
  for each in moved:
    groups[each.kind, each.axes, each.crosses_slices].append(each)
  totals = [
    {
      'kind': kind,
      'axes': list(axes),
      'crosses_slices': crosses_slices,
      'count': sum(each.count for each in group),
      'bytes': sum(each.count * each.bytes for each in group),
      'exact': all(each.exact for each in group),
    }
    for (kind, axes, crosses_slices), group in groups.items()
  ]
  return sorted(totals, key=lambda total: -total['bytes'])


def to_text(plan: 'plan_lib.Plan') -> str:
  """Return a plan as text; all figures are of one device."""
  from modelstock_jax.report import rendering
  from modelstock_jax.training import memory

  return rendering.render(
    'plan.txt.jinja',
    plan=to_dict(plan),
    programs=list(plan.programs),
    advice=memory.in_words(plan.suggestions),
  )
