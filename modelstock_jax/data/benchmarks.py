"""What models are evaluated on: frozen specs, named as in the results."""

from typing import NamedTuple


class Benchmark(NamedTuple):
  """One column of the results table.

  Attributes:
    name: as it stands in `results.json`.
    dataset: a prepared data set, as `sources.open_source` takes it.
    split: its split.
    shift: a key of `shifts.SHIFTS` that every image passes through, or `None`.
  """

  name: str
  dataset: str
  split: str
  shift: str | None = None


_ALL = (
  Benchmark('digits', 'digits', 'test'),
  Benchmark('noise', 'digits', 'test', 'noise'),
  Benchmark('blur', 'digits', 'test', 'blur'),
  Benchmark('rotate_ccw', 'digits', 'test', 'rotate_ccw'),
  Benchmark('rotate_cw', 'digits', 'test', 'rotate_cw'),
  Benchmark('contrast', 'digits', 'test', 'contrast'),
  Benchmark('occlusion', 'digits', 'test', 'occlusion'),
  Benchmark('shift', 'digits', 'test', 'shift'),
  Benchmark('fonts', 'font_digits', 'test'),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
SHIFTS = tuple(name for name in BENCHMARKS if name != 'digits')


def find_benchmark(name: str) -> Benchmark:
  """The benchmark of a name.

  Args:
    name: a key of `BENCHMARKS`.

  Returns:
    Its spec.

  Raises:
    ValueError: there is none of that name; lists those there are.

  >>> find_benchmark('noise').shift
  'noise'
  """
  if name not in BENCHMARKS:
    raise ValueError(
      f'there is no benchmark {name!r}: known are {", ".join(BENCHMARKS)}'
    )
  return BENCHMARKS[name]
