"""Real processes, killed at moments of all kinds, and started again."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROCESS = pathlib.Path(__file__).parent / 'process.py'


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
    # One device compiles in half the time of eight, and the first process
    # compiles for all.
    self._environment = {
      **os.environ,
      'XLA_FLAGS': '',
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONPATH': str(ROOT),
      'SLOW': str(slow),
    }

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
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
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
  found = read_run(config, tmp_path, setup)
  assert_identical(found, read_run(config, undisturbed, setup))
  assert not [name for name in _names(tmp_path) if not name.isdecimal()]


def test_ctrl_c(
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
  code, errors = command.interrupt(signal.SIGINT, _has_logged(4))
  assert code == 1
  [(name, step)] = re.findall(
    r'loop\.Interrupted: (\w+) at step (\d+): saved in', errors
  )
  assert name == 'SIGINT'
  assert 4 <= int(step) < 12
  assert str(tmp_path) in errors
  assert step in _names(tmp_path)
  command.finish()
  config = tiny_config(FLAGS)
  found = read_run(config, tmp_path, setup)
  assert_identical(found, read_run(config, undisturbed, setup))
