"""Differences of Model Stock from other methods, with paired intervals."""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
from typing import NamedTuple

import numpy as np
import pydantic

from modelstock_jax.formats import text as text_lib
from modelstock_jax.report import results

SUFFIX = '.differences.json'  # of the file next to results.json

_RESAMPLES = 2000


class Difference(NamedTuple):
  """The accuracy of one method minus that of another, on the same examples."""

  method: str
  other: str
  benchmark: str
  difference: float  # -1..1, mean over seeds
  low: float  # of the 95 % interval
  high: float
  seeds: int
  n: int  # examples


_DIFFERENCES = pydantic.TypeAdapter(list[Difference])


def interval(differences: np.ndarray) -> tuple[float, float]:
  """Compute the 95 % percentile interval of a mean by the bootstrap.

  Examples are drawn with replacement, the same ones for all seeds; and of
  several seeds, seeds are drawn likewise. Equal examples are counted, so that
  a multinomial draws all of them at once.

  Args:
    differences: float[S, n], paired, of S seeds and n examples.

  Returns:
    Its ends, the same in every call.
  """
  values, counts = np.unique(differences, axis=1, return_counts=True)
  rng, n = np.random.default_rng(0), counts.sum()
  draws = [rng.multinomial(n, counts / n) for _ in range(_RESAMPLES)]
  means = draws @ values.T / n
  seeds = rng.integers(means.shape[1], size=means.shape)
  totals = np.take_along_axis(means, seeds, axis=1).mean(axis=1)
  low, high = np.quantile(totals, (0.025, 0.975)).tolist()
  return low, high


def compare(
  accuracies: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
) -> list[Difference]:
  """Compare each Model Stock with the methods before it.

  Args:
    accuracies: by benchmark and method, float[n] of each seed, all of the same
      examples.

  Returns:
    The differences on each benchmark.
  """
  differences = []
  for name, of_method in accuracies.items():
    for method, other in results.pairs(of_method):
      one, two = (np.array(of_method[x], np.float64) for x in (method, other))
      ends, (seeds, n) = interval(one - two), one.shape
      mean = float((one - two).mean())
      each = Difference(method, other, name, mean, *ends, seeds=seeds, n=n)
      differences.append(each)
  return differences


def load(path: pathlib.Path) -> list[Difference]:
  """Read a file of differences; none where there is no file.

  Raises:
    ValueError: it does not hold differences.
  """
  if not path.is_file():
    return []
  with text_lib.explained(
    f'{path} does not hold differences: ', '. Run the evaluation again.'
  ):
    return _DIFFERENCES.validate_python(text_lib.read_json(path))


def verdict(differences: Sequence[Difference]) -> list[str]:
  """Say how each Model Stock compares with the best of the other models.

  Returns:
    On each benchmark in distribution, and on its corruptions, a sentence about
    the best single model, and one about the best of all else.
  """
  tests, _ = results.split({each.benchmark for each in differences})
  shown = {*tests, *(name + results.MEAN for name in tests)}
  groups: dict[tuple[str, str, bool], list[Difference]] = {}
  for each in differences:
    if each.benchmark in shown:
      other = not each.other.startswith('fine_tuned')
      groups.setdefault((each.benchmark, each.method, other), []).append(each)
  return [_sentence(groups[key]) for key in sorted(groups)]


def _sentence(group: Sequence[Difference]) -> str:
  least = min(group, key=lambda each: each.difference)
  title, other = (results.find_method(name).title for name in least[:2])
  if len(group) > 1:
    kind = 'single' if least.other.startswith('fine_tuned') else 'other'
    other += f', the best of {len(group)} {kind} models'
  points, low, high = (100 * x for x in least[3:6])
  above = f'{abs(points):.1f} points {"above" if points > 0 else "below"}'
  meaning = 'no difference that these examples can show'
  if low > 0 or high < 0:
    better = 'better' if low > 0 else 'worse'
    meaning = f'{better}, by more than the choice of examples explains'
  seeds = f' and {least.seeds} seeds' if least.seeds > 1 else ''
  return (
    f'On {results.benchmark_title(least.benchmark)} ({least.n} examples{seeds}'
    f'), {title} is {above if points else "level with"} {other} (95 % interval '
    f'{low:+z.1f} to {high:+z.1f}): {meaning}.'
  )
