"""Plans runs for TPUs, without TPU hardware, and writes the table of them.

Command: `python experiments/tpu_plans.py`, for an hour or two. Requires
`pip install 'modelstock_jax[tpu]'`. Each row is one `modelstock plan --json`;
it is kept in `tpu_plans.json`, and made again if its flags change.
"""

import datetime
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

from modelstock_jax.cli import interrupts
from modelstock_jax.formats import write

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / 'tpu_plans.json'
TABLE = HERE / 'tpu_plans.md'

_APART = ('--config.mesh.stock=2', '--config.mesh.fsdp_min_size=65536')
_WHOLE = ('--config.mesh.stock=2', '--config.mesh.fsdp_min_size=0')
_REMAT = '--config.train.remat=block'
_TOGETHER = (
  '--config.mesh.stock=1',
  '--config.mesh.fsdp_min_size=0',
  '--config.train.remat=none',
)
_CUT = ('--config.train.batch_size=2048', '--config.train.accumulate=4')
_PARTS, _ONCE = (
  f'--config.train.sum_gradients={way}' for way in ('parts', 'once')
)
_LARGE = '--config.train.batch_size=4096'  # 16 images or more on a device

_SIZES = (
  ('B/32', _APART),
  ('B/16', (*_APART, _REMAT)),
  ('L/14', (*_APART, _REMAT)),
)
_CHIPS = ('v5e:2x4', 'v4:2x2x1', 'v5p:2x2x1', 'v6e:2x4')
ROWS = [  # model, topology, slices, flags
  *((size, chip, 1, flags) for size, flags in _SIZES for chip in _CHIPS),
  ('B/32', 'v5e:2x4', 1, (*_APART, *_CUT, _PARTS)),
  ('B/32', 'v5e:2x4', 1, (*_APART, *_CUT, _ONCE)),
  ('B/32', 'v5e:2x4', 1, (*_WHOLE, '--xla=recommended')),
  ('L/14', 'v5e:2x4', 1, _TOGETHER),
  ('L/14', 'v5e:2x4', 1, ()),  # what 'auto' makes of it
  ('B/32', 'v6e:2x2', 2, ()),
  ('L/14', 'v5e:2x4', 2, (*_APART, _REMAT)),
  ('B/32', 'v5e:16x16', 1, (*_APART, _LARGE)),
  ('L/14', 'v5e:16x16', 1, (*_APART, _REMAT, _LARGE)),
]

TEXT = """# Plans for TPUs

What the compiler of libtpu says of two models (N = 2) of 512 images each in a \
step, or of
as many as the flags say; without a TPU. All figures are of one device. Memory \
is that of the
step with all that the run holds beside it. Images/s are of both models \
together, were every
product done at the peak of the chip: a bound, and no measurement. Where no \
flags are given,
those that 'auto' takes are in brackets; these rows were compiled beside other \
work, which
their times include. The ratio is that of the bytes sent to the least of them, \
see
docs/hosts.md. Of a step's executions of collectives so many are asynchronous; \
older rows
do not state it.

Made by `python experiments/tpu_plans.py` ({versions}).

| model | devices | stock x data | flags | step: of HBM | fits | step at peak \
| images/s at peak | bytes sent: step | ratio to the least: step, merge \
| async | between models: step, merge | between slices: step, merge \
| compiled in |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- \
| --- |
{rows}
"""


def main() -> None:
  """Plan what is missing, and write the table."""
  known = json.loads(RESULTS.read_text('utf-8')) if RESULTS.exists() else {}
  rows, versions = [], set()
  for model, topology, slices, flags in ROWS:
    config = f'configs/clip_vit_{model.replace("/", "").lower()}.py'
    command = ['plan', f'--config={config}', f'--topology={topology}']
    command += [f'--slices={slices}'] if slices > 1 else []
    command += flags
    key = ' '.join(command)
    if key not in known:
      print(key, flush=True)
      known[key] = _plan(command)
      text = json.dumps(known, indent=1) + '\n'
      write.write_text(RESULTS, text)
    versions.add(f'libtpu {known[key]["libtpu"]}, {known[key]["date"]}')
    rows.append(_row(model, flags, known[key]['plan']))
  text = TEXT.format(versions='; '.join(sorted(versions)), rows='\n'.join(rows))
  write.write_text(TABLE, text)
  print(text)


def _plan(command: list[str]) -> dict[str, Any]:
  done = subprocess.run(
    [sys.executable, '-m', 'modelstock_jax.cli.main', *command, '--json'],
    cwd=HERE.parent,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return {
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'libtpu': importlib.metadata.version('libtpu'),
    'plan': json.loads(done.stdout),
  }


def _row(model: str, flags: tuple[str, ...], plan: dict[str, Any]) -> str:
  several = f'{plan["slices"]} x ' if plan['slices'] > 1 else ''
  used = (plan['step']['peak_bytes'] or 0) / 2**30
  programs = (plan[p] for p in ('step', 'merge', 'restart', 'evaluation'))
  seconds = sum(p.get('compile_seconds', 0.0) for p in programs)
  failed = 'sent_bytes' not in plan['step']
  cells = (
    model,
    f'{several}{plan["topology"]} ({plan["devices"]})',
    f'{plan["mesh"]["stock"]} x {plan["mesh"]["data"]}',
    ' '.join(flag.removeprefix('--config.') for flag in flags)
    or f'({" ".join(f"{k}={v}" for k, v in plan["settings"].items())})',
    f'{used:.1f} of {plan["hbm_bytes"] / 2**30:.1f} GiB',
    'yes' if plan['fits'] else 'no',
    f'{plan["seconds_per_step_at_peak"] * 1e3:.1f} ms',
    f'{plan["images_per_second_at_peak"]:,.0f}',
    '?' if failed else f'{plan["step"]["sent_bytes"] / 1e6:.0f} MB',
    ', '.join(_ratio(plan[p]) for p in ('step', 'merge')),
    _asynchronous(plan['step']),
    _megabytes(plan, 'cross_stock_bytes'),
    _megabytes(plan, 'cross_slice_bytes'),
    f'{seconds:.0f} s',
  )
  return '| ' + ' | '.join(cells) + ' |'


def _ratio(program: dict[str, Any]) -> str:
  least = program.get('least_bytes')
  if not least or 'sent_bytes' not in program:
    return '?' if least else '-'
  return f'{program["sent_bytes"] / least:.2f}'


def _asynchronous(program: dict[str, Any]) -> str:
  moved = program.get('collectives', [])
  if not moved or 'async_count' not in moved[0]:
    return '?'  # not compiled, or before this was read
  count = sum(each['async_count'] for each in moved)
  return f'{count} of {sum(each["count"] for each in moved)}'


def _megabytes(plan: dict[str, Any], key: str) -> str:
  sizes = plan['step'][key], plan['merge'][key]
  return ', '.join('?' if s is None else f'{s / 1e6:.1f} MB' for s in sizes)


if __name__ == '__main__':
  sys.exit(interrupts.run('tpu_plans.py', main))
