"""Tables of a comparison: for Markdown, for a terminal, for the report."""

from collections.abc import Sequence
import math
import textwrap
from typing import Any
from typing import NamedTuple

import numpy as np
import tabulate

from modelstock_jax.report import results
from modelstock_jax.training import evaluation

# For a terminal: columns a blank apart, and a rule below the titles.
_ROW = tabulate.DataRow('', ' ', '')
_PLAIN = tabulate.TableFormat(
  *(None, tabulate.Line('', '-', '-', ''), None, None), _ROW, _ROW, 0, None
)


class Cell(NamedTuple):
  """A number of a table, as it is shown.

  Attributes:
    text: the number; '-' if it was not measured.
    sd: its standard deviation, or ''.
    best: True if it is to stand out.
    share: 0..1, of the cell's width that a bar fills; None without one.
  """

  text: str
  sd: str = ''
  best: bool = False
  share: float | None = None

  def __str__(self) -> str:
    """Return the number, with its sd if there is one."""
    return f'{self.text} ± {self.sd}' if self.sd else self.text


class Table(NamedTuple):
  """A table before it is written.

  Attributes:
    caption: shown above it on the page.
    header: titles of the columns.
    rows: `str` or `Cell`; the first of each row is its heading.
    kind: classes of templates/style.css: 'numbers', 'words' for columns of
      text.
  """

  caption: str
  header: Sequence[str]
  rows: Sequence[Sequence[Any]]
  kind: str = 'numbers'


def accuracy(
  rows: Sequence[evaluation.Row],
  *,
  num_models: int = 2,
  short: bool = False,
  mean_first: bool = False,
) -> Table:
  """Return the table of accuracies in percent, mean and sd over seeds.

  A row for each method; columns are the in-distribution benchmarks, the
  shifts, `results.EXCLUDED_FROM_MEAN`, the mean of the shifts and the cost. The
  sd of the mean shift is that of the seeds' means. The best of each column, as
  shown, stand out.

  Args:
    rows: of a comparison.
    num_models: N, the number of training runs behind an average or a merge.
    short: True for the short names of benchmarks, for a terminal.
    mean_first: True for the mean of the shifts in front of them, where a phone
      shows it.

  Returns:
    The table.

  Raises:
    ValueError: if a row is not valid or stands there twice.

  >>> table = accuracy([evaluation.Row('zero_shot', 'digits', 0, 0.9, 100)])
  >>> table.header, str(table.rows[0][1])
  (['Method', 'digits (test)', 'Cost'], '90.0')
  """
  tests, shifts = results.benchmarks(rows)
  header, columns = ['Method'], []
  for name in _columns(rows):
    title = results.benchmark_title(name, short=short)
    header.append(f'{title} (test)' if name in tests and not short else title)
    columns.append(_column(rows, [name]))
  if shifts:
    place = len(tests) if mean_first else len(columns)
    header.insert(1 + place, 'mean shift' if short else 'Mean shift')
    columns.insert(place, _column(rows, shifts))
  lines = []
  for method, *cells in zip(results.methods(rows), *columns, strict=True):
    known = results.find_method(method)
    cost = ''
    if known is not None:
      cost = str(num_models if known.cost is None else known.cost)
    lines.append([results.title(method), *cells, cost])
  caption = 'Accuracy in %, the best of each column in bold'
  return Table(caption, [*header, 'Cost'], lines)


def mean_cell(values: Sequence[float], digits: int) -> Cell:
  """Return the mean over seeds and, of several, the sample sd (ddof = 1).

  >>> str(mean_cell([1.0, 2.0], 2))
  '1.50 ± 0.71'
  """
  sd = f'{np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
  return Cell(f'{np.mean(values):.{digits}f}', sd)


def markdown_table(
  rows: Sequence[evaluation.Row], *, num_models: int = 2
) -> str:
  """Write the table of `accuracy` as Markdown, the best in bold.

  Args:
    rows: see `accuracy`.
    num_models: see `accuracy`.

  Returns:
    The table and its footnote.

  Raises:
    ValueError: see `accuracy`.

  >>> row = evaluation.Row('zero_shot', 'digits', 0, 0.9, 100, 10)
  >>> other = row._replace(method='fine_tuned', accuracy=0.8)
  >>> print(markdown_table([row, other]))
  | Method     |   digits (test) |   Cost |
  |:-----------|----------------:|-------:|
  | Zero-shot  |        **90.0** |      0 |
  | Fine-tuned |            80.0 |      1 |
  <BLANKLINE>
  Accuracy in %. Cost: training runs. One standard error (binomial) of drawing
  the examples, in points: digits 3.0-4.0 (n = 100, 10 classes).
  """
  table = accuracy(rows, num_models=num_models)
  return f'{markdown(table.header, table.rows)}\n\n{footnote(rows)}'


