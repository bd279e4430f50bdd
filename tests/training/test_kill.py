"""Real processes, killed at moments of all kinds, and started again."""

import collections
import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

pytestmark = pytest.mark.kills

ROOT = pathlib.Path(__file__).parents[2]
PROCESS = pathlib.Path(__file__).parent / 'process.py'
MOST_SECONDS = 30  # that are left from a notice of preemption to the end


def _environment(cache, slow, devices=1):
  """One device compiles in half the time of eight; the first process for all.

  Args:
    cache: folder of the compiled programs.
    slow: seconds before each step.
    devices: of the process.
  """
  return {
    **os.environ,
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'PYTHONPATH': str(ROOT),
    'SLOW': str(slow),
  }


class _Command:
  """One command, to be started again and again."""

  def __init__(self, workdir, flags, cache, slow=0.0):
    self.workdir = workdir
    self._arguments = [
      sys.executable,
      PROCESS,
      ROOT / 'configs' / 'digits.py',
      workdir,
      *flags,
    ]
    self._environment = _environment(cache, slow)

  def start(self):
    return subprocess.Popen(
      self._arguments,
      env=self._environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def finish(self):
    process = self.start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]

  def interrupt(self, number, when):
    """Sends a signal as soon as `when(workdir)`: (exit code, messages)."""
    process = self.start()
    deadline = time.monotonic() + 120
    while not when(self.workdir):
      assert process.poll() is None, process.stderr.read()[-2000:]
      assert time.monotonic() < deadline
      time.sleep(0.001)
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - sent < MOST_SECONDS
    return process.returncode, errors


def _names(workdir):
  folder = workdir / 'checkpoints'
  return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _is_saving(step):
  """Between the first file of a checkpoint and its name."""

  def when(workdir):
    return any(
      name != str(step) and re.match(rf'{step}\b', name)
      for name in _names(workdir)
    )

  return when


def _has_saved(step):
  return lambda workdir: str(step) in _names(workdir)


def _has_logged(step):
  def when(workdir):
    path = workdir / 'metrics.jsonl'
    return path.exists() and f'"step": {step},' in path.read_text()

  return when


