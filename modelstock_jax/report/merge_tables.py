"""The tables of the report on merges."""

from typing import Any

import numpy as np

from modelstock_jax.report import findings
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import results
from modelstock_jax.report import tables


def section(mode: str, merges: merges_lib.Merges) -> dict[str, Any]:
  """Return what the page shows of the merges of runs that differ in seed.

  Args:
    mode: when the runs merged, see `findings.merged_when`.
    merges: of the runs.

  Returns:
    Values by name, for templates/page.html.
  """
  at_end = mode == 'end'
  many = not at_end and len(merges.epochs) > 3
  return {
    'mode': mode,
    'when': findings.merged_when(mode),
    'seeds': len(merges.cosine),
    'marks': 'Small markers: single layers; large ones: the mean of a kind.'
    if at_end
    else 'Lines: means over layers.',
    'table': by_kind(merges) if at_end else by_epoch(merges, short=True),
    'epochs': by_epoch(merges, short=False) if many else None,
    'layers': by_layer(merges),
  }


def by_kind(merges: merges_lib.Merges) -> tables.Shown:
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
  return tables.Shown('By kind of layer', header, lines)


def by_epoch(merges: merges_lib.Merges, *, short: bool) -> tables.Shown:
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
  return tables.Shown(caption, header, lines)


def by_layer(merges: merges_lib.Merges) -> tables.Shown:
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
      tables.ShownCell(
        f'{ratio[index]:.3f}', share=min(max(float(ratio[index]), 0.0), 1.0)
      ),
    ]
    for index in order
  ]
  caption = (
    f'After epoch {merges.epochs[-1]}; the bar is the ratio (0: anchor, 1: '
    'plain average)'
  )
  header = ['Layer', 'Kind', 'Block', 'Cosine', 'Ratio']
  return tables.Shown(caption, header, lines, kind='numbers long')


def _mean_sd(values: np.ndarray) -> tables.ShownCell:
  """Return the mean of [S, L], and the sd over seeds of layers' means."""
  means = values.mean(1).tolist()
  sd = results.deviation(means)
  return tables.ShownCell(
    f'{np.mean(means):.2f}', '' if sd is None else f'{sd:.2f}'
  )