def markdown(
  header: Sequence[str],
  rows: Sequence[Sequence[str | Cell]],
  text_columns: Sequence[int] = (0,),
) -> str:
  """Write a Markdown table, numbers to the right.

  Args:
    header: titles of the columns.
    rows: cells.
    text_columns: indices of the columns that are not of numbers.

  Returns:
    Markdown.

  >>> print(markdown(['Layer', 'Ratio'], [['head', '0.50']]))
  | Layer   |   Ratio |
  |:--------|--------:|
  | head    |    0.50 |
  """

  def written(cell: str | Cell) -> str:
    return f'**{cell}**' if isinstance(cell, Cell) and cell.best else str(cell)

  return tabulate.tabulate(
    [list(map(written, row)) for row in rows],
    header,
    'pipe',
    colalign=[
      'left' if index in text_columns else 'right'
      for index in range(len(header))
    ],
    disable_numparse=True,
  )


def text_table(rows: Sequence[evaluation.Row], *, num_models: int = 2) -> str:
  """Write a table for a terminal: aligned, the best of each column marked '*'.

  Single shifts come without their sd, to fit into 120 columns.

  Args:
    rows: see `accuracy`.
    num_models: see `accuracy`.

  Returns:
    The table and its footnote.

  Raises:
    ValueError: see `accuracy`.
  """
  table = accuracy(rows, num_models=num_models, short=True)
  titles = table.header[1:-1]
  tests, shifts = results.benchmarks(rows)
  single = range(len(tests), len(titles) - bool(shifts))
  # A number is followed by its mark or a blank, and so is a column's title.
  heading = ['Accuracy, %', *(f'{title} ' for title in titles), 'cost']
  lines: list[list[str] | str] = [heading, tabulate.SEPARATING_LINE]
  for title, *cells, cost in table.rows:
    texts = []
    for index, cell in enumerate(cells):
      text = cell.text if index in single else str(cell).replace(' ± ', '±')
      texts.append(text + ('*' if cell.best else ' '))
    lines.append([title, *texts, cost])
  body = tabulate.tabulate(
    lines,
    tablefmt=_PLAIN,
    colalign=['left', *['right'] * (len(titles) + 1)],
    disable_numparse=True,
    preserve_whitespace=True,
  )
  return f'{body}\n* best of its column.\n{footnote(rows)}'


def footnote(rows: Sequence[evaluation.Row]) -> str:
  """Write the remarks below a table: seeds, columns, standard errors."""
  seeds = len({row.seed for row in rows})
  _, shifts = results.benchmarks(rows)
  errors: dict[str, list[str]] = {}
  for name in _columns(rows):
    row = next(row for row in rows if row.benchmark == name)
    shares = [
      float(np.mean(list(values.values())))
      for method in results.methods(rows)
      if (values := results.per_seed(rows, method, [name]))
    ]
    points = [100 * math.sqrt(p * (1 - p) / row.n) for p in shares]
    low, high = f'{min(points):.1f}', f'{max(points):.1f}'
    span = low if low == high else f'{low}-{high}'
    classes = f', {row.num_classes} classes' if row.num_classes else ''
    errors.setdefault(f'n = {row.n}{classes}', []).append(
      f'{results.benchmark_title(name)} {span}'
    )
  text = ' '.join(
    [
      'Accuracy in %' + (f', ± sd over {seeds} seeds.' if seeds > 1 else '.'),
      *([f'Mean shift: of {results.benchmark_titles(shifts)}.'] * bool(shifts)),
      'Cost: training runs.',
      'One standard error (binomial) of drawing the examples, in points:',
      '; '.join(f'{", ".join(x)} ({d})' for d, x in errors.items()) + '.',
    ]
  )
  return textwrap.fill(text, 78, break_on_hyphens=False)


def _columns(rows: Sequence[evaluation.Row]) -> list[str]:
  """Return the benchmarks in the order of their columns."""
  tests, shifts = results.benchmarks(rows)
  excluded = {row.benchmark for row in rows}.difference(tests, shifts)
  return [*tests, *shifts, *sorted(excluded, key=results.order)]


def _column(rows: Sequence[evaluation.Row], names: Sequence[str]) -> list[Cell]:
  """Return the mean over benchmarks for each method, the best marked."""
  cells = []
  for method in results.methods(rows):
    values = [100 * x for x in results.per_seed(rows, method, names).values()]
    cells.append(mean_cell(values, 1) if values else Cell('-'))
  # Compared as shown: numbers that look the same are a tie.
  numbers = [-1.0 if cell.text == '-' else float(cell.text) for cell in cells]
  return [
    cell._replace(best=number == max(numbers) >= 0)
    for cell, number in zip(cells, numbers, strict=True)
  ]
