import re

from matplotlib import image as mpl_image
import pytest

from modelstock_jax.analysis import merges
from modelstock_jax.analysis import report
from modelstock_jax.analysis import results


@pytest.fixture
def swap(rows):
  """The rows with the two methods' accuracies exchanged."""
  names = {'fine_tuned': 'model_stock_end', 'model_stock_end': 'fine_tuned'}
  return [row._replace(method=names[row.method]) for row in rows]


def _findings(rows, found=None):
  tests, shifts = results.benchmarks(rows)
  return '\n'.join(report.findings(rows, tests, shifts, found or {}))


def test_report_has_everything(tmp_path, rows, histories):
  path = report.write(
    tmp_path / 'new',
    rows,
    histories,
    '{"seed": 17}',
    {'Command': 'modelstock demo', 'Peak memory': '1.25 GiB'},
  )
  assert path == tmp_path / 'new' / 'report.md'
  text = path.read_text(encoding='utf-8')
  links = re.findall(r'!\[[^]]+\]\(([^)]+)\)', text)
  assert links == [
    'plots/scatter.png',
    'plots/merge_end.png',
    'plots/merge_epoch.png',
  ]
  for link in links:
    assert mpl_image.imread(path.parent / link)[..., :3].std() > 0.02
  assert results.table(rows) in text
  assert '* Command: modelstock demo\n* Peak memory: 1.25 GiB\n' in text
  assert '```\n{"seed": 17}\n```' in text
  written = {p.name for p in path.parent.rglob('*') if p.is_file()}
  assert written == {'report.md', *(link.split('/')[1] for link in links)}


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
  row = results.Row('fine_tuned', 'digits', 0, 0.9, 100)
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


def test_tables_of_merges(merge_line):
  end = merges.collect(
    [[merge_line(1, 0.5, head_bias=bias)] for bias in (0.2, 0.4)]
  )
  lines = [
    merge_line(epoch, 0.1 * epoch, restarts=True) for epoch in range(1, 8)
  ]
  text = report._end_table(end)
  # Head: 0.5 (kernel) with 0.2 and with 0.4 (bias): 0.35 and 0.45, sd 0.07.
  # Ratios 2/3 with 1/3 and with 4/7: 0.5 and 0.619, 0.56 and sd 0.08; the
  # lowest is (1/3 + 4/7) / 2 = 0.45.
  head = '| head | 2 | 0.40 ± 0.07 | 0.56 ± 0.08 | 0.45 `head/bias` |'
  assert head in text
  attention = 'image/block_0/attention/qkv/kernel'
  assert (
    f'| attention | 4 | 0.50 ± 0.00 | 0.67 ± 0.00 | 0.67 `{attention}` |'
    in text
  )
  text = report._epoch_table(merges.collect([lines]))
  assert '| Cosine / ratio | Layers | Epoch 1 | Epoch 4 | Epoch 7 |' in text
  # 0.2 / 1.1, 0.8 / 1.4, 1.4 / 1.7.
  row = '| 0.100 / 0.182 | 0.400 / 0.571 | 0.700 / 0.824 |'
  assert f'| mlp | 2 {row}' in text
  assert f'| all | 15 {row}' in text


def test_parts_without_data_are_left_out(tmp_path, rows, histories):
  rows = [row for row in rows if row.benchmark == 'digits' and row.seed == 0]
  only = {(0, 'end'): histories[0, 'end']}
  text = report.write(tmp_path, rows, only, '', {}).read_text('utf-8')
  assert [p.name for p in (tmp_path / 'plots').iterdir()] == ['merge_end.png']
  assert 'after every epoch' not in text
  assert '±' not in text
  assert 'with one seed' in text


def test_number_of_models_is_that_of_the_run(tmp_path, rows):
  path = report.write(tmp_path, rows, {}, '', {}, num_models=5)
  text = path.read_text('utf-8')
  assert text.split('\n')[2].startswith('5 models are fine-tuned')
  assert results.table(rows, num_models=5) in text
