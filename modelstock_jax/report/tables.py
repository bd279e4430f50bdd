"""Tables of a comparison and of merges: for a page, Markdown or a terminal."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import math
import textwrap
from typing import NamedTuple

import numpy as np
import tabulate

from modelstock_jax.report import differences as differences_lib
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import results
from modelstock_jax.training import evaluation


class Table(NamedTuple):
  """A table before it is written.

  Attributes:
    caption: shown above it on the page.
    header: titles of the columns.
    rows: cells as Markdown; the first of each row is its heading.
  """

  caption: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]


def mean_cell(shares: Mapping[int, float], form: str = '.1f') -> str:
  """Return the mean of shares in percent and, of several, the sd (ddof = 1).

  Args:
    shares: for each seed, of 1.
    form: the format of the mean.

  >>> mean_cell({0: 0.5, 1: 0.51})
  '50.5 ± 0.7'
  """
  if not shares:
    return '-'
  percent = 100 * np.array(list(shares.values()))
  mean = f'{percent.mean():{form}}'
  if len(percent) == 1:
    return mean
  return f'{mean} ± {np.std(percent, ddof=1):.1f}'


def accuracy(rows: Sequence[evaluation.Row], *, num_models: int = 2) -> Table:
  """Return the table of accuracies in percent, mean and sd over seeds.

  A row for each method; columns are the in-distribution benchmarks, the mean
  of the shifts, the shifts, what has no part in it, and the cost. The sd
  of the mean shift is that of the seeds' means. The best of each column, as
  shown, is bold.

  Args:
    rows: of a comparison.
    num_models: N, the number of training runs behind an average or a merge.

  Returns:
    The table.

  >>> table = accuracy([evaluation.Row('zero_shot', 'digits', 0, 0.9, 100)])
  >>> table.header, table.rows[0]
  (['Method', 'digits (test)', 'Cost'], ['Zero-shot', '**90.0**', '0'])
  """
  _, titles, benchmarks = zip(*_columns(rows), strict=True)
  columns = [_column(rows, names) for names in benchmarks]
  lines = []
  for name, *cells in zip(results.methods(rows), *columns, strict=True):
    method = results.find_method(name)
    cost = num_models if method.cost == 'N' else method.cost
    lines.append([method.title, *cells, '' if cost is None else str(cost)])
  caption = 'Accuracy in %, the best of each column in bold'
  return Table(caption, ['Method', *titles, 'Cost'], lines)


def differences(
  rows: Sequence[evaluation.Row],
  intervals: Sequence[differences_lib.Difference] = (),
) -> Table:
  """Return how far each Model Stock is from the methods before it, in points.

  Differences are taken seed by seed, of the seeds that both methods have: their
  mean and sd, and the interval where there is one.

  >>> row = evaluation.Row('model_stock_end', 'digits', 0, 0.94, 100)
  >>> other = row._replace(method='fine_tuned', accuracy=0.95)
  >>> differences([row, other]).rows
  [['Model Stock (end) against Fine-tuned', '-1.0']]
  """
  columns = {name: [name] for name in _tests(rows)}
  if shifts := results.benchmarks(rows)[1]:
    columns['Mean shift'] = shifts
  interval_of = {each[:3]: each for each in intervals}
  lines = []
  for method, other in results.pairs(row.method for row in rows):
    titles = [results.find_method(name).title for name in (method, other)]
    line = [' against '.join(titles)]
    for name, names in columns.items():
      cell = _difference(rows, method, other, names)
      if each := interval_of.get((method, other, name)):
        cell += f' [{100 * each.low:+z.1f}, {100 * each.high:+z.1f}]'
      line.append(cell)
    lines.append(line)
  caption = 'Differences in points, seed by seed'
  if intervals:
    caption += ', and their 95 % intervals'
  return Table(
    caption, ['Methods', *map(results.benchmark_title, columns)], lines
  )


def corruptions(rows: Sequence[evaluation.Row]) -> list[Table]:
  """Return a table for each benchmark that was evaluated under corruptions.

  >>> row = evaluation.Row('fine_tuned', 'validation', 0, 0.9, 100)
  >>> dark = row._replace(benchmark='validation@contrast', accuracy=0.5)
  >>> [table] = corruptions([row, dark])
  >>> table.header
  ['Method', 'Validation', 'Contrast']
  """
  tables = []
  names = list(dict.fromkeys(row.benchmark for row in rows))
  titles = [results.find_method(name).title for name in results.methods(rows)]
  for test in results.split(names)[0]:
    kinds = [name for name in names if name.startswith(f'{test}@')]
    cells = [_column(rows, [name]) for name in (test, *kinds)]
    header = [name.partition('@')[2].replace('_', ' ') for name in kinds]
    header = ['Method', *map(str.capitalize, [test, *header])]
    lines = list(zip(titles, *cells, strict=True))
    if kinds:
      tables.append(Table('Accuracy in % under corruptions', header, lines))
  return tables


def markdown_table(
  rows: Sequence[evaluation.Row], *, num_models: int = 2
) -> str:
  """Write the table of `accuracy` as Markdown, the best in bold.

  Args:
    rows: see `accuracy`.
    num_models: see `accuracy`.

  Returns:
    The table and its footnote.

  >>> row = evaluation.Row('zero_shot', 'digits', 0, 0.9, 100, 10)
  >>> other = row._replace(method='fine_tuned', accuracy=0.8)
  >>> print(markdown_table([row, other]))
  | Method     |   digits (test) |   Cost |
  |:-----------|----------------:|-------:|
  | Zero-shot  |        **90.0** |      0 |
  | Fine-tuned |            80.0 |      1 |
  <BLANKLINE>
  Accuracy in %. Cost: training runs. Sampling standard error, in points: digits
  3.0-4.0 (n = 100, 10 classes).
  """
  table = accuracy(rows, num_models=num_models)
  return f'{markdown(table)}\n\n{footnote(rows)}'


def markdown(table: Table) -> str:
  """Write a table as Markdown, numbers to the right, the best in bold.

  >>> print(markdown(Table('', ['Layer', 'Ratio'], [['head', '0.50']])))
  | Layer   |   Ratio |
  |:--------|--------:|
  | head    |    0.50 |
  """
  return _tabulate(table.rows, table.header, 'pipe')


def text(table: Table) -> str:
  """Write a table for a terminal.

  >>> print(text(Table('', ['Layer', 'Ratio'], [['head', '0.50']])))
  Layer      Ratio
  head        0.50
  """
  return _tabulate(table.rows, table.header, 'plain')


def text_table(
  rows: Sequence[evaluation.Row],
  *,
  published: Sequence[evaluation.Row] = (),
  num_models: int = 2,
) -> str:
  """Write the table of `accuracy` for a terminal, the best marked '*'.

  Benchmarks have the names of the command line. Single shifts come without
  their sd, to fit into 120 columns.

  Args:
    rows: see `accuracy`.
    published: rows to compare with, which the footnote is not about.
    num_models: see `accuracy`.

  Returns:
    The table and its footnote.
  """
  table = accuracy([*rows, *published], num_models=num_models)
  tests, _ = results.benchmarks(rows)
  lines = [['method', *(name for name, *_ in _columns(rows)), 'cost']]
  for title, *cells, cost in table.rows:
    texts = []
    for index, cell in enumerate(cells):
      mean, _, sd = cell.strip('*').partition(' ± ')
      mark = '*' if cell.startswith('*') else ''
      sd = f'±{sd}' if sd and index <= len(tests) else ''
      texts.append(mark + mean + sd)
    lines.append([textwrap.fill(title, 24), *texts, cost])
  heading, *body = _tabulate(lines, (), 'plain').splitlines()
  lines = [heading, '-' * len(heading), *body, '* best of its column.']
  return '\n'.join([*lines, footnote(rows)])


def footnote(rows: Sequence[evaluation.Row]) -> str:
  """Write the remarks below a table: seeds, columns, standard errors."""
  seeds = len({row.seed for row in rows})
  _, shifts = results.benchmarks(rows)
  errors: dict[str, list[str]] = {}
  names = itertools.chain(*(names for *_, names in _columns(rows)))
  for name in [x for x in dict.fromkeys(names) if '@' not in x]:
    of_name = [row for row in rows if row.benchmark == name]
    points = [
      100 * math.sqrt(row.accuracy * (1 - row.accuracy) / row.n)
      for row in of_name
    ]
    low, high = f'{min(points):.1f}', f'{max(points):.1f}'
    span = low if low == high else f'{low}-{high}'
    row = of_name[0]
    classes = f', {row.num_classes} classes' if row.num_classes else ''
    errors.setdefault(f'n = {row.n}{classes}', []).append(
      f'{results.benchmark_title(name)} {span}'
    )
  points = '; '.join(f'{", ".join(x)} ({n})' for n, x in errors.items())
  sd = f', ± sd over {seeds} seeds' if seeds > 1 else ''
  mean = (
    f'Mean shift: of {results.benchmark_titles(shifts)}. ' if shifts else ''
  )
  corrupted = ''
  if any('@' in row.benchmark for row in rows):
    corrupted = 'Corrupted: mean over corruptions of the same images. '
  text = (
    f'Accuracy in %{sd}. {mean}{corrupted}Cost: training runs. Sampling '
    f'standard error, in points: {points}.'
  )
  return textwrap.fill(text, 78, break_on_hyphens=False)


def by_epoch(merges: merges_lib.Merges) -> Table:
  """Return cosine and ratio of every merge, by kind of layer."""
  groups = merges_lib.by_kind(merges.layers)
  groups['all'] = np.ones(len(merges.layers), bool)
  lines = [
    [
      f'{epoch}',
      *(
        f'{merges.cosine[:, index, layers].mean():.3f} / '
        f'{merges.ratio[:, index, layers].mean():.3f}'
        for layers in groups.values()
      ),
    ]
    for index, epoch in enumerate(merges.epochs)
  ]
  header = ['Epoch', *(f'{name} ({of.sum()})' for name, of in groups.items())]
  caption = 'Cosine / ratio after an epoch, by kind of layer (their number)'
  return Table(caption, header, lines)


def by_layer(merges: merges_lib.Merges) -> Table:
  """Return a table of all layers at the last merge, along the depth."""
  values = zip(
    merges.layers,
    merges.cosine[:, -1].mean(0),
    merges.ratio[:, -1].mean(0),
    strict=True,
  )
  lines = [
    [f'`{layer.name}`', f'{cosine:.3f}', f'{ratio:.3f}']
    for layer, cosine, ratio in sorted(
      values, key=lambda value: (value[0].place, value[0].name)
    )
  ]
  caption = f'After epoch {merges.epochs[-1]}'
  return Table(caption, ['Layer', 'Cosine', 'Ratio'], lines)


def _tabulate(
  rows: Sequence[Sequence[str]], header: Sequence[str], style: str
) -> str:
  columns = ['left', *['right'] * (len(rows[0]) - 1)]
  return tabulate.tabulate(
    rows, header, style, colalign=columns, disable_numparse=True
  )


def _tests(rows: Sequence[evaluation.Row]) -> list[str]:
  """Return the benchmarks in distribution, each with the mean corrupted."""
  names = {row.benchmark for row in rows}
  tests = results.split(names)[0]
  pairs = [(name, name + results.MEAN) for name in tests]
  return [name for pair in pairs for name in pair if name in names]


def _columns(
  rows: Sequence[evaluation.Row],
) -> list[tuple[str, str, list[str]]]:
  """Return the name, the title and the benchmarks of each column."""
  tests, shifts = results.benchmarks(rows)
  excluded = {row.benchmark for row in rows}.difference(tests, shifts)
  others = [*shifts, *sorted(excluded, key=results.order)]
  title = results.benchmark_title
  return [
    *(
      (
        name,
        title(name) + ' (test)' * (name in results.IN_DISTRIBUTION),
        [name],
      )
      for name in _tests(rows)
    ),
    # Next to the tests, where a phone shows it.
    *([('mean shift', 'Mean shift', shifts)] if shifts else []),
    *((name, title(name), [name]) for name in others if '@' not in name),
  ]


def _column(rows: Sequence[evaluation.Row], names: Sequence[str]) -> list[str]:
  """Return the mean over benchmarks for each method, the best in bold."""
  cells = [
    mean_cell(results.per_seed(rows, method, names))
    for method in results.methods(rows)
  ]
  # Compared as shown: numbers that look the same are a tie.
  numbers = [-1.0 if cell == '-' else float(cell.split()[0]) for cell in cells]
  return [
    f'**{cell}**' if number == max(numbers) >= 0 else cell
    for cell, number in zip(cells, numbers, strict=True)
  ]


def _difference(
  rows: Sequence[evaluation.Row], method: str, other: str, names: Sequence[str]
) -> str:
  one = results.per_seed(rows, method, names)
  two = results.per_seed(rows, other, names)
  return mean_cell(
    {seed: one[seed] - two[seed] for seed in one if seed in two},
    '+z.1f',  # without a negative zero
  )
