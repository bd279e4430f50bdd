"""Tables of a comparison: for Markdown, for a terminal, for the report."""

from collections.abc import Sequence
import math
import textwrap
from typing import NamedTuple

import numpy as np
import tabulate

from modelstock_jax.report import results
from modelstock_jax.training import evaluation

# For a terminal: columns a blank apart, and a rule below the titles.
_ROW = tabulate.DataRow('', ' ', '')
_PLAIN = tabulate.TableFormat(
  lineabove=None,
  linebelowheader=tabulate.Line('', '-', '-', ''),
  linebetweenrows=None,
  linebelow=None,
  headerrow=_ROW,
  datarow=_ROW,
  padding=0,
  with_header_hide=None,
)


class ShownCell(NamedTuple):
  """A number of a table of the page.

  Attributes:
    text: the number.
    sd: its standard deviation, or ''.
    best: True if it is to stand out.
    share: 0..1, of the cell's width that a bar fills; None without one.
  """

  text: str
  sd: str = ''
  best: bool = False
  share: float | None = None


class Shown(NamedTuple):
  """A table of the page.

  Attributes:
    caption: shown above it.
    header: titles of the columns.
    rows: cells; the first of each row is its heading.
    kind: classes of templates/style.css: 'numbers', 'words' for columns of
      text.
  """

  caption: str
  header: Sequence[str]
  rows: Sequence[Sequence[str | ShownCell]]
  kind: str = 'numbers'


class Cell(NamedTuple):
  """A place of a table, in percent."""

  mean: float | None  # None: not measured
  sd: float | None
  best: bool

  def text(self, *, sd: bool = True) -> str:
    """Return the number, with its sd if that is asked for and known."""
    if self.mean is None:
      return '-'
    spread = f' ± {self.sd:.1f}' if sd and self.sd is not None else ''
    return f'{self.mean:.1f}{spread}'


class Line(NamedTuple):
  """A method in a table: a cell for each column, and training runs."""

  method: str
  cells: list[Cell]
  cost: str


class Table(NamedTuple):
  """A table before it is written.

  Attributes:
    tests: in-distribution benchmarks, the first columns.
    shifts: the columns that follow.
    excluded: `results.EXCLUDED_FROM_MEAN`, after them; then, if there are
      shifts, their mean.
    lines: one for each method.
  """

  tests: list[str]
  shifts: list[str]
  excluded: list[str]
  lines: list[Line]

  def header(self, *, short: bool = False) -> list[str]:
    """Return the titles of the columns; short ones for a terminal."""

    def named(names: Sequence[str]) -> list[str]:
      return [results.benchmark_title(name, short=short) for name in names]

    mean = 'mean shift' if short else 'Mean shift'
    return [
      'Method',
      *(name if short else f'{name} (test)' for name in named(self.tests)),
      *named([*self.shifts, *self.excluded]),
      *([mean] if self.shifts else []),
      'Cost',
    ]


