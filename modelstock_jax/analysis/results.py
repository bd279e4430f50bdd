"""The rows of a comparison: in a file, and as tables."""

from collections.abc import Sequence
import json
import math
import os
import pathlib
import re
import textwrap
from typing import NamedTuple

import numpy as np

from modelstock_jax import data

PathLike = str | os.PathLike[str]


class Row(NamedTuple):
  """One measurement: a method's accuracy on a benchmark, for one seed."""

  method: str
  benchmark: str
  seed: int
  accuracy: float  # 0..1
  n: int  # examples
  num_classes: int | None = None  # to choose from, where it is known


class Cell(NamedTuple):
  """What a table says in one place, in percent."""

  mean: float | None  # None: not measured
  sd: float | None
  best: bool

  def text(self, *, sd: bool = True) -> str:
    """The number, with its sd if that is asked for and known."""
    if self.mean is None:
      return '-'
    spread = f' ± {self.sd:.1f}' if sd and self.sd is not None else ''
    return f'{self.mean:.1f}{spread}'


class Line(NamedTuple):
  """A method in a table: a cell for each column, and training runs."""

  method: str
  cells: list[Cell]
  cost: str


class Grid(NamedTuple):
  """A table before it is written.

  Attributes:
    tests: in-distribution benchmarks, the first columns.
    shifts: the columns that follow.
    aside: those of `ASIDE`, after them; then, if there are shifts, their mean.
    lines: one for each method.
  """

  tests: list[str]
  shifts: list[str]
  aside: list[str]
  lines: list[Line]


class Method(NamedTuple):
  """How a method is shown.

  Attributes:
    title: in reports.
    cost: training runs it takes; None is one for each model of the stack.
    description: of what it is.
  """

  title: str
  cost: int | None
  description: str


# In the order in which they are shown.
METHODS = {
  'zero_shot': Method('Zero-shot', 0, 'the anchor, before any fine-tuning'),
  'fine_tuned': Method('Fine-tuned', 1, 'the first of the models alone'),
  'uniform_soup': Method(
    'Uniform average', None, 'the plain average of the models'
  ),
  'wise_ft_0.5': Method(
    'WiSE-FT 0.5', 1, 'half way from the anchor to the first model'
  ),
  'model_stock_end': Method(
    'Model Stock (end)', None, 'the models merged once, after the last epoch'
  ),
  'model_stock_epoch': Method(
    'Model Stock (epoch)',
    None,
    'the models merged after every epoch, each going on from the merge',
  ),
}

_PERIODIC = re.compile(r'model_stock_(\d+)')

# The built-in in-distribution benchmarks; the other ones are shifts of them.
IN_DISTRIBUTION = ('digits', 'imagenet')

# Neither: other labels or variants, which have no part in the mean of shifts.
ASIDE = tuple(
  name
  for name in data.BENCHMARKS
  if name not in (*data.SHIFTS, *data.IMAGENET_SHIFTS, *IN_DISTRIBUTION)
)

# Column titles of the terminal's table, where the name is too long.
_SHORT = {
  'imagenet': 'IN',
  'imagenet_real': 'ReaL',
  'imagenet_v2': 'V2',
  'imagenet_r': 'R',
  'imagenet_sketch': 'Sketch',
  'objectnet': 'ObjNet',
  'imagenet_a': 'A',
  'imagenet_v2_threshold': 'V2 thr.',
  'imagenet_v2_top': 'V2 top',
  'imagenet_c': 'C',
  'objectnet_uncropped': 'ObjNet uncr.',
  'rotate_ccw': 'rot ccw',
  'rotate_cw': 'rot cw',
  'contrast': 'contr.',
  'occlusion': 'occl.',
}


def save(rows: Sequence[Row], path: PathLike) -> None:
  """Writes rows as a JSON list of dicts, whole or not at all.

  Args:
    rows: at least one.
    path: of the file; one that exists is replaced.

  Raises:
    ValueError: if a row is not valid, or stands there twice.
  """
  _check(rows)
  path = pathlib.Path(path)
  text = ',\n'.join('  ' + json.dumps(row._asdict()) for row in rows)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(f'[\n{text}\n]\n', encoding='utf-8')
  os.replace(temporary, path)


