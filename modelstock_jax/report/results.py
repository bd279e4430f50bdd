"""The rows of a comparison, their file, and the names of what they measure."""

import collections
from collections.abc import Sequence
import json
import re
from typing import Any
from typing import Literal
from typing import NamedTuple

import numpy as np
import pydantic

from modelstock_jax import data
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write as write_lib
from modelstock_jax.report import plots
from modelstock_jax.training import evaluation


class Method(NamedTuple):
  """A way to get one model from the models of a run.

  Attributes:
    title: in reports.
    cost: training runs it takes; 'N' is one for each model of the run, None is
      not known.
    color: in figures; None takes the next of Matplotlib's cycle.
  """

  title: str
  cost: int | Literal['N'] | None = None
  color: str | None = None


# In the order in which they are shown.
METHODS = {
  'zero_shot': Method('Zero-shot', 0, plots.GREY),
  'fine_tuned': Method('Fine-tuned', 1, plots.BLACK),
  'uniform_soup': Method('Uniform average', 'N', plots.ORANGE),
  'wise_ft_0.5': Method('WiSE-FT 0.5', 1, plots.PURPLE),
  'model_stock_end': Method('Model Stock (end)', 'N', plots.BLUE),
  'model_stock_epoch': Method('Model Stock (epoch)', 'N', plots.GREEN),
}

_PERIODIC = re.compile(r'model_stock_(\d+)')
_ROWS = pydantic.TypeAdapter(list[evaluation.Row])

# The built-in in-distribution benchmarks; the other ones are shifts of them.
IN_DISTRIBUTION = ('digits', 'imagenet')

# Neither: other labels or variants, which have no part in the mean of shifts.
EXCLUDED_FROM_MEAN = tuple(
  name
  for name, spec in data.BENCHMARKS.items()
  if name not in IN_DISTRIBUTION and not spec.shift_of
)


def benchmark_title(name: str) -> str:
  """Return the name of a benchmark in words.

  >>> benchmark_title('rotate_cw')
  'rotated clockwise'
  """
  known = data.BENCHMARKS.get(name)
  return known.title or name if known else name


def benchmark_titles(names: Sequence[str]) -> str:
  """Return the names of benchmarks in words, with commas between."""
  return ', '.join(map(benchmark_title, names))


def save(rows: Sequence[evaluation.Row], path: text_lib.PathLike) -> None:
  """Write rows as a JSON list of dicts, whole or not at all.

  Args:
    rows: at least one.
    path: of the file; one that exists is replaced.

  Raises:
    ValueError: a row is not valid or stands there twice, or there is none.
  """
  _check(rows)
  text = ',\n'.join('  ' + json.dumps(row._asdict()) for row in rows)
  write_lib.write_text(path, f'[\n{text}\n]\n')


def load(path: text_lib.PathLike) -> list[evaluation.Row]:
  """Read the rows of a file that `save` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it does not hold rows; the message names the first wrong one.

  >>> import tempfile
  >>> row = evaluation.Row('zero_shot', 'digits', 0, 0.5, 10)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save([row], f'{folder}/r.json')
  ...   load(f'{folder}/r.json') == [row]
  True
  """
  with text_lib.explained(
    f'{path} does not hold results: ', '. Run the comparison again.'
  ):
    return _check(text_lib.read_json(path))


def _check(rows: Any) -> list[evaluation.Row]:
  """Return the rows if all are valid; raise for the first that is not."""
  try:
    rows = _ROWS.validate_python(rows, strict=True)
  except pydantic.ValidationError as error:
    problem = error.errors()[0]
    place = ', '.join(['rows', *map(str, problem['loc'])])
    raise ValueError(
      f'{place}: {problem["msg"]}, got {text_lib.shown(problem["input"])}'
    ) from error
  if not rows:
    raise ValueError('there are no rows')
  sizes: dict[str, tuple[int, int | None]] = {}
  for row in rows:
    size = sizes.setdefault(row.benchmark, row[4:])
    if row[4:] != size:
      raise ValueError(
        f'{text_lib.shown(row)} differs from other rows of the benchmark in n, '
        f'num_classes: {size}'
      )
  counts = collections.Counter(row[:3] for row in rows)
  if twice := [key for key, count in counts.items() if count > 1]:
    raise ValueError(
      f'the row of {text_lib.shown(twice[0])} stands there twice'
    )
  return rows


def methods(rows: Sequence[evaluation.Row]) -> list[str]:
  """Return the names of the methods: known ones in order, then others."""
  names = dict.fromkeys(row.method for row in rows)
  return sorted(names, key=lambda name: [*METHODS, name].index(name))


def benchmarks(rows: Sequence[evaluation.Row]) -> tuple[list[str], list[str]]:
  """Split benchmarks into those in distribution and the shifts.

  Args:
    rows: of a comparison.

  Returns:
    Names of the benchmarks of `IN_DISTRIBUTION`, and of the shifts: all others
    but `EXCLUDED_FROM_MEAN`, those that are known in the order of the paper.

  >>> row = evaluation.Row('zero_shot', 'digits', 0, 0.5, 10)
  >>> benchmarks([row, row._replace(benchmark='noise')])
  (['digits'], ['noise'])
  """
  names = dict.fromkeys(row.benchmark for row in rows)
  tests = [name for name in IN_DISTRIBUTION if name in names]
  others = (*tests, *EXCLUDED_FROM_MEAN)
  return tests, sorted([x for x in names if x not in others], key=order)


def per_seed(
  rows: Sequence[evaluation.Row], method: str, benchmarks: Sequence[str]
) -> dict[int, float]:
  """Return a method's mean accuracy over benchmarks, for each seed.

  Args:
    rows: of a comparison.
    method: name.
    benchmarks: names.

  Returns:
    Accuracy (0..1) by seed; seeds that lack one of the benchmarks are left
    out.

  >>> row = evaluation.Row('zero_shot', 'noise', 0, 0.5, 10)
  >>> other = row._replace(benchmark='blur', accuracy=0.25)
  >>> per_seed([row, other], 'zero_shot', ['noise', 'blur'])
  {0: 0.375}
  """
  accuracies: dict[int, list[float]] = {}
  for row in rows:
    if row.method == method and row.benchmark in benchmarks:
      accuracies.setdefault(row.seed, []).append(row.accuracy)
  return {
    seed: float(np.mean(values))
    for seed, values in accuracies.items()
    if len(values) == len(benchmarks)
  }


def find_method(name: str) -> Method:
  """Return title and cost of a method; of one that is unknown its name.

  >>> find_method('model_stock_5').title
  'Model Stock (every 5 epochs)'
  """
  if match := _PERIODIC.fullmatch(name):
    return Method(f'Model Stock (every {match[1]} epochs)', 'N')
  return METHODS.get(name, Method(name))


def merged_when(mode: str) -> str:
  """Describe when the runs of a mode merged.

  >>> merged_when('5')
  'after every 5 epochs'
  """
  if mode == 'end':
    return 'once, at the end'
  if mode in ('epoch', '1'):
    return 'after every epoch'
  return f'after every {mode} epochs'


def order(name: str) -> int:
  """Return the place of a benchmark: as in `data.BENCHMARKS`, or the last."""
  return [*data.BENCHMARKS, name].index(name)
