"""Processes that share the tensors of a merge, real ones."""

import json
import os
import subprocess
import sys

import pytest

from modelstock_jax import files
from modelstock_jax.files import layout
from modelstock_jax.files import processes

pytestmark = [
  pytest.mark.hosts,
  pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'),
]

# Forks a process for each dict of arguments; those that `die` are killed when
# they have merged a tensor. Prints a line for each when it has ended.
SHARED = """
import json, os, signal, sys, time
from modelstock_jax import files
from modelstock_jax.files import layout, processes

arguments, each, limit = map(json.loads, sys.argv[1:])
processes.TIME_LIMIT, processes._BEAT, layout.SHARD_SIZE = limit, 0.05, 800
for number, extra in enumerate(each):
  if os.fork():
    continue
  die, wait = extra.pop('die', False), extra.pop('wait', 0)
  def progress(done, total):
    if die:
      os.kill(os.getpid(), signal.SIGKILL)
  time.sleep(wait)
  try:
    merged = files.merge(**arguments | extra, process_id=number, threads=1,
      num_processes=len(each), progress=progress)
    line = f'{number}: merged {len(merged.ratio)}'
  except (OSError, ValueError) as error:
    line = f'{number}: {type(error).__name__}: {error}'
  os.write(1, f'{line}\\n'.encode())
  os._exit(0)
for _ in each:
  os.wait()
"""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
  monkeypatch.setattr(layout, 'SHARD_SIZE', 800)


def _share(anchor, models, output, each, limit=60, **arguments):
  """Merges with a process for each dict of arguments: their lines, sorted."""
  paths = {
    'anchor': str(anchor),
    'models': [str(model) for model in models],
    'output': str(output),
  }
  command = [sys.executable, '-c', SHARED]
  command += [json.dumps(paths | arguments), json.dumps(each), str(limit)]
  done = subprocess.run(
    command, capture_output=True, text=True, check=True, timeout=60
  )
  assert 'Traceback' not in done.stderr, done.stderr
  return sorted(done.stdout.splitlines())


def _bytes(folder):
  """What is in a folder and has no path of it, by name."""
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize('count', [2, 3])
@pytest.mark.parametrize(
  ('target', 'arguments'),
  [
    ('out', {}),
    ('out.safetensors', {'layers': '(.*)[.][qk]_proj[.](.*)'}),
  ],
)
def test_the_bytes_of_one_process(
  family, save, tmp_path, target, arguments, count
):
  anchor, models = save(family(num_models=3))
  for name in ('one', 'several'):
    (tmp_path / name).mkdir()
  one, several = (tmp_path / name / target for name in ('one', 'several'))
  merged = files.merge(anchor, models, one, **arguments)
  # The last one comes when the others have begun.
  each = [{} for _ in range(count - 1)] + [{'wait': 0.5}]
  lines = _share(anchor, models, several, each, **arguments)
  numbers = [
    int(line.removeprefix(f'{i}: merged ')) for i, line in enumerate(lines)
  ]
  assert numbers[0] == len(merged.ratio)
  assert 0 < min(numbers[1:]) <= sum(numbers[1:]) < numbers[0]
  folders = (one, several) if target == 'out' else (one.parent, several.parent)
  assert _bytes(folders[0]) == _bytes(folders[1])
  assert [
    path.name for path in several.parent.iterdir() if path.name[0] == '.'
  ] == []


@pytest.mark.parametrize('dead', [0, 1])
def test_killed_the_others_say_so_and_can_start_again(
  family, save, tmp_path, dead
):
  anchor, models = save(family())
  alone, out = tmp_path / 'alone', tmp_path / 'out'
  files.merge(anchor, models, alone)
  each = [{'die': True} if number == dead else {} for number in range(3)]
  lines = _share(anchor, models, out, each, limit=5)
  silent = rf'TimeoutError: process {dead} of 3: no sign of life for 5 s'
  if dead == 0:
    expected = [f'1: {silent}', f'2: {silent}']
  else:
    expected = [f'0: {silent}', '2: ValueError: process 0']
  for line, beginning in zip(lines, expected, strict=True):
    assert line.startswith(beginning)
  assert not out.exists()
  # What it left is not taken for a process 0 that lives.
  lines = _share(anchor, models, out, [{'wait': 0.5}, {}, {}])
  assert all(': merged' in line for line in lines), lines
  assert _bytes(out) == _bytes(alone)
  assert not list(tmp_path.glob('.out*'))


def test_an_error_of_one_is_that_of_all(family, save, tmp_path):
  trees = family()
  name = 'blocks.0.conv.weight'  # of process 1: the second in size
  trees[1][name][0] = float('nan')
  anchor, models = save(trees)
  lines = _share(anchor, models, tmp_path / 'out', [{}, {}])
  error = f'ValueError: {name}: values that are not finite'
  assert lines[0].startswith(f'0: ValueError: process 1: {name}: values that')
  assert lines[1].startswith(f'1: {error}')
  assert not list(tmp_path.glob('*out*'))


def test_other_arguments(family, save, tmp_path):
  anchor, models = save(family())
  each = [{}, {'strength': 0.5}]
  lines = _share(anchor, models, tmp_path / 'out', each)
  message = 'has other arguments than this one: strength. Give all'
  assert message in lines[0] + lines[1]
  assert not list(tmp_path.glob('*out*'))
  with pytest.raises(ValueError, match='process_id 2, num_processes 2: pro'):
    files.merge(anchor, models, tmp_path / 'out', process_id=2, num_processes=2)
  with pytest.raises(ValueError, match=r'processes count .* share an output'):
    files.merge(anchor, models, None, num_processes=2)


def test_one_that_never_starts(family, save, tmp_path, monkeypatch):
  anchor, models = save(family())
  monkeypatch.setattr(processes, 'TIME_LIMIT', 0.3)
  for number, silent in ((0, 1), (1, 0)):
    with pytest.raises(TimeoutError, match=f'process {silent} of 2: no sign'):
      files.merge(
        *(anchor, models, tmp_path / 'out'),
        process_id=number,
        num_processes=2,
      )
  assert not list(tmp_path.glob('*out*'))


def test_numbers_of_a_launcher(monkeypatch):
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_')):
      monkeypatch.delenv(name)
  # A batch script, or a shell in an allocation of four, is no step of four.
  monkeypatch.setenv('SLURM_NTASKS', '4')
  monkeypatch.setenv('SLURM_PROCID', '0')
  with pytest.raises(ValueError, match='num_processes auto: neither srun nor'):
    processes.of_launcher()
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  monkeypatch.setenv('SLURM_PROCID', '3')
  assert processes.of_launcher() == (3, 4)
  # mpirun in an allocation of Slurm, one task of which starts it.
  monkeypatch.setenv('OMPI_COMM_WORLD_RANK', '1')
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
  assert processes.of_launcher() == (1, 2)
