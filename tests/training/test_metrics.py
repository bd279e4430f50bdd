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


def _events(workdir):
  [path] = workdir.glob('events.out.tfevents.*')
  data, events = path.read_bytes(), []
  while data:  # a length, its checksum, the event and its checksum
    size = struct.unpack('<Q', data[:8])[0]
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return events


def _values(workdir):
  return [value for event in _events(workdir) for value in event.summary.value]


def test_numbers_become_tensorboard_scalars(tmp_path):
  with metrics.Writer(tmp_path, start=0) as writer:
    writer.write(7, 'train', loss=[0.5, None], note='text', ratio=0.25)
  scalars = {value.tag: value.simple_value for value in _values(tmp_path)}
  assert scalars == {'train/loss/model_0': 0.5, 'train/ratio': 0.25}


def test_layers_become_three_scalars_and_a_histogram(tmp_path):
  cosine = {f'block_{i}/kernel': i / 64 for i in range(64)}
  mirrored = []
  with metrics.Writer(
    tmp_path, start=0, mirror=lambda *values: mirrored.append(values)
  ) as writer:
    writer.write(7, 'merge', cosine=cosine, ratio={})
  *scalars, histogram = _values(tmp_path)
  expected = {
    'merge/cosine/min': 0,
    'merge/cosine/mean': 63 / 128,
    'merge/cosine/max': 63 / 64,
  }
  assert {value.tag: value.simple_value for value in scalars} == expected
  assert histogram.tag == 'merge/cosine'
  assert histogram.histo.num == 64
  assert histogram.histo.sum == 31.5
  [line] = metrics.read(tmp_path)
  assert line['cosine'] == cosine
  [(step, mirrored_scalars, layers)] = mirrored
  assert (step, mirrored_scalars) == (7, expected)
  np.testing.assert_array_equal(layers['merge/cosine'], [*cosine.values()])


def test_tensorboard_drops_the_points_that_are_written_again(tmp_path):
  """Those after the step that a killed run resumes from."""
  with metrics.Writer(tmp_path, start=3):
    pass
  events = _events(tmp_path)
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


def test_compiling_is_shown_and_is_not_part_of_speed_or_time(
  tmp_path, monkeypatch, capsys
):
  """Steps of a second, a first of 100 s and a merge of 50 s."""
  now = [1000.0]
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
  monkeypatch.setattr('tqdm.std.time', lambda: now[0])
  log = metrics.StepLog(tmp_path, start=0, total=40, title='', every=4, **LOG)
  names = ('loss', 'grad_norm')
  steps = {name: np.float32([1, 1]) for name in names}
  steps['learning_rate'] = np.float32(0.1)
  due = clock_lib.Due(1, False, True, True, False, True)
  with log:
    assert 'compiling (about 20 s)' in capsys.readouterr().err
    now[0] += 100
    for step in range(1, 17):
      log.add(step, steps)
      now[0] += 1
      if step in (6, 10):  # only the first merge is compiled
        log.check(due)
        assert ('compiling' in capsys.readouterr().err) == (step == 6)
        now[0] += 50 if step == 6 else 2
    bar = log._bar.format_dict
  # 16 steps, and the second merge; the last step is not awaited.
  assert bar['elapsed'] == 16 + 2
  assert bar['rate'] is None  # the mean since the start
  # Two models of one image: steps 1 to 4, of which 4 is not awaited, and so on.
  speeds = [x['images_per_second'] for x in metrics.read(tmp_path)]
  assert speeds == [2 * 4 / 3, 2 * 4 / 4, 2 * 4 / 6, 2 * 4 / 4]


def test_scores_are_logged_to_the_terminal(tmp_path, caplog):
  log = metrics.StepLog(tmp_path, start=0, total=4, title='', every=4, **LOG)
  with log, caplog.at_level('INFO'):
    log.validation(4, {'accuracy': 0.9375, 'loss': 0.25, 'n': 400}, 1)
  assert caplog.messages == ['Epoch 1: validation accuracy 0.9375, loss 0.25.']
  [line] = metrics.read(tmp_path)
  assert line == {
    'step': 4,
    'kind': 'validation',
    **{'accuracy': 0.9375, 'loss': 0.25, 'n': 400, 'epoch': 1},
  }


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
