import pytest

from modelstock_jax import data
from modelstock_jax.report import merges
from modelstock_jax.report import results
from modelstock_jax.report import tables
from modelstock_jax.training import evaluation


def _lines(text):
  """The cells of a Markdown table, by the first of each line."""
  lines = [line for line in text.splitlines() if line.startswith('| ')]
  cells = [[x.strip() for x in line.strip('|').split('|')] for line in lines]
  return {name: rest for name, *rest in cells}


def _cells(text, method):
  return _lines(text)[method]


def _header(text):
  return _lines(text)['Method']


def test_table_is_what_one_computes_by_hand(rows):
  # Fine-tuned. digits: 90, 94: mean 92, sd |94 - 90| / sqrt(2) = 2.83.
  # noise: 50, 60: 55, 7.07. blur: 30, 20: 25, 7.07.
  # Shifts of seed 0: (50 + 30) / 2 = 40; of seed 1: (60 + 20) / 2 = 40: sd 0.
  table = tables.markdown_table(rows)
  assert _cells(table, 'Fine-tuned') == [
    '92.0 ± 2.8',
    '40.0 ± 0.0',
    '55.0 ± 7.1',
    '**25.0 ± 7.1**',
    '1',
  ]
  # Model Stock. digits: 92, 95: 93.5, 2.12. noise: 70, 60: 65, 7.07.
  # blur: 10, 30: 20, 14.14. Shifts: 40, 45: 42.5, 3.54.
  assert _cells(table, 'Model Stock (end)') == [
    '**93.5 ± 2.1**',
    '**42.5 ± 3.5**',
    '**65.0 ± 7.1**',
    '20.0 ± 14.1',
    '2',
  ]
  assert _header(table) == [
    'digits (test)',
    'Mean shift',
    'noise',
    'blur',
    'Cost',
  ]


def test_footnote_gives_n_and_binomial_errors():
  row = evaluation.Row('zero_shot', 'digits', 0, 0.9, 100)
  rows = [
    row,
    row._replace(method='fine_tuned', accuracy=0.5),
    row._replace(benchmark='noise', n=400, accuracy=0.2),
    row._replace(benchmark='noise', n=400, accuracy=0.8, method='fine_tuned'),
  ]
  # 100 sqrt(0.9 0.1 / 100) = 3, 100 sqrt(0.5 0.5 / 100) = 5;
  # 100 sqrt(0.2 0.8 / 400) = 2 for both.
  for table in (tables.markdown_table(rows), tables.text_table(rows)):
    words = ' '.join(table.split())
    assert 'digits 3.0-5.0 (n = 100); noise 2.0 (n = 400).' in words
    assert '±' not in words


@pytest.mark.parametrize('table', [tables.markdown_table, tables.text_table])
def test_one_seed_has_no_deviation(rows, table):
  assert '±' in table(rows)
  assert '±' not in table([row for row in rows if row.seed == 0])


def test_ties_are_all_best(rows):
  # 95.04 and 94.96 are both shown as 95.0.
  row = evaluation.Row('zero_shot', 'digits', 0, 0.9504, 100)
  rows = [
    row,
    row._replace(method='fine_tuned', accuracy=0.9496),
    row._replace(method='uniform_soup', accuracy=0.9494),
  ]
  table = tables.markdown_table(rows)
  assert _cells(table, 'Zero-shot')[0] == '**95.0**'
  assert _cells(table, 'Fine-tuned')[0] == '**95.0**'
  assert _cells(table, 'Uniform average')[0] == '94.9'
  text = tables.text_table(rows).splitlines()
  assert [line.count('*') for line in text[2:5]] == [1, 1, 0]


def test_methods_come_in_order_then_the_unknown(rows):
  row = rows[0]
  rows = [row._replace(method='mine'), rows[-1], row]
  assert results.methods(rows) == ['fine_tuned', 'model_stock_end', 'mine']
  assert _cells(tables.markdown_table(rows), 'mine')[-1] == ''


@pytest.mark.parametrize('num_models', [2, 4])
def test_cost_is_in_training_runs(num_models):
  rows = [
    evaluation.Row(method, 'digits', 0, 0.9, 100) for method in results.METHODS
  ]
  table = tables.markdown_table(rows, num_models=num_models)
  titles = [method.title for method in results.METHODS.values()]
  costs = [int(_cells(table, title)[-1]) for title in titles]
  assert costs == [0, 1, num_models, 1, *[num_models] * 3]


