"""The figure beside a merged checkpoint: cosine and ratio of every tensor."""

import pathlib
import re

import matplotlib as mpl
from matplotlib import figure as mpl_figure
import numpy as np

from modelstock_jax import files
from modelstock_jax.report import plots

# The first that a name fits; what fits none is a head, or something else.
_KINDS = (
  ('bias', r'bias$'),
  ('norm', r'norm|(^|[._/])ln'),
  ('embedding', r'emb|wte|wpe|cls_token'),
  ('attention', r'att|[qkv]_proj|query|key|value'),
  ('mlp', r'mlp|ffn|fc\d?[._/]|feed_forward|dense|(gate|up|down)_proj'),
  ('head', r''),
)
_LABELS = {'head': 'head and others'}


def draw(merged: files.Merge) -> pathlib.Path | None:
  """Draw a merge; return the .svg, or None if there is nothing to draw.

  A PNG lies beside it. Of `unit='filter'` the mean over filters is drawn.
  """
  if not merged.cosine:
    return None
  stem = merged.output / 'model_stock'
  if merged.output.suffix == '.safetensors':
    stem = merged.output.with_name(f'{merged.output.stem}.model_stock')
  with mpl.rc_context(plots.STYLE):
    figure = _figure(merged)
    plots.save(figure, stem)
  return stem.with_name(f'{stem.name}.svg')


def block(name: str) -> int | None:
  """Return the number of a tensor's block, from its name.

  >>> block('vision_model.encoder.layers.11.mlp.fc1.weight'), block('proj')
  (11, None)
  """
  found = re.search(r'(?:^|[._/])(\d+)(?=[._/])', name)
  return int(found[1]) if found else None


def kind(name: str) -> str:
  """Return the kind of a tensor, from its name.

  >>> kind('model.layers.0.self_attn.q_proj.weight'), kind('ln_f.weight')
  ('attention', 'norm')
  """
  lower = name.lower()
  return next(kind for kind, form in _KINDS if re.search(form, lower))


def _figure(merged: files.Merge) -> mpl_figure.Figure:
  figure = mpl_figure.Figure((7.2, 4.6), layout='constrained')
  axes = figure.subplots(2, sharex=True)
  kinds = {name: kind(name) for name in merged.cosine}
  places = {name: block(name) for name in merged.cosine}
  depth = 1 + max((p for p in places.values() if p is not None), default=0)
  for axis, values, label in (
    (axes[0], merged.cosine, 'cosine'),
    (axes[1], merged.ratio, 'ratio t'),
  ):
    for one, (color, marker) in plots.KIND_STYLES.items():
      names = [name for name in values if kinds[name] == one]
      if not names:
        continue
      y = [float(np.mean(values[name])) for name in names]
      x = [-1 if (p := places[name]) is None else p for name in names]
      points = axis.plot(
        x,
        y,
        marker,
        color=color,
        markersize=4,
        alpha=0.75,
        markeredgewidth=0,
        label=_LABELS.get(one, one),
        clip_on=False,
      )
      plots.hover(
        points,
        [f'{n}: {label} {v:.3f}' for n, v in zip(names, y, strict=True)],
      )
    axis.set_ylabel(label)
    axis.axhline(0, color='#888888', linewidth=0.8, zorder=0)
    axis.axhline(1, color='#888888', linewidth=0.8, zorder=0)
  step = max(1, depth // 12)
  ticks = [-1, *range(0, depth, step)]
  axes[1].set_xticks(ticks, ['outside', *map(str, ticks[1:])])
  axes[1].set_xlabel('block')
  axes[0].set_title(
    f'Merge of {len(merged.cosine)} tensors: 1 is the mean of the models, '
    '0 the anchor'
  )
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center')
  return figure
