"""Training, killed and asked to stop at chosen moments: all in a row."""

import re
import signal

import pytest

pytestmark = pytest.mark.kills


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


MOMENTS = [
  (_is_saving(3), signal.SIGKILL),  # the very first save
  (_has_saved(8), signal.SIGKILL),  # after the first merge
  (_has_logged(10), signal.SIGTERM),
  (_is_saving(16), signal.SIGKILL),
  (_has_logged(20), signal.SIGKILL),
]


def test_moments(server, target, explained, tally):
  target = target('train')
  target.begin()
  folder = target.folder

  def kills():
    for when, number in MOMENTS:
      [pid] = server.start(target.argv, slow=0.05)
      while not when(folder) and not server.ended(0.001):
        pass
      server.kill(pid, number)
      [(code, text)] = server.wait()
      saved = re.findall(r'at step (\d+): the run is saved', text)
      if code is None:
        yield 'hang', text
      elif not explained(code, text, number, done=False):
        yield 'traceback', f'{code}: {text}'
      elif code == 0 or not {*saved} <= _names(folder):
        yield 'wrong', f'{code}: {text}'
      else:
        yield 'refused', text

  tally('kills of train, at chosen moments', kills())
  server.run(*target.argv)
  assert target.written() == target.expected
  assert not target.left_over()