def test_without_the_built_in_benchmark_all_are_shifts(rows):
  rows = [row for row in rows if row.benchmark != 'digits']
  header = _header(tables.markdown_table(rows))
  assert header == ['Mean shift', 'noise', 'blur', 'Cost']


def test_what_was_not_measured_is_left_open(rows):
  rows = [row for row in rows if row[:2] != ('fine_tuned', 'blur')]
  assert _cells(tables.markdown_table(rows), 'Fine-tuned')[1::2] == ['-', '-']
  assert results.per_seed(rows, 'fine_tuned', ['noise', 'blur']) == {}


def test_text_table_fits_a_terminal_and_is_aligned():
  rows = [
    evaluation.Row(method, benchmark, seed, 0.5 + 0.01 * seed, 597)
    for method in results.METHODS
    for benchmark in ('digits', *data.SHIFTS)
    for seed in range(3)
  ]
  lines = tables.text_table(rows).splitlines()
  body = lines[:8]  # a title, a rule and methods with short titles
  assert {len(line) for line in body} == {len(body[0])}
  assert len(body[0]) <= 120
  assert all('*51.0±1.0' in line for line in body[2:])
  end = body[0].index('blur') + len('blur')
  assert all(line[end - 5 : end] == '*51.0' for line in body[2:])
  assert max(map(len, lines)) <= 120


# Accuracies of the authors' ViT-B/32, merged every epoch; in the paper the mean
# of the shifts is 50.99.
PAPER = {
  'imagenet_a': 0.29227,
  'objectnet_uncropped': 0.46307,
  'imagenet_sketch': 0.46210,
  'imagenet_r': 0.64293,
  'imagenet_v2': 0.68930,
  'imagenet': 0.79894,
}


def _imagenet_rows(names):
  sizes = {'imagenet_r': 200, 'imagenet_a': 200, 'objectnet_uncropped': 113}
  return [
    evaluation.Row(
      'model_stock_epoch',
      name,
      0,
      PAPER.get(name, 0.5),
      50,
      sizes.get(name, 1000),
    )
    for name in names
  ]


def test_columns_stand_as_in_the_paper():
  table = tables.markdown_table(_imagenet_rows(PAPER))
  assert _header(table) == [
    'ImageNet (test)',
    'Mean shift',
    'ImageNet-V2',
    'ImageNet-R',
    'ImageNet-Sketch',
    'ObjectNet (uncropped)',
    'ImageNet-A',
    'Cost',
  ]
  cells = [cell.strip('*') for cell in _cells(table, 'Model Stock (epoch)')]
  assert cells == ['79.9', '51.0', '68.9', '64.3', '46.2', '46.3', '29.2', '2']
  head = tables.text_table(_imagenet_rows(PAPER)).splitlines()[0].split()
  assert head[1:4] == ['imagenet', 'mean', 'shift']
  assert head[4:] == [*data.IMAGENET_SHIFTS, 'cost']


def test_mean_of_shifts_says_what_it_is_of():
  five = ' '.join(tables.markdown_table(_imagenet_rows(PAPER)).split())
  assert (
    'Mean shift: of ImageNet-V2, ImageNet-R, ImageNet-Sketch, ObjectNet '
    '(uncropped), ImageNet-A.' in five
  )
  four = _imagenet_rows([x for x in PAPER if x != 'objectnet_uncropped'])
  text = ' '.join(tables.text_table(four).split())
  assert (
    'Mean shift: of ImageNet-V2, ImageNet-R, ImageNet-Sketch, ImageNet-A.'
    in text
  )
  # (68.93 + 64.293 + 46.21 + 29.227) / 4 = 52.165
  assert '52.2' in text
  assert '51.0' not in text


