"""The tables of the report on merges."""

import numpy as np

from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import tables


def by_kind(merges: merges_lib.Merges) -> tables.Table:
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
        # Over seeds, of the means over layers.
        tables.mean_cell(merges.cosine[:, -1, chosen].mean(1), 2),
        tables.mean_cell(merges.ratio[:, -1, chosen].mean(1), 2),
        f'{ratio[lowest]:.2f}',
        f'`{merges.layers[lowest].name}`',
      ]
    )
  header = ['Kind', 'Layers', 'Cosine', 'Ratio', 'Lowest ratio', 'Its layer']
  return tables.Table('By kind of layer', header, lines)


def by_epoch(merges: merges_lib.Merges, *, short: bool) -> tables.Table:
  """Return cosine and ratio by epoch and kind; short: of three epochs."""
  last = len(merges.epochs) - 1
  chosen = sorted({0, last // 2, last}) if short else range(last + 1)
  groups = {kind: merges.of_kind(kind) for kind in merges.kinds}
  groups['all'] = np.ones(len(merges.layers), bool)
  lines = [
    [
      f'{merges.epochs[index]}',
      *(
        f'{merges.cosine[:, index, layers].mean():.3f} / '
        f'{merges.ratio[:, index, layers].mean():.3f}'
        for layers in groups.values()
      ),
    ]
    for index in chosen
  ]
  header = ['Epoch', *(f'{name} ({of.sum()})' for name, of in groups.items())]
  caption = 'Cosine / ratio after an epoch, by kind of layer (their number)'
  return tables.Table(caption, header, lines)


def by_layer(merges: merges_lib.Merges) -> tables.Table:
  """Return a table of all layers at the last merge, along the depth."""
  values = zip(
    merges.layers,
    merges.cosine[:, -1].mean(0),
    merges.ratio[:, -1].mean(0).tolist(),
    strict=True,
  )
  lines = [
    [
      f'`{layer.name}`',
      layer.kind,
      merges.places[layer.place],
      f'{cosine:.3f}',
      tables.Cell(f'{ratio:.3f}', share=min(max(ratio, 0.0), 1.0)),
    ]
    for layer, cosine, ratio in sorted(
      values, key=lambda value: (value[0].place, value[0].name)
    )
  ]
  caption = (
    f'After epoch {merges.epochs[-1]}; the bar is the ratio (0: anchor, 1: '
    'plain average)'
  )
  header = ['Layer', 'Kind', 'Block', 'Cosine', 'Ratio']
  return tables.Table(caption, header, lines, kind='numbers long')


def by_depth(merges: merges_lib.Merges) -> tables.Table:
  """Return means at the last merge over the layers of a kind at a depth."""
  lines = []
  for place, name in enumerate(merges.places):
    line = [name]
    for kind in merges.kinds:
      chosen = merges.at_place(place) & merges.of_kind(kind)
      cosine, ratio = merges.cosine[:, -1, chosen], merges.ratio[:, -1, chosen]
      line.append(
        f'{cosine.mean():.3f} / {ratio.mean():.3f}' if chosen.any() else '-'
      )
    lines.append(line)
  return tables.Table('By depth', ['Cosine / ratio', *merges.kinds], lines)