def load(path: PathLike) -> list[Row]:
  """Reads what `save` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it does not hold rows; says which one is wrong, and how.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save([Row('zero_shot', 'digits', 0, 0.5, 10)], f'{folder}/r.json')
  ...   load(f'{folder}/r.json')[0].accuracy
  0.5
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: there is no such file. It is written at the end of a '
      'comparison; has it run to the end?'
    )
  try:
    entries = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(entries, list):
      raise ValueError(f'it holds a {type(entries).__name__}, not a list')
    for index, entry in enumerate(entries):
      if not isinstance(entry, dict) or entry.keys() != set(Row._fields):
        raise ValueError(
          f'entry {index} is {entry!r}, not a dict of {", ".join(Row._fields)}'
        )
    rows = [Row(**entry) for entry in entries]
    _check(rows)
  except ValueError as error:  # JSON's own errors are ValueErrors
    raise ValueError(
      f'{path} does not hold results: {error}. Run the comparison again.'
    ) from error
  return rows


def methods(rows: Sequence[Row]) -> list[str]:
  """Names of the methods: the known in order, then others as they come."""
  found = dict.fromkeys(row.method for row in rows)
  return [m for m in METHODS if m in found] + [
    m for m in found if m not in METHODS
  ]


def benchmarks(
  rows: Sequence[Row], in_distribution: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
  """Tells the in-distribution benchmarks from the shifts.

  Args:
    rows: of a comparison.
    in_distribution: names; None is those of `IN_DISTRIBUTION` that are there.

  Returns:
    Names of the in-distribution benchmarks, and of the shifts: all others but
    `ASIDE`, those that are known in the order of the paper.

  Raises:
    ValueError: if a name of `in_distribution` has no rows.

  >>> row = Row('zero_shot', 'digits', 0, 0.5, 10)
  >>> benchmarks([row, row._replace(benchmark='noise')])
  (['digits'], ['noise'])
  """
  _check(rows)
  found = dict.fromkeys(row.benchmark for row in rows)
  if in_distribution is None:
    in_distribution = [name for name in IN_DISTRIBUTION if name in found]
  for name in in_distribution:
    if name not in found:
      raise ValueError(
        f'in_distribution: no rows of {name!r}; there are {", ".join(found)}.'
      )
  shifts = [name for name in found if name not in (*in_distribution, *ASIDE)]
  return list(in_distribution), sorted(shifts, key=_place)


def per_seed(
  rows: Sequence[Row], method: str, benchmarks: Sequence[str]
) -> dict[int, float]:
  """A method's mean accuracy over benchmarks, for each seed.

  Args:
    rows: of a comparison.
    method: name.
    benchmarks: names.

  Returns:
    Accuracy (0..1) by seed; seeds that lack one of the benchmarks are left
    out.

  >>> row = Row('zero_shot', 'noise', 0, 0.5, 10)
  >>> other = row._replace(benchmark='blur', accuracy=0.25)
  >>> per_seed([row, other], 'zero_shot', ['noise', 'blur'])
  {0: 0.375}
  """
  found: dict[int, list[float]] = {}
  for row in rows:
    if row.method == method and row.benchmark in benchmarks:
      found.setdefault(row.seed, []).append(row.accuracy)
  return {
    seed: float(np.mean(values))
    for seed, values in found.items()
    if len(values) == len(benchmarks)
  }


def deviation(values: Sequence[float]) -> float | None:
  """The sample standard deviation (ddof = 1); None of a single value."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else None


def find_method(method: str) -> Method | None:
  """How a method is shown; None if it is not a known one.

  >>> find_method('model_stock_5').title
  'Model Stock (every 5 epochs)'
  """
  if method in METHODS:
    return METHODS[method]
  match = _PERIODIC.fullmatch(method)
  if match is None:
    return None
  every = 'every epoch' if match[1] == '1' else f'every {match[1]} epochs'
  return Method(
    f'Model Stock ({every})',
    None,
    f'the models merged {every}, each going on from the merge',
  )


def title(method: str) -> str:
  """A method's title; its name if it is not a known one."""
  found = find_method(method)
  return method if found is None else found.title


