import json
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from modelstock_jax import merging
from modelstock_jax.training import clock as clock_lib
from modelstock_jax.training import metrics


def _lines(workdir):
  return (workdir / metrics.FILE).read_text().splitlines()


def test_what_is_written_can_be_read(tmp_path):
  with metrics.Writer(tmp_path, start=0) as writer:
    writer.write(2, 'train', loss=[0.5, 0.25], learning_rate=0.1)
    writer.write(4, 'merge', ratio={'a/b': 1.0}, restarts=True)
  assert metrics.read(tmp_path) == [
    {'step': 2, 'kind': 'train', 'loss': [0.5, 0.25], 'learning_rate': 0.1},
    {'step': 4, 'kind': 'merge', 'ratio': {'a/b': 1.0}, 'restarts': True},
  ]


def test_a_line_is_on_disk_before_the_file_is_closed(tmp_path):
  with metrics.Writer(tmp_path, start=0) as writer:
    writer.write(1, 'train', loss=1.0)
    assert len(metrics.read(tmp_path)) == 1


def test_lines_after_the_restored_step_are_dropped(tmp_path):
  with metrics.Writer(tmp_path, start=0) as writer:
    for step in range(1, 6):
      writer.write(step, 'train', loss=float(step))
  with metrics.Writer(tmp_path, start=3) as writer:
    writer.write(4, 'train', loss=40.0)
  losses = {line['step']: line['loss'] for line in metrics.read(tmp_path)}
  assert losses == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}
  assert len(_lines(tmp_path)) == 4


@pytest.mark.parametrize('kept', [1, 10, -1])
def test_a_truncated_last_line_is_dropped(tmp_path, kept):
  with metrics.Writer(tmp_path, start=0) as writer:
    writer.write(1, 'train', loss=1.0)
    writer.write(2, 'train', loss=2.0)
  path = tmp_path / metrics.FILE
  first, second = path.read_text().splitlines()
  path.write_text(first + '\n' + second[:kept])
  assert [line['step'] for line in metrics.read(tmp_path)] == [1]
  with metrics.Writer(tmp_path, start=9) as writer:
    writer.write(10, 'train', loss=10.0)
  assert [json.loads(line)['step'] for line in _lines(tmp_path)] == [1, 10]


def test_a_last_line_without_its_end_is_complete(tmp_path):
  with metrics.Writer(tmp_path, start=0) as writer:
    writer.write(1, 'train', loss=1.0)
  path = tmp_path / metrics.FILE
  path.write_text(path.read_text().rstrip('\n'))
  with metrics.Writer(tmp_path, start=1) as writer:
    writer.write(2, 'train', loss=2.0)
  assert [json.loads(line)['step'] for line in _lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
  'line',
  [
    *(b'hello', b'\xff', b'3', b'[' * 10**5),
    *(b'{"step": 2}', b'{"step": "2", "kind": "x"}'),
  ],
)
def test_a_foreign_line_is_named(tmp_path, line):
  """What follows it would be lost if it counted as the end."""
  full = b'{"step": 1, "kind": "train"}\n'
  (tmp_path / metrics.FILE).write_bytes(full + line + b'\n' + full)
  with pytest.raises(ValueError, match=r'jsonl: line 2 is not of a run'):
    metrics.Writer(tmp_path, start=9)


def test_a_run_without_metrics_has_none(tmp_path):
  assert metrics.read(tmp_path) == []


def test_numbers_become_tensorboard_scalars(tmp_path):
  with metrics.Writer(tmp_path, start=0) as writer:
    writer.write(7, 'train', loss=[0.5, 0.25], note='text')
    writer.write(7, 'merge', cosine={'a/b': 0.5})
  [path] = tmp_path.glob('events.out.tfevents.*')
  events = path.read_bytes()
  # Tags are plain text in the protocol buffers.
  for tag in (
    b'train/loss/model_0',
    b'train/loss/model_1',
    b'merge/cosine/a/b',
  ):
    assert events.count(tag) == 1, tag
  assert b'note' not in events


def test_tensorboard_drops_the_points_that_are_written_again(tmp_path):
  """Those after the step that a killed run resumes from."""
  with metrics.Writer(tmp_path, start=3):
    pass
  [path] = tmp_path.glob('events.out.tfevents.*')
  data, events = path.read_bytes(), []
  while data:  # a length, its checksum, the event and its checksum
    size = struct.unpack('<Q', data[:8])[0]
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  starts = [event.step for event in events if event.HasField('session_log')]
  assert starts == [4]


def test_progress_starts_where_the_run_does(capsys):
  with metrics.progress(12, start=5, title='seed 3') as bar:
    bar.update(2)
    assert (bar.n, bar.total) == (7, 12)
  assert 'seed 3' in capsys.readouterr().err


LOG = {'num_models': 2, 'batch_size': 1, 'stop': True}


def test_a_first_step_that_is_not_finite(tmp_path):
  """There may be no checkpoint to speak of."""
  log = metrics.StepLog(tmp_path, start=0, total=1, title='', every=1, **LOG)
  bad = {name: np.float32([1, np.nan]) for name in ('loss', 'grad_norm')}
  with log, pytest.raises(FloatingPointError) as error:
    log.add(1, {**bad, 'learning_rate': np.float32(0.1)})
  assert str(error.value) == (
    'Step 1, model 1: the loss is nan, the norm of its gradient nan. This step '
    'is in no checkpoint; lower train.learning_rate (now at 1.00e-01).'
  )


@pytest.mark.parametrize('every', ['epoch', 1, 3])
def test_a_run_of_many_merges_has_a_small_log(tmp_path, every):
  """3,200 steps with a merge every four, of as many leaves as the demo's."""
  clock = clock_lib.Clock(4, 3200, every, 1, 1, 0)
  leaves = {
    f'image/block_{i}/mlp/kernel': np.float32(1 / (2 + i)) for i in range(56)
  }
  log = metrics.StepLog(
    tmp_path,
    start=0,
    total=3200,
    title='',
    every=50,
    **LOG,
  )
  names = ('loss', 'accuracy', 'grad_norm')
  with log:
    for step in range(1, 3201):
      log.add(
        step,
        {'learning_rate': np.float32(0.1)}
        | {name: np.float32([1 / 3, 1 / step]) for name in names},
      )
      due = clock.due(step)
      if due.merge:
        merged = merging.Merged(leaves, leaves, leaves)
        log.merge(step, merged, leaves if due.by_layer else {}, due)
        log.write(step, 'validation', accuracy=1 / 3, epoch=due.epoch)
  size = sum(path.stat().st_size for path in tmp_path.iterdir())
  assert size < 1000 * 3200
  lines = [x for x in metrics.read(tmp_path) if x['kind'] == 'merge']
  by_layer = [line for line in lines if line['cosine']]
  assert len(lines) >= 3200 // 4 // 3
  assert 80 <= len(by_layer) <= 101
  assert by_layer[-1] is lines[-1]
  for line in by_layer:
    assert line['norm'].keys() == line['ratio'].keys() == leaves.keys()


@pytest.mark.parametrize('epochs', [1, 30, 100])
def test_a_run_of_few_merges_logs_all_layers(epochs):
  clock = clock_lib.Clock(4, 4 * epochs, 'epoch', 5, 1, 0)
  assert all(clock.due(4 * epoch).by_layer for epoch in range(1, epochs + 1))
