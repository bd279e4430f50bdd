"""A run of many steps, merges and saves takes no more than a short one."""

import os
import pathlib
import statistics
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.kills

ROOT = pathlib.Path(__file__).parents[2]
# At most 3,200 steps, 800 merges and 100 saves; `make test-kills` takes them.
STEPS = 32 * max(10, round(100 * float(os.environ.get('ATTACK_SHARE', '1'))))
MEBIBYTES = 24  # of growth, for what the allocator keeps


def _step(workdir):
  """The step of the last checkpoint."""
  names = [path.name for path in workdir.glob('checkpoints/*')]
  return max([int(name) for name in names if name.isdecimal()], default=0)


def _used(process):
  """Bytes in memory and open files; None when it has ended."""
  folder = pathlib.Path('/proc', str(process.pid))
  try:
    pages = int((folder / 'statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGESIZE'), len(os.listdir(folder / 'fd'))
  except (OSError, IndexError):
    return None


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc')
def test_memory_files_and_logs_stay_flat(tiny_flags, tmp_path, capsys):
  flags = {
    'train.epochs': STEPS // 4,
    'checkpoint.every_merges': 8,
    'merge.anchor': 'last_merge',
    'log.every_steps': 50,
  }
  command = [sys.executable, '-m', 'modelstock_jax.cli.main', 'train']
  command.append(f'--config={ROOT}/configs/digits.py')
  process = subprocess.Popen(
    [*command, f'--workdir={tmp_path}', *tiny_flags(flags)],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  early, late = [], []  # of the second and of the last quarter
  try:
    while process.poll() is None:
      step, used = _step(tmp_path), _used(process)
      if used and STEPS // 4 <= step < STEPS // 2:
        early.append(used)
      elif used and 3 * STEPS // 4 <= step < STEPS:
        late.append(used)
      time.sleep(0.05)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == 0
  assert _step(tmp_path) == STEPS
  # A save opens files for a while: the least are those that stay.
  before, after = (
    (statistics.median(memory), min(files))
    for memory, files in (
      zip(*samples, strict=True) for samples in (early, late)
    )
  )
  logs = [*tmp_path.glob('metrics.jsonl'), *tmp_path.glob('events.*')]
  size = sum(path.stat().st_size for path in logs)
  with capsys.disabled():
    print(
      f'\n{STEPS:,} steps, {STEPS // 4} merges, {STEPS // 32} saves: '
      f'{before[0] / 1e6:.0f} to {after[0] / 1e6:.0f} MB, {before[1]:.0f} to '
      f'{after[1]:.0f} open files, logs of {size / STEPS:.0f} bytes a step'
    )
  assert after[0] - before[0] < MEBIBYTES * 2**20
  assert after[1] <= before[1] + 4
  assert size < 1000 * max(STEPS, 1000)  # of 250 merges and more
