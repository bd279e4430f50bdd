"""The rows of a comparison, their file, and the names of what they measure."""

import collections
from collections.abc import Collection
from collections.abc import Iterable
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
  'model_stock_epoch_reset': Method(
    'Model Stock (epoch, moments reset)', 'N', plots.RED
  ),
}

# Titles of the anchor by its head; files always have 'zero_shot'.
ANCHORS = {'zero_shot': 'Zero-shot', 'linear_probe': 'Linear probe'}

_PERIODIC = re.compile(r'model_stock_((\d+|epoch)(_reset|_average)?)')
# The second model and so on; and models that continued from an earlier merge.
_OF_RUN = re.compile(
  r'(fine_tuned|uniform_soup|wise_ft_0\.5)(_\d+)?(_restarted)?'
)
_ROWS = pydantic.TypeAdapter(list[evaluation.Row])

# The built-in in-distribution benchmarks; the other built-in ones are shifts of
# them. In distribution are also the validation split of a run, and 'SET/SPLIT'.
IN_DISTRIBUTION = ('digits', 'imagenet')
VALIDATION = 'validation'
# The mean over the corruptions of a benchmark, 'NAME@KIND', is 'NAME@mean'.
MEAN = '@mean'


def benchmark_title(name: str) -> str:
  """Return the name of a benchmark in words.

  >>> benchmark_title('rotate_cw')
  'rotated clockwise'
  >>> benchmark_title('pictures/test@gaussian_blur')
  'pictures/test, gaussian blur'
  """
  name, _, corruption = name.partition('@')
  known = data.BENCHMARKS.get(name)
  title = known.title or name if known else name
  kind = 'corrupted' if corruption == 'mean' else corruption.replace('_', ' ')
  return f'{title}, {kind}' if kind else title


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
  return sort_methods([row.method for row in rows])


def sort_methods(names: Iterable[str]) -> list[str]:
  """Sort names of methods as they are shown; those unknown keep their order.

  >>> sort_methods(['mine', 'model_stock_end', 'fine_tuned_2', 'fine_tuned'])
  ['fine_tuned_2', 'fine_tuned', 'model_stock_end', 'mine']
  """

  def place(name: str) -> int:
    match = _OF_RUN.fullmatch(name)
    known = match[1] if match else 'zero_shot' if name in ANCHORS else name
    return [*METHODS, known].index(known)

  return sorted(dict.fromkeys(names), key=place)


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
  """Return each Model Stock with each of the methods before it.

  >>> pairs(['fine_tuned', 'zero_shot', 'model_stock_5'])
  [('model_stock_5', 'zero_shot'), ('model_stock_5', 'fine_tuned')]
  """
  names = sort_methods(names)
  return [
    (method, other)
    for index, method in enumerate(names)
    if method.startswith('model_stock_')
    for other in names[:index]
  ]


def benchmarks(rows: Sequence[evaluation.Row]) -> tuple[list[str], list[str]]:
  """Split the benchmarks of rows, see `split`.

  >>> row = evaluation.Row('zero_shot', 'digits', 0, 0.5, 10)
  >>> benchmarks([row, row._replace(benchmark='noise')])
  (['digits'], ['noise'])
  """
  return split({row.benchmark for row in rows})


def split(names: Collection[str]) -> tuple[list[str], list[str]]:
  """Split benchmarks into those in distribution and the shifts.

  Args:
    names: of the benchmarks.

  Returns:
    Names of the benchmarks in distribution, and of the shifts of which a
    mean is taken, those that are known in the order of the paper. Other labels
    (ImageNet-ReaL), variants and corruptions are in neither.

  >>> split(['objectnet', 'objectnet_uncropped', 'imagenet'])
  (['imagenet'], ['objectnet_uncropped'])
  >>> split(['pictures/test', 'validation', 'validation@contrast'])
  (['validation', 'pictures/test'], [])
  """

  def is_shift(name: str) -> bool:
    known = data.BENCHMARKS.get(name)
    if known is None:
      return '@' not in name
    return bool(known.shift_of) and known.unless not in names

  chosen = [name for name in names if '/' in name and '@' not in name]
  known = (*IN_DISTRIBUTION, VALIDATION)
  tests = [name for name in known if name in names] + sorted(chosen)
  shifts = [name for name in names if name not in tests and is_shift(name)]
  return tests, sorted(shifts, key=order)


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


def published(
  groups: Sequence[str], rows: Sequence[evaluation.Row]
) -> list[evaluation.Row]:
  """Return the published rows of groups, on the benchmarks that rows have.

  Args:
    groups: names; those that are not in `data.GROUPS` have none.
    rows: measured ones.

  >>> row = evaluation.Row('mine', 'imagenet_a', 0, 0.3, 7500)
  >>> first, *_ = published(['paper_b32'], [row])
  >>> first.method, first.benchmark, round(first.accuracy, 4)
  ('published (end)', 'imagenet_a', 0.3252)
  """
  measured = {row.benchmark for row in rows}
  return [
    evaluation.Row(
      title, name, 0, percent / 100, data.BENCHMARKS[name].size or 1
    )
    for group in groups
    if group in data.GROUPS
    for title, values in data.GROUPS[group].published.items()
    for name, percent in zip(data.GROUPS[group].benchmarks, values, strict=True)
    if name in measured
  ]


def find_method(name: str) -> Method:
  """Return title and cost of a method; of one that is unknown its name.

  >>> find_method('model_stock_5').title
  'Model Stock (every 5 epochs)'
  >>> find_method('fine_tuned_2_restarted').title
  'Fine-tuned 2 (restarted)'
  """
  if name in METHODS:
    return METHODS[name]
  if name in ANCHORS:
    return METHODS['zero_shot']._replace(title=ANCHORS[name])
  if match := _PERIODIC.fullmatch(name):
    when = merged_when(match[1]).removeprefix('after ')
    return Method(f'Model Stock ({when})', 'N')
  if match := _OF_RUN.fullmatch(name):
    base, number, restarted = match.groups('')
    title, cost, color = METHODS[base]
    title += number.replace('_', ' ') + ' (restarted)' * bool(restarted)
    return Method(title, 'N' if restarted else cost, None if number else color)
  return Method(name)


def name_anchor(items: Sequence[Any], head: str) -> list[Any]:
  """Return rows or differences, to be shown, with the anchor named by its head.

  Args:
    items: as files have them, where every anchor is 'zero_shot'.
    head: `anchor.head` of the run.
  """
  name = {'zero_shot': head}
  return [type(x)(*(name.get(y, y) for y in x[:2]), *x[2:]) for x in items]


def merged_when(mode: str) -> str:
  """Describe when the runs of a mode merged.

  >>> merged_when('5'), merged_when('epoch_average')
  ('after every 5 epochs', 'after every epoch, moments averaged')
  """
  if mode == 'end':
    return 'once, at the end'
  every, _, state = mode.partition('_')
  text = f'after every {every} epochs'
  if every in ('epoch', '1'):
    text = 'after every epoch'
  moments = {'reset': 'reset', 'average': 'averaged'}
  return f'{text}, moments {moments[state]}' if state else text


def order(name: str) -> int:
  """Return the place of a benchmark: as in `data.BENCHMARKS`, or the last."""
  return [*data.BENCHMARKS, name].index(name)
