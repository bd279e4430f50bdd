"""Plans runs for TPUs that are not there, and writes the table of them.

Command: `python experiments/tpu_plans.py`, for an hour or two; with
`--only=L/14` for some. Needs `pip install 'modelstock_jax[tpu]'`, and no TPU.
Each row is one `modelstock plan --json`; it is kept in `tpu_plans.json` beside
the script, and made again if its flags, or those of the command line, change.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / 'tpu_plans.json'
TABLE = HERE / 'tpu_plans.md'

_APART = ('--config.mesh.stock=2', '--config.mesh.fsdp_min_size=65536')
_REMAT = '--config.train.remat=block'
_LARGE = '--config.train.batch_size=4096'  # 16 images or more on a device

ROWS = [
  ('B/32', 'v5e:2x4', 1, _APART),
  ('B/32', 'v4:2x2x1', 1, _APART),
  ('B/32', 'v5p:2x2x1', 1, _APART),
  ('B/32', 'v6e:2x4', 1, _APART),
  ('B/16', 'v5e:2x4', 1, (*_APART, _REMAT)),
  ('B/16', 'v4:2x2x1', 1, (*_APART, _REMAT)),
  ('B/16', 'v5p:2x2x1', 1, (*_APART, _REMAT)),
  ('B/16', 'v6e:2x4', 1, (*_APART, _REMAT)),
  ('L/14', 'v5e:2x4', 1, (*_APART, _REMAT)),
  ('L/14', 'v5e:2x4', 1, ()),
  ('L/14', 'v5e:2x4', 2, (*_APART, _REMAT)),
  ('L/14', 'v4:2x2x1', 1, (*_APART, _REMAT)),
  ('L/14', 'v5p:2x2x1', 1, (*_APART, _REMAT)),
  ('L/14', 'v6e:2x4', 1, (*_APART, _REMAT)),
  ('B/32', 'v5e:16x16', 1, (*_APART, _LARGE)),
  ('L/14', 'v5e:16x16', 1, (*_APART, _REMAT, _LARGE)),
]

HEADER = (
  '| model | devices | stock x data | flags | step: of HBM | fits | step at '
  'peak | images/s at peak | between models: step, merge | between slices: '
  'step, merge | compiled in |'
)


def main() -> None:
  """Plans what is missing, and writes the table after each row."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', default='', help='a part of the model or chip')
  only = parser.parse_args().only
  known = {}
  if RESULTS.exists():
    known = json.loads(RESULTS.read_text(encoding='utf-8'))
  for model, topology, slices, flags in ROWS:
    command = _command(model, topology, slices, flags)
    key = ' '.join(command)
    if key not in known and only in f'{model} {topology}':
      print(key, flush=True)
      known[key] = {
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'libtpu': importlib.metadata.version('libtpu'),
        'plan': _plan(command),
      }
      RESULTS.write_text(json.dumps(known, indent=1) + '\n', encoding='utf-8')
    TABLE.write_text(_table(known), encoding='utf-8')
  print(TABLE.read_text(encoding='utf-8'))


def _command(
  model: str, topology: str, slices: int, flags: tuple[str, ...]
) -> list[str]:
  config = f'configs/clip_vit_{model.replace("/", "").lower()}.py'
  several = [f'--slices={slices}'] if slices > 1 else []
  return [
    *('plan', f'--config={config}', f'--topology={topology}'),
    *several,
    *flags,
  ]


def _plan(command: list[str]) -> dict:
  done = subprocess.run(
    [sys.executable, '-m', 'modelstock_jax.cli.main', *command, '--json'],
    cwd=HERE.parent,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def _table(known: dict) -> str:
  lines = []
  versions = set()
  for model, topology, slices, flags in ROWS:
    row = known.get(' '.join(_command(model, topology, slices, flags)))
    if row is not None:
      lines.append(_row(model, flags, row['plan']))
      versions.add(f'libtpu {row["libtpu"]}, {row["date"]}')
  columns = HEADER.count('|') - 1
  return '\n'.join(
    [
      '# Plans for TPUs',
      '',
      'What the compiler of libtpu says of two models (N = 2) of 512 images '
      'each in a step, or of',
      'as many as the flags say; without a TPU. All figures are of one device. '
      'Memory is that of the',
      'step with all that the run holds beside it. Images/s are of both models '
      'together, were every',
      'product done at the peak of the chip: a bound, and no measurement.',
      '',
      'Made by `python experiments/tpu_plans.py` '
      f'({"; ".join(sorted(versions))}).',
      '',
      HEADER,
      '|' + ' --- |' * columns,
      *lines,
      '',
    ]
  )


def _row(model: str, flags: tuple[str, ...], plan: dict) -> str:
  step, merge = plan['step'], plan['merge']
  several = f'{plan["slices"]} x ' if plan['slices'] > 1 else ''
  used = step['peak_bytes'] or 0
  programs = (plan[p] for p in ('step', 'merge', 'restart', 'evaluation'))
  seconds = sum(p.get('compile_seconds', 0.0) for p in programs)
  cells = (
    model,
    f'{several}{plan["topology"]} ({plan["devices"]})',
    f'{plan["mesh"]["stock"]} x {plan["mesh"]["data"]}',
    ' '.join(flag.removeprefix('--config.') for flag in flags),
    f'{used / 2**30:.1f} of {plan["hbm_bytes"] / 2**30:.1f} GiB',
    'yes' if plan['fits'] else 'no',
    f'{plan["seconds_per_step_at_peak"] * 1e3:.1f} ms',
    f'{plan["images_per_second_at_peak"]:,.0f}',
    _two(step, merge, 'cross_stock_bytes'),
    _two(step, merge, 'cross_slice_bytes'),
    f'{seconds:.0f} s',
  )
  return '| ' + ' | '.join(cells) + ' |'


def _two(step: dict, merge: dict, key: str) -> str:
  sizes = (step[key], merge[key])
  return ', '.join('?' if s is None else f'{s / 1e6:.1f} MB' for s in sizes)


if __name__ == '__main__':
  main()
