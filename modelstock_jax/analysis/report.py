"""The report of a comparison: report.md, and its figures in plots/."""

from collections.abc import Mapping
from collections.abc import Sequence
import os
import pathlib

import numpy as np

from modelstock_jax.analysis import merges as merges_lib
from modelstock_jax.analysis import plots
from modelstock_jax.analysis import results

PathLike = str | os.PathLike[str]

# Who is compared with whom, in the order of the sentences.
_PAIRS = (
  ('model_stock_end', 'fine_tuned'),
  ('model_stock_end', 'uniform_soup'),
  ('model_stock_end', 'wise_ft_0.5'),
  ('model_stock_epoch', 'fine_tuned'),
  ('model_stock_epoch', 'uniform_soup'),
  ('model_stock_epoch', 'model_stock_end'),
)


def write(
  workdir: PathLike,
  rows: Sequence[results.Row],
  histories: Mapping[tuple[int, str], merges_lib.Lines],
  config_text: str,
  facts: Mapping[str, str],
  *,
  in_distribution: Sequence[str] | None = None,
  num_models: int = 2,
) -> pathlib.Path:
  """Writes report.md and plots/*.png.

  Every sentence about an outcome is made from the numbers.

  Args:
    workdir: takes the files; created if need be.
    rows: of the comparison.
    histories: lines of metrics.jsonl by seed and mode, 'end' (merged once) or
      'epoch' (merged again and again); a mode may be missing.
    config_text: the config, printed as it is.
    facts: how the report was made: command, versions, hardware, time, ...
    in_distribution: as `results.table` takes it.
    num_models: N, the models behind an average or a merge.

  Returns:
    The path of report.md.

  Raises:
    ValueError: if rows or histories are not valid, see `results.table` and
      `merges.collect`.
  """
  workdir = pathlib.Path(workdir)
  folder = workdir / 'plots'
  folder.mkdir(parents=True, exist_ok=True)
  tests, shifts = results.benchmarks(rows, in_distribution)
  merges = {}
  for mode in ('end', 'epoch'):
    runs = [lines for (_, m), lines in histories.items() if m == mode]
    if runs:
      merges[mode] = merges_lib.collect(runs)
  seeds = len({row.seed for row in rows})
  parts = [
    f'# Model Stock on {", ".join(tests or shifts)}',
    _what_was_done(seeds, num_models),
    '## What to see',
    '\n'.join(f'* {line}' for line in findings(rows, tests, shifts, merges)),
    'Differences are taken seed by seed, ± their sd.' if seeds > 1 else '',
    '## Accuracy',
    results.table(rows, in_distribution, num_models=num_models),
    _descriptions(rows),
  ]
  if tests and shifts:
    plots.scatter(rows, folder / 'scatter.png', in_distribution)
    parts.append(
      '![Accuracy on the shifts against accuracy in distribution]'
      '(plots/scatter.png)'
    )
  if 'end' in merges:
    plots.by_depth(merges['end'], folder / 'merge_end.png')
    parts += [
      '## The merge at the end',
      f'Cosine between the displacements of the models, and ratio of the merge '
      f'(0: anchor, 1: plain average); {_over(merges["end"])}. Small markers: '
      'single layers; large ones: their mean.',
      '![Cosine and ratio by depth and layer kind](plots/merge_end.png)',
      _end_table(merges['end']),
    ]
  if 'epoch' in merges:
    plots.over_epochs(merges['epoch'], folder / 'merge_epoch.png')
    parts += [
      '## The merges after every epoch',
      f'Cosine and ratio at every merge; means over layers, '
      f'{_over(merges["epoch"])}.',
      '![Cosine and ratio over epochs](plots/merge_epoch.png)',
      _epoch_table(merges['epoch']),
    ]
  parts += [
    '## How it was made',
    '\n'.join(f'* {name}: {value}' for name, value in facts.items()),
    '## Config',
    f'```\n{config_text.strip()}\n```',
  ]
  path = workdir / 'report.md'
  temporary = path.with_suffix('.tmp')
  text = '\n\n'.join(part for part in parts if part) + '\n'
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
  return path


def findings(
  rows: Sequence[results.Row],
  tests: Sequence[str],
  shifts: Sequence[str],
  merges: Mapping[str, merges_lib.Merges],
) -> list[str]:
  """Says in sentences what the numbers say.

  Args:
    rows: of a comparison.
    tests: names of the in-distribution benchmarks.
    shifts: names of the others.
    merges: by mode, 'end' or 'epoch'.

  Returns:
    Sentences, in Markdown.

  >>> row = results.Row('model_stock_end', 'digits', 0, 0.94, 100)
  >>> other = row._replace(method='fine_tuned', accuracy=0.95)
  >>> for sentence in findings([row, other], ['digits'], [], {}):
  ...   print(sentence)
  Highest on digits: Fine-tuned (95.0 %).
  **Model Stock (end)** against Fine-tuned: -1.0 points on digits (behind).
  """
  places = []
  if tests:
    places.append((', '.join(tests), tests))
  if shifts:
    places.append((f'the mean of the {len(shifts)} shifts', shifts))
  sentences = [_highest(rows, where, names) for where, names in places]
  for method, other in _PAIRS:
    clauses = [
      clause
      for where, names in places
      if (clause := _difference(rows, method, other, where, names))
    ]
    if clauses:
      sentences.append(
        f'**{results.title(method)}** against {results.title(other)}: '
        f'{"; ".join(clauses)}.'
      )
  if 'end' in merges:
    sentences.append(_end_sentence(merges['end']))
  if 'epoch' in merges:
    sentences.append(_epoch_sentence(merges['epoch']))
  return sentences


