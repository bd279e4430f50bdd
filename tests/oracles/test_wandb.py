"""`modelstock train --log=wandb` against the real package, offline."""

import json
import pathlib
import struct

import pytest

from modelstock_jax.cli import main
from modelstock_jax.training import loop
from modelstock_jax.training import metrics

pytestmark = pytest.mark.oracle
CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'


def _records(path):
  """The records of an offline run, a log as LevelDB's after 7 bytes."""
  from wandb.proto import wandb_internal_pb2

  data, place, record = path.read_bytes(), 7, b''
  while place < len(data):
    if (left := 32768 - place % 32768) < 7:
      place += left
      continue
    _, size, kind = struct.unpack_from('<IHB', data, place)
    record += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # all of a record, or its end
      yield wandb_internal_pb2.Record.FromString(record)
      record = b''


def _values(items):
  return {
    '.'.join(item.nested_key) or item.key: json.loads(item.value_json)
    for item in items
  }


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Runs `modelstock train --log=wandb`, whose loop writes a few lines."""
  for name in ('DIR', 'CACHE_DIR', 'CONFIG_DIR', 'DATA_DIR'):
    monkeypatch.setenv(f'WANDB_{name}', str(tmp_path / 'logs'))
  (tmp_path / 'logs').mkdir()
  monkeypatch.setenv('HOME', str(tmp_path))  # without a .netrc
  monkeypatch.delenv('WANDB_API_KEY', raising=False)

  def train(config, workdir, *, setup, mirror):
    with metrics.Writer(workdir, start=0, mirror=mirror) as writer:
      writer.write(4, 'train', loss=[0.5, 0.25])
      writer.write(4, 'merge', cosine={'a': 0.5, 'b': 0.25, 'c': 0.5})
      writer.write(4, 'validation', accuracy=0.75)
      writer.write(8, 'train', loss=[0.125, 0.25])
    return loop.Result(None, None, None, 8)

  def command(mode):
    import wandb

    wandb.teardown()  # which forgets the mode of the last test
    monkeypatch.setenv('WANDB_MODE', mode)
    monkeypatch.setattr(loop, 'train', train)
    (tmp_path / 'run').mkdir()
    flags = [f'--config={CONFIG}', f'--workdir={tmp_path}/run', '--log=wandb']
    status = main.main(['train', *flags])
    wandb.teardown()  # which waits until all is written
    return status

  return command


def test_a_run_is_logged_as_in_tensorboard(run, tmp_path):
  assert run('offline') == 0
  [path] = tmp_path.glob('logs/wandb/offline-run-*/*.wandb')
  records = list(_records(path))
  header = next(x.run for x in records if x.HasField('run'))
  assert (header.project, header.display_name) == ('modelstock', 'run')
  assert _values(header.config.update)['train']['epochs'] == 30
  first, second = (
    _values(x.history.item) for x in records if x.HasField('history')
  )
  assert (first['_step'], second['_step']) == (4, 8)
  assert first['train/loss/model_0'] == 0.5
  assert second['train/loss/model_0'] == 0.125
  assert first['validation/accuracy'] == 0.75
  assert first['merge/cosine/max'] == 0.5
  assert sum(first['merge/cosine.values']) == 3


def test_without_an_account_it_says_how_to_log_in(run, tmp_path, capsys):
  assert run('online') == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('modelstock train: --log=wandb: ')
  assert line.endswith('Log in with `wandb login`, or set WANDB_MODE=offline.')
  assert not list((tmp_path / 'run').iterdir())