def table(
  rows: Sequence[Row],
  in_distribution: Sequence[str] | None = None,
  *,
  num_models: int = 2,
) -> str:
  """A Markdown table of accuracies in percent, mean +- sd over seeds.

  A line for each method; columns are the in-distribution benchmarks, the
  shifts, those of `ASIDE`, the mean of the shifts and the cost. The sd of the
  mean shift is that of the seeds' means. The best of each column, as shown, are
  bold.

  Args:
    rows: of a comparison.
    in_distribution: names of benchmarks; None is those of `IN_DISTRIBUTION`
      that are there. All others but `ASIDE` are shifts.
    num_models: N, the number of training runs behind an average or a merge.

  Returns:
    The table and its footnote.

  Raises:
    ValueError: if a row is not valid or stands there twice, or there are none
      of a name of `in_distribution`.

  >>> row = Row('zero_shot', 'digits', 0, 0.9, 100, 10)
  >>> print(table([row, row._replace(method='fine_tuned', accuracy=0.8)]))
  | Method | digits (test) | Cost |
  |:--|--:|--:|
  | Zero-shot | **90.0** | 0 |
  | Fine-tuned | 80.0 | 1 |
  <BLANKLINE>
  Accuracy in %. Cost: training runs. One standard error (binomial) of drawing
  the examples, in points: digits 3.0-4.0 (n = 100, 10 classes).
  """
  grid = tabulate(rows, in_distribution, num_models=num_models)
  header = [
    'Method',
    *(f'{name} (test)' for name in grid.tests),
    *grid.shifts,
    *grid.aside,
    *(['Mean shift'] if grid.shifts else []),
    'Cost',
  ]
  lines = [header]
  for method, cells, cost in grid.lines:
    texts = [
      f'**{cell.text()}**' if cell.best else cell.text() for cell in cells
    ]
    lines.append([title(method), *texts, cost])
  body = [f'| {" | ".join(line)} |' for line in lines]
  body.insert(1, '|:--|' + '--:|' * (len(header) - 1))
  return '\n'.join(body) + f'\n\n{footnote(rows, grid)}'