def _what_was_done(seeds: int, num_models: int) -> str:
  return (
    f'{num_models} models are fine-tuned from the same pretrained weights, the '
    f'anchor, with {f"{seeds} seeds" if seeds > 1 else "one seed"}. Model '
    'Stock merges them layer by layer into `t * mean + (1 - t) * anchor`. The '
    'ratio t follows from the cosine c of the angle between what fine-tuning '
    'changed in one model and in another, `t = N c / (1 + (N - 1) c)` unless '
    'the config says otherwise: where the models agree it is near 1 and the '
    'merge is their plain average; where they disagree the merge stays closer '
    'to the anchor.'
  )


def _descriptions(rows: Sequence[results.Row]) -> str:
  return '\n'.join(
    f'* {results.title(method)}: {results.METHODS[method].description}.'
    for method in results.methods(rows)
    if method in results.METHODS
  )


def _over(merges: merges_lib.Merges) -> str:
  seeds = len(merges.cosine)
  return f'mean over {seeds} seeds' if seeds > 1 else 'one seed'


def _highest(
  rows: Sequence[results.Row], where: str, names: Sequence[str]
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
  rows: Sequence[results.Row],
  method: str,
  other: str,
  where: str,
  names: Sequence[str],
) -> str:
  """How far a method is ahead of another, seed by seed; '' if not known."""
  one = results.per_seed(rows, method, names)
  two = results.per_seed(rows, other, names)
  points = [100 * (one[seed] - two[seed]) for seed in one if seed in two]
  if not points:
    return ''
  points = [round(point, 9) for point in points]  # a tie stays one
  mean = float(np.mean(points))
  ahead = sum(point > 0 for point in points)
  behind = sum(point < 0 for point in points)
  seeds = len(points)
  if seeds == max(ahead, behind):
    verdict = 'ahead' if ahead else 'behind'
    if seeds > 1:
      verdict += f' in all {seeds} seeds'
  elif ahead or behind:
    verdict = f'mixed: ahead in {ahead}, behind in {behind} of {seeds} seeds'
  else:
    verdict = 'level'
  # Adding 0.0 takes the sign off a negative zero.
  number = f'{round(mean, 1) + 0.0:+.1f}'
  sd = results.deviation(points)
  spread = '' if sd is None else f' ± {sd:.1f}'
  return f'{number}{spread} points on {where} ({verdict})'


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


def _epoch_sentence(merges: merges_lib.Merges) -> str:
  ratio = merges.ratio.mean((0, 2))
  first, last = merges.epochs[0], merges.epochs[-1]
  text = (
    f'Merged after every epoch: the mean ratio is {ratio[0]:.2f} after epoch '
    f'{first} and {ratio[-1]:.2f} after epoch {last}.'
  )
  average = [f'{value:.2f}' == '1.00' for value in ratio]
  if average[-1]:
    since = len(average) - average[::-1].index(False) if not all(average) else 0
    text += (
      f' From epoch {merges.epochs[since]} on it is 1.00, rounded: there the '
      'merge is a plain average, as all models have moved the same way from '
      'the anchor.'
    )
  return text


def _end_table(merges: merges_lib.Merges) -> str:
  lines = [
    '| Layer kind | Layers | Cosine | Ratio | Lowest ratio |',
    '|:--|--:|--:|--:|:--|',
  ]
  ratio = merges.ratio[:, -1].mean(0)
  for kind in merges.kinds:
    chosen = merges.of_kind(kind)
    lowest = int(np.flatnonzero(chosen)[ratio[chosen].argmin()])
    lines.append(
      f'| {kind} | {chosen.sum()} '
      f'| {_mean_sd(merges.cosine[:, -1, chosen])} '
      f'| {_mean_sd(merges.ratio[:, -1, chosen])} '
      f'| {ratio[lowest]:.2f} `{merges.layers[lowest].name}` |'
    )
  return '\n'.join(lines)


def _epoch_table(merges: merges_lib.Merges) -> str:
  last = len(merges.epochs) - 1
  chosen = sorted({0, last // 2, last})
  header = ' | '.join(f'Epoch {merges.epochs[index]}' for index in chosen)
  lines = [
    f'| Cosine / ratio | Layers | {header} |',
    '|:--|--:|' + '--:|' * len(chosen),
  ]
  groups = [(kind, merges.of_kind(kind)) for kind in merges.kinds]
  groups.append(('all', np.ones(len(merges.layers), bool)))
  for name, layers in groups:
    cells = [
      f'{merges.cosine[:, index, layers].mean():.3f} / '
      f'{merges.ratio[:, index, layers].mean():.3f}'
      for index in chosen
    ]
    lines.append(f'| {name} | {layers.sum()} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def _mean_sd(values: np.ndarray) -> str:
  """Of [S, L]: the mean, and the sd over seeds of the mean over layers."""
  means = values.mean(1).tolist()
  sd = results.deviation(means)
  return f'{np.mean(means):.2f}' + ('' if sd is None else f' ± {sd:.2f}')
