"""The figure beside a merged checkpoint: cosine and ratio of every tensor."""

import pathlib
import re

import numpy as np

from modelstock_jax import files
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import plots
from modelstock_jax.report import run_plots

# The first that a name fits; what fits none is a head, or something else.
_KINDS = (
  ('bias', r'bias$'),
  ('norm', r'norm|(^|[._/])ln'),
  ('embedding', r'emb|wte|wpe|cls_token'),
  ('attention', r'att|[qkv]_proj|query|key|value'),
  ('mlp', r'mlp|ffn|fc\d?[._/]|feed_forward|dense|(gate|up|down)_proj'),
  ('head', r''),
)


def draw(merged: files.Merge) -> pathlib.Path | None:
  """Draw a merge; return the .svg, or None if there is nothing to draw.

  A PNG lies beside it. Of `unit='filter'` the mean over filters is drawn.
  """
  if not merged.cosine:
    return None
  stem = merged.output / 'model_stock'
  if merged.output.suffix == '.safetensors':
    stem = merged.output.with_name(f'{merged.output.stem}.model_stock')
  blocks = {name: block(name) for name in merged.cosine}
  depth = 1 + max((b for b in blocks.values() if b is not None), default=0)
  merges = merges_lib.Merges(
    epochs=[0],
    layers=[
      merges_lib.Layer(name, kind(name), 0 if b is None else b + 1)
      for name, b in blocks.items()
    ],
    places=['other', *map(str, range(depth))],
    cosine=np.array([[[np.mean(x) for x in merged.cosine.values()]]]),
    ratio=np.array([[[np.mean(x) for x in merged.ratio.values()]]]),
  )
  plots.save(run_plots.by_depth(merges), stem)
  return stem.with_name(f'{stem.name}.svg')


def block(name: str) -> int | None:
  """Return the number of a tensor's block, from its name.

  >>> block('vision_model.encoder.layers.11.mlp.fc1.weight'), block('proj')
  (11, None)
  """
  match = re.search(r'(?:^|[._/])(\d+)(?=[._/])', name)
  return int(match[1]) if match else None


def kind(name: str) -> str:
  """Return the kind of a tensor, from its name.

  >>> kind('model.layers.0.self_attn.q_proj.weight'), kind('ln_f.weight')
  ('attention', 'norm')
  """
  lower = name.lower()
  return next(kind for kind, form in _KINDS if re.search(form, lower))
