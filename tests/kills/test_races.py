"""Commands that write one target at once: each ends right, or refuses."""

import json
import random
import re

import pytest

pytestmark = pytest.mark.kills

# Full numbers of races; of what writes a new output one alone may win.
ONE_WINS = {
  'merge merge': 14,
  'merge merge merge merge': 12,
  'merge convert': 8,
  'convert convert': 6,
}
# Whoever waited may follow when the first has ended.
ALL_MAY_WIN = {
  'report report': 6,
  'evaluate evaluate': 4,
  'train train': 4,
  'soups soups': 2,
}
REFUSED = re.compile(
  r'(?:modelstock|python -m) [\w.]+: \S+(?:: in use by (?:another process|'
  r'process (?P<pid>\d+) on \S+ since [-\d]+ [:\d]+ UTC)\. Wait until it '
  r'ends, or stop it\.'
  r'| already exists\. Remove it, or choose another --output\.'
  r'| is not empty\. Name a new folder: nothing is overwritten\.)'
)


def _outcome(code, text, right, pids):
  """What one of the commands ended in."""
  line = text.rstrip('\n').split('\n')[-1].split('\r')[-1]
  refused = REFUSED.fullmatch(line)
  if code is None:
    return 'hang'
  if code == 0:
    return 'read' if right else 'wrong'
  if 'Traceback' in text or code != 1 or not refused:
    return 'traceback'
  known = not refused['pid'] or int(refused['pid']) in pids
  return 'refused' if known else 'wrong'


@pytest.mark.parametrize('race', [*ONE_WINS, *ALL_MAY_WIN])
def test_races(race, server, target, tally, scaled):
  count = scaled({**ONE_WINS, **ALL_MAY_WIN}[race])
  names = race.split()
  targets = [target(name, names[0]) for name in names]
  draw = random.Random(race)

  def run():
    targets[0].begin()
    most = draw.choice([0, 0.05, targets[0].seconds])  # apart at the start
    waits = [draw.uniform(0, most) for _ in names]
    pids = server.start(*(each.argv for each in targets), waits=waits)
    ended = server.wait()
    kinds = []
    for each, (code, text) in zip(targets, ended, strict=True):
      right = each.written() == each.expected
      kinds.append(_outcome(code, text, right, pids))
      yield kinds[-1], f'{code}: {text}'
    wins = kinds.count('read')
    if wins == 0 or (wins > 1 and race in ONE_WINS):
      yield 'wrong', f'{wins} have won: {ended}'
    if left := targets[0].left_over():
      yield 'written', str(left)

  def outcomes():
    for _ in range(count):
      yield from run()

  tally(f'races of {race}', outcomes())


def test_evaluate_while_it_trains(server, target, tally, scaled):
  count = scaled(4)
  trained = target('train')
  anchor = json.loads(target('evaluate').expected['results.json'])[0]
  draw = random.Random(0)

  def run():
    trained.begin()
    output = trained.folder.parent / 'during.json'
    output.unlink(missing_ok=True)
    evaluate = [*trained.argv[:1], 'evaluate', f'--output={output}']
    server.start(
      trained.argv,
      [*evaluate, f'--workdir={trained.folder}'],
      waits=[0, draw.uniform(0, 1.5 * trained.seconds)],
      slow=0.05,
    )
    ended = server.wait()
    right = [trained.written() == trained.expected, False]
    if ended[1][0] == 0:
      rows = json.loads(output.read_text())
      # Four where the models have just started again from the merge.
      right[1] = len(rows) in (4, 12) and rows[0] == anchor
    for (code, text), each in zip(ended, right, strict=True):
      if code is None:
        yield 'hang', text
      elif 'Traceback' in text:
        yield 'traceback', text
      elif code == 1 and str(trained.folder) in text.splitlines()[-1]:
        yield 'refused', text
      else:
        yield ('read' if code == 0 and each else 'wrong'), f'{code}: {text}'

  def outcomes():
    for _ in range(count):
      yield from run()

  tally('races of train and evaluate', outcomes())
