"""The figure of a merged checkpoint: cosine and ratio of every tensor."""

import pathlib

from modelstock_jax import files
from modelstock_jax.report import merges
from modelstock_jax.report import plots
from modelstock_jax.report import run_plots


def draw(merged: files.Merge) -> pathlib.Path | None:
  """Draw a merge as .svg and .png in the output, or next to its file.

  Of `unit='filter'` the mean over filters is drawn.

  Returns:
    The path of the .svg; None if no tensor was merged.
  """
  if not merged.cosine:
    return None
  stem = merged.output / 'model_stock'
  if merged.output.suffix == '.safetensors':
    stem = merged.output.with_name(f'{merged.output.stem}.model_stock')
  values = merges.collect(
    [{0: {'cosine': merged.cosine, 'ratio': merged.ratio}}]
  )
  plots.save(run_plots.by_depth(values), stem)
  return stem.with_name(f'{stem.name}.svg')
