import pytest

from modelstock_jax.report import findings
from modelstock_jax.report import merges
from modelstock_jax.report import results
from modelstock_jax.training import evaluation


@pytest.fixture
def swap(rows):
  """The rows with the two methods' accuracies exchanged."""
  names = {'fine_tuned': 'model_stock_end', 'model_stock_end': 'fine_tuned'}
  return [row._replace(method=names[row.method]) for row in rows]


def _findings(rows, found=None):
  tests, shifts = results.benchmarks(rows)
  return '\n'.join(findings.sentences(rows, tests, shifts, found or {}))


def test_sentences_are_what_one_computes_by_hand(rows):
  # digits: 92 - 90 = 2, 95 - 94 = 1: 1.5, sd 1 / sqrt(2).
  # Mean shifts: 40 - 40 = 0, 45 - 40 = 5: 2.5, sd 5 / sqrt(2).
  assert _findings(rows).splitlines() == [
    'Highest on digits: Model Stock (end) (93.5 %).',
    'Highest on the mean of the 2 shifts: Model Stock (end) (42.5 %).',
    '**Model Stock (end)** against Fine-tuned: +1.5 ± 0.7 points on digits '
    '(ahead in all 2 seeds); +2.5 ± 3.5 points on the mean of the 2 shifts '
    '(mixed: ahead in 1, behind in 0 of 2 seeds).',
  ]


def test_sentences_turn_with_the_data(swap):
  assert _findings(swap).splitlines() == [
    'Highest on digits: Fine-tuned (93.5 %).',
    'Highest on the mean of the 2 shifts: Fine-tuned (42.5 %).',
    '**Model Stock (end)** against Fine-tuned: -1.5 ± 0.7 points on digits '
    '(behind in all 2 seeds); -2.5 ± 3.5 points on the mean of the 2 shifts '
    '(mixed: ahead in 0, behind in 1 of 2 seeds).',
  ]


def test_equal_methods_are_level():
  row = evaluation.Row('fine_tuned', 'digits', 0, 0.9, 100)
  rows = [row, row._replace(method='model_stock_end')]
  text = _findings(rows)
  assert 'Fine-tuned and Model Stock (end) (90.0 %)' in text
  assert '+0.0 points on digits (level)' in text


def test_seeds_of_one_method_alone_are_not_compared(rows):
  rows = [row for row in rows if row[:3] != ('fine_tuned', 'digits', 1)]
  assert '+2.0 points on digits (ahead)' in _findings(rows)


def test_merges_in_words(rows, histories):
  found = {
    mode: merges.collect([histories[seed, mode] for seed in range(2)])
    for mode in ('end', 'epoch')
  }
  text = _findings(rows, found)
  # c = 0.6 in all layers: t = 1.2 / 1.6.
  assert 'over 15 layers is 0.75, from 0.75' in text
  # c = 1 - 0.2^k: t = 2 c / (1 + c) is 0.889, 0.980, 0.996, 0.9992, ...
  assert 'is 0.89 after epoch 1 and 1.00 after epoch 6' in text
  assert 'From epoch 3 on it is 1.00' in text


def test_ratio_below_one_is_not_called_an_average(rows, merge_line):
  lines = [
    merge_line(1, 0.999, restarts=True),
    merge_line(2, 0.8),
  ]
  text = _findings(rows, {'epoch': merges.collect([lines])})
  assert 'is 1.00 after epoch 1 and 0.89 after epoch 2.' in text
  assert 'plain average' not in text


def test_ratio_of_one_throughout(rows, merge_line):
  lines = [merge_line(1, 0.999, restarts=True), merge_line(2, 1.0)]
  text = _findings(rows, {'epoch': merges.collect([lines])})
  assert 'From epoch 1 on it is 1.00' in text


def test_periods_say_how_long_they_are(merge_line):
  lines = [merge_line(5, 0.9, restarts=True), merge_line(10, 0.5)]
  rows = [
    evaluation.Row('model_stock_5', 'digits', 0, 0.9, 100),
    evaluation.Row('zero_shot', 'digits', 0, 0.7, 100),
  ]
  text = _findings(rows, {'5': merges.collect([lines])})
  assert 'Merged after every 5 epochs: the mean ratio is 0.95' in text
  assert (
    '**Model Stock (every 5 epochs)** against Zero-shot: +20.0 points' in text
  )
