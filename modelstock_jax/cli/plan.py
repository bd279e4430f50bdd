"""`modelstock plan`."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
  from modelstock_jax.planning import plan as plan_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  parser.add_argument(
    '--config', required=True, help='a Python file with get_config()'
  )
  parser.add_argument(
    '--topology',
    required=True,
    help='chip and how many: v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:16x16, ...',
  )
  parser.add_argument(
    '--slices',
    type=int,
    default=1,
    help='how many of these, linked by the network of hosts (default: 1)',
  )
  parser.add_argument(
    '--num_classes',
    type=int,
    help='of the training data, where they are not here and not ImageNet',
  )
  parser.add_argument(
    '--json', action='store_true', help='print JSON in place of tables'
  )
  parser.epilog = (
    'Neither a TPU nor data are needed, nor weights. Any value of the config '
    'can be set: --config.train.accumulate=2.'
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
  from modelstock_jax.planning import collectives

  if program.failure:
    known = {'peak_bytes': peak_bytes or None, 'failure': program.failure}
    return {**known, 'cross_stock_bytes': None, 'cross_slice_bytes': None}
  moved = program.collectives
  return program._asdict() | {
    'peak_bytes': peak_bytes,
    'cross_stock_bytes': collectives.crossing(moved, 'stock'),
    'cross_slice_bytes': collectives.crossing_slices(moved),
    'exact': all(c.exact for c in moved),
    'collectives': _totals(moved),
  }


def _totals(moved: Any) -> list[dict[str, Any]]:
  """Add up the collectives of one kind on the same axes, most bytes first."""
  totals: dict[Any, dict[str, Any]] = {}
  for c in moved:
    key = {
      'kind': c.kind,
      'axes': list(c.axes),
      'crosses_slices': c.crosses_slices,
    }
    total = totals.setdefault(
      str(key), {**key, 'count': 0, 'bytes': 0, 'exact': True}
    )
    total['count'] += c.count
    total['bytes'] += c.count * c.bytes
    total['exact'] &= c.exact
  return sorted(totals.values(), key=lambda total: -total['bytes'])


def to_text(plan: 'plan_lib.Plan') -> str:
  """Return a plan as tables; all figures are of one device."""
  figures = to_dict(plan)
  programs = {name: figures[name] for name in plan.programs}
  memory, moved = [], []
  for name, program in programs.items():
    needed = ('argument_bytes', 'temporary_bytes', 'peak_bytes')
    memory.append((name, *(_size(program.get(key)) for key in needed)))
    for total in program.get('collectives', ()):
      along = ', '.join(total['axes'])
      along += ' (between slices)' if total['crosses_slices'] else ''
      count = _least(total['exact']) + f'{total["count"]:,}'
      size = f'{total["bytes"]:,}'
      moved.append((name, total['kind'], along, count, size))
  return '\n\n'.join(
    (
      _summary(plan),
      'Memory of a device:\n'
      + _table(('', 'arguments', 'temporaries', 'total'), memory),
      'Bytes sent per device:\n'
      + _table(('', 'collective', 'along', 'count', 'bytes'), moved),
      _verdict(plan, programs),
    )
  )


def _summary(plan: 'plan_lib.Plan') -> str:
  stock, data = plan.mesh
  slices = f'{plan.slices} x ' if plan.slices > 1 else ''
  flops = plan.programs['step'].flops
  counted = f'; {flops / 1e9:,.1f} as XLA counts' if flops else ''
  return (
    f'{slices}{plan.topology}: {plan.devices} devices as stock {stock} x data '
    f'{data}, each with {_size(plan.chip.hbm_bytes)} and '
    f'{plan.chip.peak_flops / 1e12:.0f} TFLOP/s.\n'
    f'{plan.models} models of {plan.parameters / 1e6:.1f} M parameters, '
    f'{plan.batch_size} images for each in a step.\n'
    f'A step takes {plan.flops_per_step / 1e9:,.1f} GFLOP per device (analytic'
    f'{counted}): {plan.seconds_per_step * 1e3:.3g} ms\n'
    f'at peak, or {plan.images_per_second:,.0f} images/s of all models '
    'together; more is not possible.'
  )


def _verdict(plan: 'plan_lib.Plan', programs: dict[str, dict[str, Any]]) -> str:
  from modelstock_jax.training import memory

  lines = []
  for name in ('step', 'merge'):
    program = programs[name]
    if program['failure']:
      lines.append(f'The {name} does not compile: {program["failure"]}')
      continue
    lines.append(
      f'The {name} moves {_least(program["exact"])}'
      f'{program["cross_stock_bytes"]:,} bytes between models and '
      f'{program["cross_slice_bytes"]:,} between slices.'
    )
    crosses = program['cross_slice_bytes'] and not plan.slices % plan.models
    if name == 'step' and crosses:
      lines.append(
        'Nothing between slices if each model has slices of its own: '
        f'--config.mesh.stock={plan.models}'
      )
  share = f'{_size(plan.peak_bytes)} of {_size(plan.chip.hbm_bytes)}'
  lines.append(
    f'It fits: {share}.'
    if plan.fits
    else f'It does not fit: at least {share}. '
    + memory.in_words(plan.suggestions)
  )
  return '\n'.join(lines)


def _least(exact: bool) -> str:
  return '' if exact else 'at least '


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """Return columns side by side; the last two are of numbers."""
  import tabulate

  return tabulate.tabulate(
    rows,
    headers,
    tablefmt='plain',
    disable_numparse=True,
    colalign=['left'] * (len(headers) - 2) + ['right'] * 2,
  )


def _size(number: float | None) -> str:
  if number is None:
    return ''
  power = min(3, max(0, int(number).bit_length() - 1) // 10)
  unit = ('bytes', 'KiB', 'MiB', 'GiB')[power]
  return f'{number / 2 ** (10 * power):.4g} {unit}'