def test_variants_have_no_part_in_the_mean():
  variants = [
    'objectnet',  # cropped, where the uncropped one is there
    'imagenet_v2_threshold',
    'imagenet_v2_top',
    'imagenet_real',
    'imagenet_c',
  ]
  rows = _imagenet_rows([*variants, *PAPER])
  table = tables.markdown_table(rows)
  assert _cells(table, 'Model Stock (epoch)')[1].strip('*') == '51.0'
  titles = map(results.benchmark_title, variants)
  assert _header(table)[7:] == [*titles, 'Cost']
  assert results.benchmarks(rows) == (['imagenet'], list(data.IMAGENET_SHIFTS))
  cropped = _imagenet_rows(['objectnet', 'imagenet', 'imagenet_a'])
  assert results.benchmarks(cropped)[1] == ['imagenet_a', 'objectnet']
  alone = tables.markdown_table(_imagenet_rows(['imagenet_real', 'imagenet']))
  assert 'Mean shift' not in alone


def test_footnote_gives_the_number_of_classes():
  text = ' '.join(tables.markdown_table(_imagenet_rows(PAPER)).split())
  assert '(n = 50, 1000 classes)' in text
  assert '(n = 50, 200 classes)' in text
  assert '(n = 50, 113 classes)' in text


def _differences(rows):
  """Titles of the columns, and the cells by methods."""
  table = tables.differences(rows)
  lines = {name: list(map(str, cells)) for name, *cells in table.rows}
  return list(table.header[1:]), lines


def test_differences_are_what_one_computes_by_hand(rows):
  # digits: 92 - 90 = 2, 95 - 94 = 1: 1.5, sd 1 / sqrt(2).
  # Mean shifts: 40 - 40 = 0, 45 - 40 = 5: 2.5, sd 5 / sqrt(2).
  assert _differences(rows) == (
    ['digits', 'Mean shift'],
    {'Model Stock (end) against Fine-tuned': ['+1.5 ± 0.7', '+2.5 ± 3.5']},
  )
  names = {'fine_tuned': 'model_stock_end', 'model_stock_end': 'fine_tuned'}
  swapped = [row._replace(method=names[row.method]) for row in rows]
  [cells] = _differences(swapped)[1].values()
  assert cells == ['-1.5 ± 0.7', '-2.5 ± 3.5']


def test_equal_methods_differ_by_no_negative_zero():
  row = evaluation.Row('fine_tuned', 'digits', 0, 0.9, 100)
  rows = [row, row._replace(method='model_stock_end', accuracy=0.8999)]
  [cells] = _differences(rows)[1].values()
  assert cells == ['+0.0']


def test_seeds_of_one_method_alone_are_not_compared(rows):
  rows = [row for row in rows if row[:3] != ('fine_tuned', 'digits', 1)]
  [cells] = _differences(rows)[1].values()
  assert cells[0] == '+2.0'


def test_merging_again_is_compared_with_merging_once(rows):
  again = [row._replace(method='model_stock_5') for row in rows[6:]]
  lines = _differences([*rows, *again])[1]
  periodic = 'Model Stock (every 5 epochs) against'
  assert list(lines) == [
    'Model Stock (end) against Fine-tuned',
    f'{periodic} Fine-tuned',
    f'{periodic} Model Stock (end)',
  ]
  assert lines[f'{periodic} Model Stock (end)'] == ['+0.0 ± 0.0'] * 2


def test_tables_of_merges(merge_line):
  lines = {k: merge_line(k, 0.1 * k) for k in range(1, 8)}
  table = tables.by_epoch(merges.collect([lines]))
  rows = {epoch: cells for epoch, *cells in table.rows}
  # 0.2 / 1.1, 0.8 / 1.4, 1.4 / 1.7.
  for epoch, cell in (
    ('1', '0.100 / 0.182'),
    ('4', '0.400 / 0.571'),
    ('7', '0.700 / 0.824'),
  ):
    assert rows[epoch] == [cell] * 7
  seeds = [{1: merge_line(1, 0.5, head_bias=bias)} for bias in (0.2, 0.4)]
  end = merges.collect(seeds)
  # Head: 0.5 (kernel) with 0.2 and with 0.4 (bias): 0.35 and 0.45. Ratios 2/3
  # with 1/3 and with 4/7: 0.5 and 0.619.
  table = tables.by_epoch(end)
  [[_, *cells]] = table.rows
  cell = dict(zip(table.header[1:], cells, strict=True))
  assert cell['head (2)'] == '0.400 / 0.560'
  assert cell['attention (4)'] == '0.500 / 0.667'
  # The mean of 1/3 and 4/7.
  rows = {name: cells for name, *cells in tables.by_layer(end).rows}
  assert rows['`head/bias`'] == ['0.300', '0.452']
