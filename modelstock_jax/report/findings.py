"""Sentences that follow from the numbers of a run."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import results
from modelstock_jax.training import evaluation

# Who merging once is compared with, and merging again and again.
_OF_END = ('fine_tuned', 'uniform_soup', 'wise_ft_0.5')
_OF_PERIODIC = ('fine_tuned', 'uniform_soup', 'model_stock_end')


def sentences(
  rows: Sequence[evaluation.Row],
  tests: Sequence[str],
  shifts: Sequence[str],
  merges: Mapping[str, merges_lib.Merges],
) -> list[str]:
  """Summarise the numbers in sentences.

  Args:
    rows: of a comparison.
    tests: names of the in-distribution benchmarks.
    shifts: names of the others.
    merges: by when the runs merged: 'end' (once), 'epoch' (after each), or
      the number of epochs from one merge to the next.

  Returns:
    Sentences, in Markdown.

  >>> row = evaluation.Row('model_stock_end', 'digits', 0, 0.94, 100)
  >>> other = row._replace(method='fine_tuned', accuracy=0.95)
  >>> for sentence in sentences([row, other], ['digits'], [], {}):
  ...   print(sentence)
  Highest on digits: Fine-tuned (95.0 %).
  **Model Stock (end)** against Fine-tuned: -1.0 points on digits (behind).
  """
  places = []
  if tests:
    places.append((results.benchmark_titles(tests), tests))
  if shifts:
    places.append((f'the mean of the {len(shifts)} shifts', shifts))
  lines = [_highest(rows, where, names) for where, names in places]
  for method, other in _pairs(results.methods(rows)):
    differences = [
      _difference(rows, method, other, where, names) for where, names in places
    ]
    if clauses := '; '.join(filter(None, differences)):
      lines.append(
        f'**{results.title(method)}** against {results.title(other)}: '
        f'{clauses}.'
      )
  for mode, of_mode in merges.items():
    if mode == 'end':
      lines.append(_end_sentence(of_mode))
    else:
      lines.append(_periodic_sentence(mode, of_mode))
  return lines


def _pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
  """Return the pairs of methods to compare, in order."""
  pairs = []
  for method in methods:
    if method.startswith('model_stock_'):
      others = _OF_END if method == 'model_stock_end' else _OF_PERIODIC
      # A run alone has nothing else to be compared with.
      if not set(others) & set(methods):
        others = ('zero_shot',)
      pairs += [(method, other) for other in others]
  return pairs


def _highest(
  rows: Sequence[evaluation.Row], where: str, names: Sequence[str]
) -> str:
  means = {
    method: 100 * float(np.mean(list(values.values())))
    for method in results.methods(rows)
    if (values := results.per_seed(rows, method, names))
  }
  best = max((round(mean, 1) for mean in means.values()), default=None)
  if best is None:
    return f'No method was measured on all of {where}.'
  titles = [
    results.title(m) for m, mean in means.items() if round(mean, 1) == best
  ]
  return f'Highest on {where}: {" and ".join(titles)} ({best:.1f} %).'


def _difference(
  rows: Sequence[evaluation.Row],
  method: str,
  other: str,
  where: str,
  names: Sequence[str],
) -> str:
  """Compare two methods seed by seed; '' if there is no common seed."""
  one = results.per_seed(rows, method, names)
  two = results.per_seed(rows, other, names)
  # Rounded, so that a tie stays one.
  points = [round(100 * (one[x] - two[x]), 9) for x in one if x in two]
  if not points:
    return ''
  ahead = sum(point > 0 for point in points)
  behind = sum(point < 0 for point in points)
  seeds = len(points)
  if not ahead and not behind:
    verdict = 'level'
  elif seeds in (ahead, behind):
    verdict = 'ahead' if ahead else 'behind'
    verdict += f' in all {seeds} seeds' if seeds > 1 else ''
  else:
    verdict = f'mixed: ahead in {ahead}, behind in {behind} of {seeds} seeds'
  # Adding 0.0 takes the sign off a negative zero.
  number = f'{round(float(np.mean(points)), 1) + 0.0:+.1f}'
  if seeds > 1:
    number += f' ± {np.std(points, ddof=1):.1f}'
  return f'{number} points on {where} ({verdict})'


def _end_sentence(merges: merges_lib.Merges) -> str:
  ratio = merges.ratio[:, -1].mean(0)
  means = {kind: ratio[merges.of_kind(kind)].mean() for kind in merges.kinds}
  low = min(means, key=lambda kind: means[kind])
  high = max(means, key=lambda kind: means[kind])
  return (
    f'Merged once, at the end: the mean ratio over {len(merges.layers)} layers '
    f'is {ratio.mean():.2f}, from {means[low]:.2f} ({low}) to '
    f'{means[high]:.2f} ({high}).'
  )


def _periodic_sentence(mode: str, merges: merges_lib.Merges) -> str:
  ratios = [f'{value:.2f}' for value in merges.ratio.mean((0, 2))]
  first, last = merges.epochs[0], merges.epochs[-1]
  text = (
    f'Merged {results.merged_when(mode)}: the mean ratio is {ratios[0]} after '
    f'epoch {first} and {ratios[-1]} after epoch {last}.'
  )
  different = [index for index, x in enumerate(ratios) if x != '1.00']
  since = 1 + max(different, default=-1)
  if since < len(ratios):
    text += (
      f' From epoch {merges.epochs[since]} on it is 1.00, rounded: there the '
      'merge is a plain average, as all models have moved the same way from '
      'the anchor.'
    )
  return text
