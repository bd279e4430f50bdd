"""Runs of several real processes on this machine, over its loopback.

Two processes of two devices, four of one: the mesh is the same, and so is
every bit of the result.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from modelstock_jax.training import hosts
from modelstock_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
DEVICES = 4  # of all processes together
HOST = socket.gethostname()


def _free_port(least=1024):
  """A port nobody listens on; those of SLURM are above the ephemeral ones."""
  while True:
    with socket.socket() as probe:
      if least == 1024:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
      port = int(np.random.default_rng().integers(least, 2**16))
      with contextlib.suppress(OSError):
        probe.bind(('127.0.0.1', port))
        return port


class _Processes:
  """Those of one command, with what they print in files."""

  def __init__(self, number, folder, command, environments):
    folder.mkdir(parents=True, exist_ok=True)
    self._paths = [folder / f'{i}.txt' for i in range(number)]
    self.processes = []
    for path, environment in zip(self._paths, environments, strict=True):
      with path.open('w') as out:
        self.processes.append(
          subprocess.Popen(
            command,
            env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
          )
        )

  def printed(self, index):
    return self._paths[index].read_text(errors='replace')

  def wait_until(self, condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
      ended = [p.poll() for p in self.processes]
      assert ended == [None] * len(ended), self.all_printed()
      assert time.monotonic() < deadline, self.all_printed()
      time.sleep(0.01)

  def finish(self, seconds=200):
    """Their exit codes; none may hang, nor outlive the test."""
    deadline = time.monotonic() + seconds
    try:
      return [
        process.wait(max(deadline - time.monotonic(), 0.1))
        for process in self.processes
      ]
    finally:
      self.end()

  def end(self):
    for process in self.processes:
      process.kill()
      process.wait()

  def all_printed(self):
    return '\n'.join(
      f'--- {i}: {self.printed(i)[-1500:]}' for i in range(len(self._paths))
    )


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def start(cache, tiny_flags, tmp_path_factory):
  """Starts `modelstock train` on so many processes."""
  runs = []

  def run(number, workdirs, *, slow=0.0, fail=''):
    port = _free_port()
    if isinstance(workdirs, pathlib.Path):
      workdirs = [workdirs] * number
    each = DEVICES // number
    environments = [
      {
        'JAX_NUM_CPU_DEVICES': str(each),
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': str(number),
        'JAX_PROCESS_ID': str(i),
        'SLOW': str(slow),
        'FAIL': fail,
        'WORKDIR': str(workdir),
      }
      for i, workdir in enumerate(workdirs)
    ]
    command = [
      sys.executable,
      HERE / 'host_process.py',
      'train',
      f'--config={ROOT / "configs" / "digits.py"}',
      *tiny_flags({**CHANGES, **SECONDS}),
    ]
    folder = tmp_path_factory.mktemp('printed')
    runs.append(_Processes(number, folder, command, environments))
    return runs[-1]

  yield run
  for started in runs:
    started.end()


# With the tiny config's own rate of 3e-2, Adam makes steps of rounding errors.
CHANGES = {'train.learning_rate': 1e-3}
SECONDS = {'hosts.heartbeat_seconds': 10, 'hosts.shutdown_seconds': 5}
# From the end of one to the end of all: its wait for them, theirs for it, and
# what is left of a collective.
MOST_SECONDS = 40
LOST = (1, -signal.SIGABRT)  # with JAX's message, from Python or from its core


def _steps(workdir):
  folder = workdir / 'checkpoints'
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def _has_done(run, step):
  """True if its progress line is at a logged step."""

  def has():
    actual = re.findall(r'\b(\d+)/12 \[', run.printed(0))
    return bool(actual) and int(actual[-1]) >= step

  return has


@pytest.fixture(scope='module')
def setup(prepare_on, tiny_config):
  """To read what they wrote: one process with as many devices."""
  return prepare_on(DEVICES, tiny_config(CHANGES))


@pytest.fixture(scope='module')
def undisturbed(start, tiny_config, setup, read_run, tmp_path_factory):
  """Return what a run of two processes leaves."""
  workdir = tmp_path_factory.mktemp('two')
  run = start(2, workdir)
  assert run.finish() == [0, 0], run.all_printed()
  assert 'Finished at step 12' in run.printed(0)
  assert 'Finished' not in run.printed(1)
  return read_run(tiny_config(CHANGES), workdir, setup)


@pytest.fixture(scope='module')
def assert_close(apart, setup):
  """Two runs are equal but for the order of sums over devices.

  Which makes 1e-6 to 1e-4, as a gradient near 0 changes sign or not; a learning
  rate that is off by 0.1 % makes 1e-3.
  """

  def check(actual, expected):
    lines, other = (
      [json.loads(line) for line in run['metrics'] if '"train"' in line]
      for run in (actual, expected)
    )
    assert [line['step'] for line in lines] == [line['step'] for line in other]
    for line, same in zip(lines, other, strict=True):
      np.testing.assert_allclose(line['loss'], same['loss'], rtol=1e-5)
    models, same = (
      [run[name] for name in expected if name.startswith('.state.params')]
      for run in (actual, expected)
    )
    assert apart(models, same, setup.anchor) < 5e-4

  return check


@pytest.mark.hosts
def test_two_processes_train_as_one(
  undisturbed, tiny_config, setup, read_run, assert_close, tmp_path
):
  config = tiny_config(CHANGES)
  loop.train(config, tmp_path, setup=setup)
  assert_close(undisturbed, read_run(config, tmp_path, setup))


@pytest.mark.hosts
def test_a_run_of_many_ends_and_beginnings(
  start,
  tiny_config,
  setup,
  read_run,
  undisturbed,
  assert_identical,
  assert_close,
  tmp_path,
):
  workdir = tmp_path / 'run'
  config = tiny_config(CHANGES)

  run = start(2, workdir, slow=0.5)
  run.wait_until(_has_done(run, 4))
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.finish() == [143, 143], run.all_printed()
  step = _same(run, r'SIGTERM at step (\d+): the run is saved')
  assert _steps(workdir)[-1] == step
  copy = shutil.copytree(workdir, tmp_path / 'copy')

  # Process 0 has the coordination service, so it is lost in another way.
  for victim, other in ((0, 1), (1, 0)):
    run = start(2, workdir, slow=0.5)
    run.wait_until(_has_done(run, step + 1))
    run.processes[victim].kill()
    codes = run.finish(MOST_SECONDS)
    assert codes[victim] == -signal.SIGKILL
    assert codes[other] in LOST, run.all_printed()
    assert f'Resuming from step {step}.' in run.printed(0)
    assert 'Resuming' not in run.printed(1)  # process 0 says it for all

  run = start(2, workdir)
  assert run.finish() == [0, 0], run.all_printed()
  assert_identical(read_run(config, workdir, setup), undisturbed)

  # From where the two had stopped: one process, four of them, and one again.
  with pytest.raises(loop.Interrupted, match=f'SIGTERM at step {step + 1}:'):
    loop.train(config, copy, setup=_signal_at(setup, 1))
  run = start(4, copy, slow=0.5)
  run.wait_until(_has_done(run, step + 2))
  run.processes[3].send_signal(signal.SIGTERM)
  assert run.finish() == [143] * 4, run.all_printed()
  last = _same(run, r'SIGTERM at step (\d+): the run is saved')
  assert f'Resuming from step {step + 1}.' in run.printed(0)
  assert step + 1 < last
  loop.train(config, copy, setup=setup)
  assert_close(read_run(config, copy, setup), undisturbed)


def _same(run, pattern):
  """The number that all of them have printed."""
  actual = {
    tuple(re.findall(pattern, run.printed(i)))
    for i in range(len(run.processes))
  }
  [[number]] = actual
  return int(number)


def _signal_at(setup, number):
  """A setup that gets a SIGTERM in its so-manieth step."""
  calls = []

  def train(*arguments):
    calls.append(1)
    if len(calls) == number:
      os.kill(os.getpid(), signal.SIGTERM)
    return setup.programs.train(*arguments)

  return setup._replace(programs=setup.programs._replace(train=train))


@pytest.mark.hosts
def test_a_workdir_of_each_host_is_refused(start, tmp_path):
  folders = [tmp_path / 'a', tmp_path / 'b']
  run = start(2, folders)
  assert run.finish() == [1, 1], run.all_printed()
  for i in (0, 1):
    assert (
      f'--workdir is not shared: what process 0 ({HOST}) has written there is '
      f'not seen by\n  process 1 ({HOST}): {folders[1]}\n'
    ) in run.printed(i)
  assert not list(folders[0].glob('.seen*'))


@pytest.mark.hosts
def test_an_error_of_one_ends_all(start, tmp_path):
  """Process 1 does not come to where the others wait for it."""
  run = start(4, tmp_path, fail='1')
  run.wait_until(lambda: 'no such data' in run.printed(1))
  codes = run.finish(MOST_SECONDS)
  assert set(codes) <= set(LOST), run.all_printed()
  assert 'Traceback (most recent call last)' in run.printed(1)
  assert 'modelstock train: no such data' in run.printed(1)


@pytest.mark.hosts
def test_they_talk(tmp_path):
  """Three tasks of a SLURM job, which need no flag."""
  job = _free_port(least=61440) - 61440  # from which jax makes the port
  shared = tmp_path / 'shared'
  (shared / 'broken').mkdir(parents=True)
  (shared / 'broken' / 'config.json').write_text('{"seed": 1')
  environments = [
    {
      'JAX_NUM_CPU_DEVICES': '1',
      'SLURM_JOB_ID': str(job),
      'SLURM_STEP_NODELIST': 'localhost',
      'SLURM_NTASKS': '3',
      'SLURM_STEP_NUM_TASKS': '3',
      'SLURM_PROCID': str(i),
      'SLURM_LOCALID': str(i),
    }
    for i in range(3)
  ]
  command = [sys.executable, HERE / 'host_talk.py', shared]
  run = _Processes(3, tmp_path / 'printed', command, environments)
  assert run.finish() == [0] * 3, run.all_printed()
  heard = [json.loads(run.printed(i).splitlines()[-1]) for i in range(3)]
  for i, one in enumerate(heard):
    assert one['processes'] == 3
    assert one['gather'] == ['a', 'b', 'c']
    assert one['first'] == {'process': 0}
    assert one['again'] == [0]
    assert one['refused'] == 'FileNotFoundError: there is no anchor'
    assert re.match(
      f'ValueError: {shared}/broken/config.json: is not the config of a run',
      one['claim'],
    )
    assert one['shared'] is None
    assert one['seconds'] < 5
    assert one['left'] == ['0', '1', '2', 'broken']
    others = '\n  '.join(
      f'process {k} ({HOST}): {shared}/{k}' for k in range(3) if k
    )
    assert f'is not seen by\n  {others}\n' in one['own'], i


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (('h:1', None, None), 'h:1 --num_processes= --process_id=: give all three'),
    ((None, 2, 0), '--coordinator= --num_processes=2'),
    (('h', 2, 0), '--coordinator=h .*HOST:PORT'),
    (('h:1', 2, 2), '--process_id=2: .*index of this process, from 0'),
    (('h:1', 2, -1), '--process_id=-1: '),
  ],
)
def test_half_a_description_is_an_error(given, message):
  with pytest.raises(ValueError, match=message):
    hosts.start(*given)


def test_a_step_of_one_task_is_alone(monkeypatch):
  """As `srun --pty bash` within a job of four."""
  for name, value in {
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '4',
    'SLURM_STEP_NUM_TASKS': '1',
    'SLURM_PROCID': '0',
    'SLURM_LOCALID': '0',
  }.items():
    monkeypatch.setenv(name, value)
  hosts.start(initialization_seconds=1)
  assert not hosts.is_multihost()
