"""The section of the report on merges: their figure and tables."""

import numpy as np

from modelstock_jax.report import findings
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import page
from modelstock_jax.report import results

_RATIO = '0: anchor, 1: plain average'


def render(mode: str, merges: merges_lib.Merges, figure: str) -> str:
  """Return the section on the merges of a run, or of runs of several seeds.

  Args:
    mode: when the runs merged, see `findings.merged_when`.
    merges: of the runs.
    figure: HTML, or ''.

  Returns:
    HTML.
  """
  seeds = len(merges.cosine)
  over = f'mean over {seeds} seeds' if seeds > 1 else 'one seed'
  when = findings.merged_when(mode)
  if mode == 'end':
    shown = [_kinds(merges)]
    marks = ' Small markers: single layers; large ones: the mean of a kind.'
  else:
    shown = [_epochs(merges, short=True)]
    if len(merges.epochs) > 3:
      shown.append(
        page.folded(
          f'All {len(merges.epochs)} merges', _epochs(merges, short=False)
        )
      )
    marks = ' Lines: means over layers.'
  return page.section(
    f'merge-{mode}',
    f'Merged {when}',
    page.paragraph(
      'Cosine between the displacements of the models from the anchor, and '
      f'ratio of the merge ({_RATIO}); {over}.' + marks
    ),
    figure,
    *shown,
    page.folded(
      f'All {len(merges.layers)} layers at the last merge', _layers(merges)
    ),
  )


def _kinds(merges: merges_lib.Merges) -> str:
  """Return a table of the last merge by kind of layer."""
  ratio = merges.ratio[:, -1].mean(0)
  lines = []
  for kind in merges.kinds:
    chosen = merges.of_kind(kind)
    lowest = int(np.flatnonzero(chosen)[ratio[chosen].argmin()])
    lines.append(
      [
        kind,
        f'{chosen.sum()}',
        _mean_sd(merges.cosine[:, -1, chosen]),
        _mean_sd(merges.ratio[:, -1, chosen]),
        f'{ratio[lowest]:.2f}',
        f'`{merges.layers[lowest].name}`',
      ]
    )
  header = ['Kind', 'Layers', 'Cosine', 'Ratio', 'Lowest ratio', 'Its layer']
  return page.table('By kind of layer', header, lines)


def _epochs(merges: merges_lib.Merges, *, short: bool) -> str:
  """Return cosine and ratio by epoch and kind; short: of three epochs."""
  last = len(merges.epochs) - 1
  chosen = sorted({0, last // 2, last}) if short else range(last + 1)
  groups = [(kind, merges.of_kind(kind)) for kind in merges.kinds]
  groups.append(('all', np.ones(len(merges.layers), bool)))
  lines = [
    [
      f'{merges.epochs[index]}',
      *(
        f'{merges.cosine[:, index, layers].mean():.3f} / '
        f'{merges.ratio[:, index, layers].mean():.3f}'
        for _, layers in groups
      ),
    ]
    for index in chosen
  ]
  header = ['Epoch', *(f'{name} ({of.sum()})' for name, of in groups)]
  caption = 'Cosine / ratio after an epoch, by kind of layer (their number)'
  return page.table(caption, header, lines)


def _layers(merges: merges_lib.Merges) -> str:
  """Return a table of all layers at the last merge, along the depth."""
  cosine, ratio = merges.cosine[:, -1].mean(0), merges.ratio[:, -1].mean(0)
  order = sorted(
    range(len(merges.layers)),
    key=lambda index: (merges.layers[index].place, merges.layers[index].name),
  )
  lines = [
    [
      f'`{merges.layers[index].name}`',
      merges.layers[index].kind,
      merges.places[merges.layers[index].place],
      f'{cosine[index]:.3f}',
      page.Bar(f'{ratio[index]:.3f}', float(ratio[index])),
    ]
    for index in order
  ]
  caption = f'After epoch {merges.epochs[-1]}; the bar is the ratio ({_RATIO})'
  header = ['Layer', 'Kind', 'Block', 'Cosine', 'Ratio']
  return page.table(caption, header, lines, kind='numbers long')


def _mean_sd(values: np.ndarray) -> str:
  """Write the mean of [S, L], and the sd over seeds of layers' means."""
  means = values.mean(1).tolist()
  sd = results.deviation(means)
  return f'{np.mean(means):.2f}' + ('' if sd is None else f' ± {sd:.2f}')