def markdown_table(
  rows: Sequence[evaluation.Row],
  in_distribution: Sequence[str] | None = None,
  *,
  num_models: int = 2,
) -> str:
  """Write a Markdown table of accuracies in percent, mean +- sd over seeds.

  A line for each method; columns are the in-distribution benchmarks, the
  shifts, `results.EXCLUDED_FROM_MEAN`, the mean of the shifts and the cost. The
  sd of the mean shift is that of the seeds' means. The best of each column, as
  shown, are bold.

  Args:
    rows: of a comparison.
    in_distribution: names of benchmarks, see `results.benchmarks`.
    num_models: N, the number of training runs behind an average or a merge.

  Returns:
    The table and its footnote.

  Raises:
    ValueError: if a row is not valid or stands there twice, or there are none
      of a name of `in_distribution`.

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
  table = accuracy(rows, in_distribution, num_models=num_models)
  lines = []
  for method, cells, cost in table.lines:
    texts = [
      f'**{cell.text()}**' if cell.best else cell.text() for cell in cells
    ]
    lines.append([results.title(method), *texts, cost])
  return f'{markdown(table.header(), lines)}\n\n{footnote(rows, table)}'


def markdown(
  header: Sequence[str],
  lines: Sequence[Sequence[str]],
  text_columns: Sequence[int] = (0,),
) -> str:
  """Write a Markdown table, numbers to the right.

  Args:
    header: titles of the columns.
    lines: cells.
    text_columns: indices of the columns that are not of numbers.

  Returns:
    Markdown.

  >>> print(markdown(['Layer', 'Ratio'], [['head', '0.50']]))
  | Layer   |   Ratio |
  |:--------|--------:|
  | head    |    0.50 |
  """
  align = [
    'left' if index in text_columns else 'right' for index in range(len(header))
  ]
  return tabulate.tabulate(
    lines, header, 'pipe', colalign=align, disable_numparse=True
  )


def text_table(
  rows: Sequence[evaluation.Row],
  in_distribution: Sequence[str] | None = None,
  *,
  num_models: int = 2,
) -> str:
  """Write a table for a terminal: aligned, the best of each column marked '*'.

  Single shifts come without their sd, to fit into 120 columns.

  Args:
    rows: see `markdown_table`.
    in_distribution: see `markdown_table`.
    num_models: see `markdown_table`.

  Returns:
    The table and its footnote.

  Raises:
    ValueError: see `markdown_table`.
  """
  table = accuracy(rows, in_distribution, num_models=num_models)
  _, *titles, _ = table.header(short=True)
  # A number is followed by its mark or a blank, and so is a column's title.
  heading = ['Accuracy, %', *(f'{title} ' for title in titles), 'cost']
  lines: list[list[str] | str] = [heading, tabulate.SEPARATING_LINE]
  first = len(table.tests)
  single = range(first, first + len(table.shifts) + len(table.excluded))
  for method, cells, cost in table.lines:
    texts = [
      cell.text(sd=index not in single).replace(' ± ', '±')
      + ('*' if cell.best else ' ')
      for index, cell in enumerate(cells)
    ]
    lines.append([results.title(method), *texts, cost])
  body = tabulate.tabulate(
    lines,
    tablefmt=_PLAIN,
    colalign=['left', *['right'] * (len(titles) + 1)],
    disable_numparse=True,
    preserve_whitespace=True,
  )
  return f'{body}\n* best of its column.\n{footnote(rows, table)}'


def accuracy(
  rows: Sequence[evaluation.Row],
  in_distribution: Sequence[str] | None = None,
  *,
  num_models: int = 2,
) -> Table:
  """Return the cells of a table.

  Args:
    rows: see `markdown_table`.
    in_distribution: see `markdown_table`.
    num_models: see `markdown_table`.

  Returns:
    A `Table`.

  Raises:
    ValueError: see `markdown_table`.

  >>> table = accuracy([evaluation.Row('zero_shot', 'digits', 0, 0.9, 100)])
  >>> table.tests, table.lines[0].cells
  (['digits'], [Cell(mean=90.0, sd=None, best=True)])
  """
  tests, shifts = results.benchmarks(rows, in_distribution)
  excluded = sorted(
    {row.benchmark for row in rows}.difference(tests, shifts), key=results.order
  )
  columns = [[name] for name in tests + shifts + excluded]
  if shifts:
    columns.append(shifts)
  cells = [_column(rows, column) for column in columns]
  lines = []
  for index, method in enumerate(results.methods(rows)):
    known = results.find_method(method)
    cost = ''
    if known is not None:
      cost = str(num_models if known.cost is None else known.cost)
    lines.append(Line(method, [column[index] for column in cells], cost))
  return Table(tests, shifts, excluded, lines)


def shown(cell: Cell) -> ShownCell:
  """Return a cell as the page has it."""
  sd = '' if cell.sd is None else f'{cell.sd:.1f}'
  return ShownCell(cell.text(sd=False), sd, cell.best)


def _column(
  rows: Sequence[evaluation.Row], column: Sequence[str]
) -> list[Cell]:
  cells = []
  for method in results.methods(rows):
    values = [100 * x for x in results.per_seed(rows, method, column).values()]
    cells.append(
      Cell(float(np.mean(values)), results.deviation(values), False)
      if values
      else Cell(None, None, False)
    )
  # Compared as shown: numbers that look the same are a tie.
  shown = [-1 if x.mean is None else round(x.mean, 1) for x in cells]
  return [
    cell._replace(best=value == max(shown) >= 0)
    for cell, value in zip(cells, shown, strict=True)
  ]


def footnote(rows: Sequence[evaluation.Row], table: Table) -> str:
  """Write the remarks below a table: seeds, columns, standard errors."""
  seeds = len({row.seed for row in rows})
  errors: dict[str, list[str]] = {}
  for index, name in enumerate(table.tests + table.shifts + table.excluded):
    row = next(row for row in rows if row.benchmark == name)
    n = row.n
    points = []
    for _, cells, _ in table.lines:
      mean = cells[index].mean
      if mean is not None:
        p = mean / 100
        points.append(100 * math.sqrt(max(p * (1 - p), 0) / n))
    low, high = f'{min(points):.1f}', f'{max(points):.1f}'
    span = low if low == high else f'{low}-{high}'
    drawn = f'n = {n}'
    if row.num_classes is not None:
      drawn += f', {row.num_classes} classes'
    errors.setdefault(drawn, []).append(
      f'{results.benchmark_title(name)} {span}'
    )
  shifts = results.benchmark_titles(table.shifts)
  text = ' '.join(
    [
      'Accuracy in %' + (f', ± sd over {seeds} seeds.' if seeds > 1 else '.'),
      *([f'Mean shift: of {shifts}.'] if shifts else []),
      'Cost: training runs.',
      'One standard error (binomial) of drawing the examples, in points:',
      '; '.join(f'{", ".join(x)} ({d})' for d, x in errors.items()) + '.',
    ]
  )
  return textwrap.fill(text, 78, break_on_hyphens=False)
