import json
import os

import pytest

from modelstock_jax.report import differences
from modelstock_jax.report import results
from modelstock_jax.report import summary
from modelstock_jax.training import evaluation

TRAIN = {'step': 4, 'kind': 'train', 'loss': [1.0, 2.0]}


def test_comparison_is_read_completely(comparison, rows, histories):
  actual = summary.read(comparison)
  assert actual.missing == []
  assert actual.rows == rows
  assert {(x.config.seed, x.mode): x.lines for x in actual.runs} == histories
  assert all(run.finished for run in actual.runs)
  merges = actual.merges()
  assert list(merges) == ['end', 'epoch']
  # Two seeds; one merge at the end, or after each of six epochs.
  assert merges['end'].cosine.shape == (2, 1, 15)
  assert merges['epoch'].cosine.shape == (2, 6, 15)


def test_finished_run(tmp_path, write_run, merge_line):
  lines = [TRAIN, merge_line(2, 0.5, restarts=True), merge_line(4, 0.5)]
  write_run(tmp_path, lines, 'merge.every=2', 'train.epochs=4', 'seed=7')
  results.save(
    [evaluation.Row('model_stock_2', 'digits', 7, 0.9, 10)],
    tmp_path / 'results.json',
  )
  actual = summary.read(tmp_path)
  assert actual.missing == []
  assert [(x.config.seed, x.mode, x.finished) for x in actual.runs] == [
    (7, '2_reset', True)
  ]
  assert actual.merges()['2_reset'].epochs == [2, 4]


def test_unfinished_run_says_what_is_missing(tmp_path, write_run, merge_line):
  lines = [TRAIN, merge_line(3, 0.5)]
  write_run(tmp_path, lines, 'merge.every=end', 'train.epochs=9')
  actual = summary.read(tmp_path)
  assert actual.merges() == {}  # that after epoch 3 was none
  unfinished, accuracy = actual.missing
  assert unfinished == (
    'The run with seed=0 and merge.every=end is not finished: 3 of 9 epochs. '
    'Rerun the same command to resume.'
  )
  assert f'`modelstock evaluate --workdir={tmp_path}`' in accuracy


def test_what_an_unfinished_run_has_only_measured(
  tmp_path, write_run, merge_line
):
  lines = [TRAIN, merge_line(2, 0.5, restarts=True), merge_line(3, 0.5)]
  write_run(tmp_path, lines[:1] + lines[2:], 'merge.every=2', 'train.epochs=4')
  assert summary.read(tmp_path).merges() == {}
  write_run(tmp_path, lines, 'merge.every=2', 'train.epochs=4')
  assert summary.read(tmp_path).merges()['2_reset'].epochs == [2]


def test_run_that_has_not_begun(tmp_path, write_run):
  write_run(tmp_path, [])
  assert 'not finished: 0 of 30 epochs' in summary.read(tmp_path).missing[0]


def test_unfinished_comparison_names_the_run(comparison, merge_line, write_run):
  write_run(
    comparison / 'seed_1' / 'end',
    [merge_line(5, 0.9)],
    'seed=1',
    'merge.every=end',
    'train.epochs=10',
  )
  (comparison / 'results.json').unlink()
  actual = summary.read(comparison)
  assert actual.missing[0].startswith(
    'The run with seed=1 and merge.every=end is not finished: 5 of 10 epochs'
  )
  assert '`modelstock demo` writes it' in actual.missing[1]
  assert actual.merges()['end'].cosine.shape == (1, 1, 15)  # of seed 0 alone


def test_results_of_an_earlier_checkpoint(
  tmp_path, write_run, merge_line, rows
):
  write_run(tmp_path, [merge_line(4, 0.5)], 'train.epochs=4')
  results.save(rows, tmp_path / 'results.json')
  os.utime(tmp_path / 'results.json', (1, 1))
  step = tmp_path / 'checkpoints' / '16'
  (step / 'merged').mkdir(parents=True)
  (step / '_CHECKPOINT_METADATA').write_text('{}')
  [sentence] = summary.read(tmp_path).missing
  assert sentence.startswith('results.json is older than the latest checkpoint')


def test_grid_has_models_in_place_of_runs(tmp_path, write_run):
  write_run(tmp_path, [], grid=True)
  model = {'index': 0, 'learning_rate': 0.001, 'status': 'finished'}
  (tmp_path / 'grid.json').write_text(json.dumps({'models': [model]}))
  actual = summary.read(tmp_path)
  assert actual.grid == [model]
  assert actual.runs == []
  number = actual.config.grid.num_models
  (grid,) = actual.missing
  assert grid.startswith(f'The grid has 1 of {number} models. Rerun the same')


def test_a_grid_that_has_not_kept_a_model(tmp_path, write_run):
  write_run(tmp_path, [], grid=True)
  (tmp_path / 'stacks').mkdir()
  actual = summary.read(tmp_path)
  assert actual.grid == actual.runs == []
  assert actual.missing[0].startswith('The grid has 0 of ')
  assert 'modelstock train' not in ' '.join(actual.missing)


@pytest.mark.parametrize(
  'text', ['{}', '[', '{"models": [1]}', '{"models": 1}']
)
def test_damaged_grid_is_named(tmp_path, write_run, text):
  write_run(tmp_path, [])
  (tmp_path / 'grid.json').write_text(text)
  with pytest.raises(ValueError, match=r'grid\.json: is not the list'):
    summary.read(tmp_path)


def test_not_a_workdir(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'config\.json'):
    summary.read(tmp_path)


@pytest.mark.parametrize(
  ('line', 'absent'),
  [
    ({'step': 1}, 'kind'),
    ([1], 'indices'),
    ({'step': 1, 'kind': 'merge', 'epoch': 1}, 'restarts, cosine, ratio'),
  ],
)
def test_damaged_metrics_are_named(tmp_path, write_run, line, absent):
  write_run(tmp_path, [TRAIN, line])
  with pytest.raises(ValueError, match=rf'metrics\.jsonl.* line 2.*{absent}'):
    summary.read(tmp_path)


def test_differences_are_read(comparison):
  # Of digits: 93.5 - 92.
  each = differences.Difference(
    'model_stock_end', 'fine_tuned', 'digits', 0.015, -0.01, 0.04, 2, 100
  )
  path = comparison / 'results.differences.json'
  path.write_text(json.dumps([each._asdict()]))
  actual = summary.read(comparison)
  assert (actual.differences, actual.missing) == ([each], [])
