"""Every command, killed at random: its target is absent or right, then right.

Each is killed several times in a row, on what the one before has left, and then
runs to its end.
"""

import random
import re
import signal

import pytest

pytestmark = pytest.mark.kills

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS = {
  'merge': 6,
  'convert': 4,
  'evaluate': 4,
  'report': 6,
  'data check': 2,
  'train': 8,
  'demo': 4,
  'soups': 6,
  'geometry': 4,
}


def _catches(pid, number):
  """True once a process has a handler of its own for a signal."""
  try:
    with open(f'/proc/{pid}/status') as file:
      [mask] = re.findall(r'SigCgt:\s*(\w+)', file.read())
  except FileNotFoundError:
    return False
  return bool(int(mask, 16) >> (number - 1) & 1)


def _kill(server, target, explained, number, share):
  """Kills a command after a share of its time: the outcome and its text."""
  [pid] = server.start(target.argv)
  if number != signal.SIGKILL:
    while not _catches(pid, number) and not server.ended(0.001):
      pass
  server.ended(share * target.seconds)
  server.kill(pid, number)
  [(code, text)] = server.wait()
  actual = target.written()
  complete = actual == target.expected
  if code is None:
    return 'hang', text
  if not explained(code, text, number, done=complete):
    return 'traceback', f'{code}: {text}'
  if not complete and (code == 0 or (actual and not target.writes.in_part)):
    return 'wrong', f'{[*actual]}: {text}'
  if code == 0 and (left := target.left_over()):
    return 'written', str(left)
  if complete and actual:
    target.begin()
  return 'read' if complete and code == 0 else 'refused', text


def _finish(server, target):
  """Runs a command to its end after the last kill."""
  server.start(target.argv)
  [(code, text)] = server.wait()
  if code is None:
    return 'hang', text
  if code or target.written() != target.expected:
    return 'wrong', f'after the kills: {code}: {text}'
  left = target.left_over()
  return ('written', str(left)) if left else ('read', text)


@pytest.fixture
def attack(server, explained, tally):
  """Kills a command a number of times, in a row, and lets it end."""

  def run(name, count, target):
    draw = random.Random(name)

    def outcomes():
      target.begin()
      for _ in range(count):
        number = draw.choice(SIGNALS)
        kind, text = _kill(server, target, explained, number, draw.random())
        yield kind, f'{number.name}: {text}'
      yield _finish(server, target)

    tally(f'kills of {name}', outcomes())

  return run


@pytest.mark.parametrize('name', KILLS)
def test_kills(name, attack, target, scaled):
  count = scaled(KILLS[name])
  attack(name, count, target(name))


@pytest.mark.oracle  # needs TensorFlow
def test_kills_of_data(attack, target, tfrecord, scaled):
  count = scaled(6)
  flags = ['--data_dir={folder}', f'--manual_dir={tfrecord}/manual']
  prepare = target('data prepare', argv=['prepare', 'imagenet', *flags])
  attack('data prepare', count, prepare)
  source = tfrecord / 'imagenet2012' / '5.1.0'
  convert = target('data convert', argv=['convert', source, '{folder}'])
  attack('data convert', count, convert)