FLAGS = {'checkpoint.every_steps': 3, 'merge.anchor': 'last_merge'}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def undisturbed(tiny_flags, cache, tmp_path_factory):
  """The workdir of a process that nothing happens to."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  _Command(workdir, tiny_flags(FLAGS), cache).finish()
  return workdir


def test_kill_9(
  tiny_config,
  tiny_flags,
  setup,
  undisturbed,
  cache,
  read_run,
  assert_identical,
  tmp_path,
):
  command = _Command(tmp_path, tiny_flags(FLAGS), cache, slow=0.02)
  moments = [
    _is_saving(3),  # the very first save
    _has_saved(4),  # after the first merge
    _has_logged(6),
    _is_saving(8),
  ]
  for when in moments:
    code, _ = command.interrupt(signal.SIGKILL, when)
    assert code == -signal.SIGKILL
  command.finish()
  config = tiny_config(FLAGS)
  actual = read_run(config, tmp_path, setup)
  assert_identical(actual, read_run(config, undisturbed, setup))
  assert not [name for name in _names(tmp_path) if not name.isdecimal()]


def test_asked_to_stop(
  tiny_config,
  tiny_flags,
  setup,
  undisturbed,
  cache,
  read_run,
  assert_identical,
  tmp_path,
):
  command = _Command(tmp_path, tiny_flags(FLAGS), cache, slow=0.05)
  code, errors = command.interrupt(signal.SIGTERM, _has_logged(4))
  assert code == 1
  [(name, step)] = re.findall(
    r'loop\.Interrupted: (\w+) at step (\d+): the run is saved in', errors
  )
  assert name == 'SIGTERM'
  assert 4 <= int(step) < 12
  assert str(tmp_path) in errors
  assert step in _names(tmp_path)
  command.finish()
  config = tiny_config(FLAGS)
  actual = read_run(config, tmp_path, setup)
  assert_identical(actual, read_run(config, undisturbed, setup))


def test_a_second_trainer_names_the_first(tiny_flags, cache, tmp_path):
  command = _Command(tmp_path, tiny_flags(FLAGS), cache, slow=0.5)
  first = command.start()
  deadline = time.monotonic() + 120
  while not (tmp_path / 'metrics.jsonl').exists():
    assert first.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.01)
  before = _names(tmp_path)
  second = command.start()
  _, errors = second.communicate(timeout=120)
  first.kill()
  first.communicate()
  assert second.returncode == 1
  message = rf'{tmp_path}: in use by process {first.pid} on \S+ since .* UTC'
  assert re.search(message, errors.splitlines()[-1])
  assert before <= _names(tmp_path)
  command.finish()


SEED = 20
KILLS = int(os.environ.get('MODELSTOCK_KILLS', 8))
MANY_STEPS = {
  'data.train': 'train[:64]',  # 8 steps an epoch, 24 in all
  'checkpoint.every_steps': 2,
  'merge.anchor': 'last_merge',
}


class _Server:
  """Starts the same command again and again, on eight devices."""

  def __init__(self, flags, cache):
    self._process = subprocess.Popen(
      [sys.executable, PROCESS, '--serve', ROOT / 'configs/digits.py', *flags],
      env=_environment(cache, slow=0.1, devices=8),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    self._alarm = threading.Timer(300, self._process.kill)  # if one hangs
    self._alarm.start()

  def start(self, workdir):
    """Starts a process: its id."""
    self._process.stdin.write(f'{workdir}\n')
    self._process.stdin.flush()
    return int(self.read())

  def read(self):
    return self._process.stdout.readline().strip()

  def finish(self, workdir):
    self.start(workdir)
    answers = [self.read()]
    if answers == ['training']:
      answers.append(self.read())
    assert answers[-1] == '0'

  def close(self):
    self._alarm.cancel()
    self._process.communicate()


@pytest.fixture
def server(tiny_flags, cache):
  server = _Server(tiny_flags(MANY_STEPS), cache)
  yield server
  server.close()


def _saves(workdir):
  """Return what identifies the unfinished checkpoints."""
  paths = (workdir / 'checkpoints').glob('*tmp*')
  with contextlib.suppress(FileNotFoundError):  # finished meanwhile
    return {(path.name, path.stat().st_ino) for path in paths}
  return set()


def _latest(workdir):
  return max([int(n) for n in _names(workdir) if n.isdecimal()], default=0)


def _wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.001)


def _kill(server, workdir, moment, step, draw):
  """Kills a process at random, once a step is saved: what it was doing."""
  left = _saves(workdir)  # by those that were killed before
  process = server.start(workdir)
  answers = []
  if moment == 'starting':
    time.sleep(draw.uniform(0, 2))
  else:
    answers.append(server.read())
    _wait_until(lambda: _latest(workdir) >= step)
  if moment == 'saving':
    _wait_until(lambda: _saves(workdir) - left)
    time.sleep(draw.uniform(0, 0.06))
  if moment == 'steps':
    time.sleep(draw.uniform(0, 0.3))
    _wait_until(lambda: not _saves(workdir) - left)
  with contextlib.suppress(ProcessLookupError):
    os.kill(process, signal.SIGKILL)
  while not answers or answers[-1] == 'training':
    answers.append(server.read())
  assert answers[-1] == str(-signal.SIGKILL)
  if _saves(workdir) - left:
    return 'saving'
  return 'steps' if 'training' in answers else 'starting'


def test_random_kills_in_a_row(
  tiny_config, setup, server, read_run, assert_identical, tmp_path
):
  """While it starts, takes its steps or saves; from the first to the last."""
  undisturbed, workdir = tmp_path / 'undisturbed', tmp_path / 'killed'
  server.finish(undisturbed)
  draw = random.Random(SEED)
  kinds, epochs = collections.Counter(), set()
  for number in range(KILLS):
    moment = draw.choice(['starting', 'steps', 'saving'])
    step = 20 * number // KILLS
    kinds[_kill(server, workdir, moment, step, draw)] += 1
    epochs.add(_latest(workdir) // 8)
  assert kinds.keys() == {'starting', 'steps', 'saving'}, kinds
  assert epochs == {0, 1, 2}
  server.finish(workdir)
  config = tiny_config(MANY_STEPS)
  actual = read_run(config, workdir, setup)
  assert_identical(actual, read_run(config, undisturbed, setup))
  assert _names(workdir) == _names(undisturbed)
