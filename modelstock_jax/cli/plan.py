"""`modelstock plan`."""

import argparse
from collections import Counter
from collections.abc import Iterator
import json
import os
import sys
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
  from modelstock_jax.planning import plan as plan_lib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
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
  """Compiles the run for TPUs that are not there, and prints what it needs."""
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
  """A plan as JSON has it.

  All figures are of one device. `flops_per_step` is of the products of forward
  and backward pass; a program's `flops` are XLA's. What did not compile is
  null.
  """
  result: dict[str, Any] = {
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
  }
  for name, program in plan.programs.items():
    result[name] = _program_dict(plan, name, program)
  result['suggestions'] = plan.suggestions
  return result


def _program_dict(
  plan: 'plan_lib.Plan', name: str, program: 'plan_lib.Program'
) -> dict[str, Any]:
  from modelstock_jax.planning import collectives

  if program.failure:
    known = {'peak_bytes': plan.held(name) or None, 'failure': program.failure}
    unknown = dict.fromkeys(('cross_stock_bytes', 'cross_slice_bytes'))
    return {**known, **unknown}
  moved = program.collectives
  return {
    'argument_bytes': program.argument_bytes,
    'temporary_bytes': program.temporary_bytes,
    'code_bytes': program.code_bytes,
    'beside_bytes': program.beside_bytes,
    'peak_bytes': plan.held(name),
    'flops': program.flops,
    'compile_seconds': round(program.compile_seconds, 1),
    'cross_stock_bytes': collectives.crossing(moved, 'stock'),
    'cross_slice_bytes': collectives.crossing_slices(moved),
    'exact': all(c.exact for c in moved),
    'collectives': [
      {
        'kind': kind,
        'axes': list(axes),
        'crosses_slices': crosses,
        'count': count,
        'bytes': size,
        'exact': exact,
      }
      for (kind, axes, crosses), (count, size, exact) in _totals(moved)
    ],
  }


def _totals(moved: Any) -> Iterator[tuple[Any, tuple[int, int, bool]]]:
  """Executions and bytes of collectives of one kind, on the same axes."""
  count: Counter[Any] = Counter()
  size: Counter[Any] = Counter()
  exact: dict[Any, bool] = {}
  for c in moved:
    key = (c.kind, c.axes, c.crosses_slices)
    count[key] += c.count
    size[key] += c.count * c.bytes
    exact[key] = exact.get(key, True) and c.exact
  for key in sorted(count, key=size.__getitem__, reverse=True):
    yield key, (count[key], size[key], exact[key])


def to_text(plan: 'plan_lib.Plan') -> str:
  """A plan as tables; all figures are of one device."""
  return '\n\n'.join(
    '\n'.join(part)
    for part in (_summary(plan), _memory(plan), _moved(plan), _verdict(plan))
  )


def _summary(plan: 'plan_lib.Plan') -> list[str]:
  stock, data = plan.mesh
  slices = f'{plan.slices} x ' if plan.slices > 1 else ''
  flops = plan.programs['step'].flops
  return [
    f'{slices}{plan.topology}: {plan.devices} devices as stock {stock} x data '
    f'{data}, each with {_size(plan.chip.hbm_bytes)} and '
    f'{plan.chip.peak_flops / 1e12:.0f} TFLOP/s.',
    f'{plan.models} models of {plan.parameters / 1e6:.1f} M parameters, '
    f'{plan.batch_size} images for each in a step.',
    f'A step is {plan.flops_per_step / 1e9:,.1f} GFLOP for a device, by hand'
    + (f' ({flops / 1e9:,.1f} as XLA counts)' if flops else '')
    + f': {plan.seconds_per_step * 1e3:.3g} ms',
    f'at peak, or {plan.images_per_second:,.0f} images/s of all models '
    'together; more is not possible.',
  ]


def _memory(plan: 'plan_lib.Plan') -> list[str]:
  rows: list[tuple[str, ...]] = [
    ('', 'arguments', 'temporaries', 'peak', 'with all else')
  ]
  for name, program in plan.programs.items():
    if program.failure:
      total = plan.held(name)
      rows.append((name, '', '', '', _size(total) if total else 'too much'))
      continue
    sizes = (program.argument_bytes, program.temporary_bytes)
    sizes += (program.peak_bytes, plan.held(name))
    rows.append((name, *map(_size, sizes)))
  return ['Memory of a device:', *_table(rows)]


def _moved(plan: 'plan_lib.Plan') -> list[str]:
  rows: list[tuple[str, ...]] = [('', 'collective', 'along', 'count', 'bytes')]
  for name, program in plan.programs.items():
    for key, (count, size, exact) in _totals(program.collectives):
      kind, axes, crosses = key
      along = ', '.join(axes) + (' (between slices)' if crosses else '')
      at_least = '' if exact else 'at least '
      rows.append((name, kind, along, f'{at_least}{count:,}', f'{size:,}'))
  return ['What a device puts into collectives:', *_table(rows)]


def _verdict(plan: 'plan_lib.Plan') -> list[str]:
  from modelstock_jax.planning import collectives
  from modelstock_jax.training import memory

  lines = []
  for name in ('step', 'merge'):
    program = plan.programs[name]
    if program.failure:
      lines.append(f'The {name} does not compile: {program.failure}')
      continue
    moved = program.collectives
    stock = collectives.crossing(moved, 'stock')
    slices = collectives.crossing_slices(moved)
    least = '' if all(c.exact for c in moved) else 'at least '
    lines.append(
      f'The {name} moves {least}{stock:,} bytes between models and {slices:,} '
      'between slices.'
    )
    if name == 'step' and slices and not plan.slices % plan.models:
      lines.append(
        'Nothing between slices if each model has slices of its own: '
        f'--config.mesh.stock={plan.models}'
      )
  share = f'{_size(plan.peak_bytes)} of {_size(plan.chip.hbm_bytes)}'
  if plan.fits:
    return [*lines, f'It fits: {share}.']
  return [
    *lines,
    f'It does not fit: at least {share}. {memory.in_words(plan.suggestions)}',
  ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
  """Columns side by side; the last two are of numbers."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  numbers = len(widths) - 2
  return [
    '  '
    + '  '.join(
      cell.rjust(width) if i >= numbers else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


def _size(number: float) -> str:
  power = min(3, max(0, int(number).bit_length() - 1) // 10)
  unit = ('bytes', 'KiB', 'MiB', 'GiB')[power]
  return f'{number / 2 ** (10 * power):.4g} {unit}'
