"""Cases of an attack: each is refused, or read right, within its time."""

import contextlib
import os
import pathlib
import signal
import sys
import time

import pytest

SECONDS = 2  # of processor time, for a case

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_STARTS = ('os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen')
_REMOVES = ('os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'shutil.rmtree')


class HangError(BaseException):
  """A case that took too long; nothing that is attacked catches it."""


class _Acts:
  """What is written and started while a case runs, by Python's audit events."""

  def __init__(self):
    self.done: list[str] | None = None
    sys.addaudithook(self._note)  # which stays until the process ends

  def _note(self, event, args):
    if self.done is None:
      return
    acts = event in (*_STARTS, *_REMOVES, 'socket.connect')
    if event == 'open' and isinstance(args[2], int) and args[2] & _WRITES:
      acts = True
    if acts:
      self.done.append(f'{event}{args[:1]}')


@pytest.fixture(scope='session')
def acts():
  return _Acts()


@contextlib.contextmanager
def _limit():
  def stop(*_):
    raise HangError

  before = signal.signal(signal.SIGVTALRM, stop)
  signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def _explained(error):
  """True for an error in lines that a terminal can show."""
  lines = str(error).splitlines()
  return 0 < len(lines) < 30 and all(
    line.isprintable() and len(line) < 1000 for line in lines
  )


@pytest.fixture
def attack(acts, tmp_path, monkeypatch, tally, scaled):
  """Runs cases and tallies their outcomes.

  `run(name, count, case)`: case(number) does what is attacked and returns a
  function that is true if the result is right. Where the former raises, the
  case is refused.
  """
  folder = tmp_path / 'cwd'
  folder.mkdir()
  monkeypatch.chdir(folder)

  def outcome(case, number):
    prepared = case(number)
    start = time.process_time()
    acts.done = []
    try:
      with _limit():
        value = prepared()
    except (ValueError, OSError) as error:
      result = 'refused' if _explained(error) else 'traceback', repr(error)
    except HangError:
      result = 'hang', ''
    except Exception as error:
      result = 'traceback', repr(error)
    else:
      result = 'read', value
    finally:
      done, acts.done = acts.done, None
    if done or any(folder.iterdir()):
      return 'written', str(done)
    if time.process_time() - start > SECONDS + 0.5:
      return 'hang', ''
    return result

  def run(name, count, case, right):
    def outcomes():
      for number in range(scaled(count)):
        kind, value = outcome(case, number)
        if kind == 'read' and not right(number, value):
          kind = 'wrong'
        yield kind, str(value)[:300]

    assert tally(name, outcomes())['refused'], 'nothing was attacked'

  run.file = pathlib.Path(tmp_path, 'file')
  return run