def text_table(
  rows: Sequence[Row],
  in_distribution: Sequence[str] | None = None,
  *,
  num_models: int = 2,
) -> str:
  """`table` for a terminal: aligned, the best of each column marked '*'.

  Single shifts come without their sd, to fit into 120 columns.

  Args:
    rows: see `table`.
    in_distribution: see `table`.
    num_models: see `table`.

  Returns:
    The table and its footnote.

  Raises:
    ValueError: see `table`.
  """
  grid = tabulate(rows, in_distribution, num_models=num_models)
  names = [
    *(_SHORT.get(name, name) for name in grid.tests + grid.shifts + grid.aside),
    *(['mean shift'] if grid.shifts else []),
  ]
  # A number is followed by its mark or a blank, and so is a column's title.
  lines = [['Accuracy, %', *(f'{name} ' for name in names), 'cost']]
  first = len(grid.tests)
  single = range(first, first + len(grid.shifts) + len(grid.aside))
  for method, cells, cost in grid.lines:
    texts = [
      cell.text(sd=index not in single).replace(' ± ', '±')
      + ('*' if cell.best else ' ')
      for index, cell in enumerate(cells)
    ]
    lines.append([title(method), *texts, cost])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  body = [
    ' '.join(
      cell.rjust(width) if index else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
  body.insert(1, '-' * max(map(len, body)))
  return '\n'.join(body) + f'\n* best of its column.\n{footnote(rows, grid)}'


def tabulate(
  rows: Sequence[Row],
  in_distribution: Sequence[str] | None = None,
  *,
  num_models: int = 2,
) -> Grid:
  """What `table` and other tables show.

  Args:
    rows: see `table`.
    in_distribution: see `table`.
    num_models: see `table`.

  Returns:
    A `Grid`.

  Raises:
    ValueError: see `table`.

  >>> grid = tabulate([Row('zero_shot', 'digits', 0, 0.9, 100)])
  >>> grid.tests, grid.lines[0].cells
  (['digits'], [Cell(mean=90.0, sd=None, best=True)])
  """
  tests, shifts = benchmarks(rows, in_distribution)
  found = dict.fromkeys(row.benchmark for row in rows)
  aside = sorted((x for x in found if x not in tests + shifts), key=_place)
  columns = [[name] for name in tests + shifts + aside]
  if shifts:
    columns.append(shifts)
  cells = [_column(rows, column) for column in columns]
  lines = []
  for index, method in enumerate(methods(rows)):
    known = find_method(method)
    cost = ''
    if known is not None:
      cost = str(num_models if known.cost is None else known.cost)
    lines.append(Line(method, [column[index] for column in cells], cost))
  return Grid(tests, shifts, aside, lines)


def _column(rows: Sequence[Row], column: Sequence[str]) -> list[Cell]:
  cells = []
  for method in methods(rows):
    values = [100 * x for x in per_seed(rows, method, column).values()]
    cells.append(
      Cell(float(np.mean(values)), deviation(values), False)
      if values
      else Cell(None, None, False)
    )
  # Compared as shown: numbers that look the same are a tie.
  shown = [-1 if x.mean is None else round(x.mean, 1) for x in cells]
  return [
    cell._replace(best=value == max(shown) >= 0)
    for cell, value in zip(cells, shown, strict=True)
  ]


def _place(name: str) -> int:
  """Orders benchmarks as `data.BENCHMARKS`, others after them as they come."""
  known = list(data.BENCHMARKS)
  return known.index(name) if name in known else len(known)


def footnote(rows: Sequence[Row], grid: Grid) -> str:
  """What must be known to read a table: seeds, columns, standard errors."""
  seeds = len({row.seed for row in rows})
  errors: dict[str, list[str]] = {}
  for index, name in enumerate(grid.tests + grid.shifts + grid.aside):
    row = next(row for row in rows if row.benchmark == name)
    n = row.n
    points = []
    for _, cells, _ in grid.lines:
      mean = cells[index].mean
      if mean is not None:
        p = mean / 100
        points.append(100 * math.sqrt(max(p * (1 - p), 0) / n))
    low, high = f'{min(points):.1f}', f'{max(points):.1f}'
    span = low if low == high else f'{low}-{high}'
    drawn = f'n = {n}'
    if row.num_classes is not None:
      drawn += f', {row.num_classes} classes'
    errors.setdefault(drawn, []).append(f'{name} {span}')
  text = ' '.join(
    [
      'Accuracy in %' + (f', ± sd over {seeds} seeds.' if seeds > 1 else '.'),
      *([f'Mean shift: of {", ".join(grid.shifts)}.'] if grid.shifts else []),
      'Cost: training runs.',
      'One standard error (binomial) of drawing the examples, in points:',
      '; '.join(f'{", ".join(x)} ({d})' for d, x in errors.items()) + '.',
    ]
  )
  return textwrap.fill(text, 78, break_on_hyphens=False)


def _check(rows: Sequence[Row]) -> None:
  """Raises a ValueError that names the first row that is wrong."""
  if not rows:
    raise ValueError('there are no rows')
  seen = set()
  firsts: dict[str, Row] = {}
  for row in rows:
    problem = _problem(row)
    if not problem and row[:3] in seen:
      problem = 'stands there twice'
    seen.add(row[:3])
    first = firsts.setdefault(row.benchmark, row)
    for field in ('n', 'num_classes'):
      ours, theirs = getattr(row, field), getattr(first, field)
      if not problem and ours != theirs:
        others = f'other rows of the benchmark {field} = {theirs}'
        problem = f'has {field} = {ours}, {others}'
    if problem:
      raise ValueError(f'{row} {problem}')


def _problem(row: Row) -> str:
  """What is wrong with a row, or ''."""
  if not (isinstance(row.method, str) and isinstance(row.benchmark, str)):
    return 'has a method or benchmark that is not a string'
  # bool is an int in Python.
  if type(row.seed) is not int or type(row.n) is not int or row.n < 1:
    return 'needs a whole seed and n >= 1'
  classes = row.num_classes
  if classes is not None and (type(classes) is not int or classes < 1):
    return 'has a num_classes that is neither None nor a whole number >= 1'
  if type(row.accuracy) not in (int, float) or not 0 <= row.accuracy <= 1:
    return 'has an accuracy that is not a number in 0..1'
  return ''
