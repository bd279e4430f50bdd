"""The model card of a converted CLIP: Markdown for its README.md."""

from collections.abc import Sequence
from importlib import metadata
import pathlib
import shlex
from typing import Any

import jax

import modelstock_jax
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.formats import hub
from modelstock_jax.formats import runs
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import models as models_lib
from modelstock_jax.report import rendering
from modelstock_jax.report import results
from modelstock_jax.report import summary as summary_lib
from modelstock_jax.report import tables
from modelstock_jax.training import auto
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation

# Data sets that have another name on the Hugging Face hub.
_HUB_NAMES = {'imagenet2012': 'imagenet-1k'}


def card(
  model: models_lib.Model,
  format: str,
  source: str,
  *,
  base_model: str | None = None,
  license: str | None = None,
) -> str:
  """Describe a converted CLIP: its sizes, how to load it, how it was made.

  The card of a run has what its workdir states of the step.

  Args:
    model: what was written.
    format: of the files, see `clip.save_pretrained`.
    source: words for what was converted, if no run trained it.
    base_model: its id on the Hugging Face hub, if it has one; that of a run is
      its anchor's.
    license: as the hub names it.

  Returns:
    Markdown, after the YAML that the Hugging Face hub reads.

  Raises:
    FileNotFoundError: the workdir has no config.
    ValueError: a file of the workdir is damaged.

  >>> half = (0.5, 0.5, 0.5)
  >>> model = models_lib.Model(clip.SIZES['ViT-B/32'], {}, mean=half, std=half)
  >>> text = card(model, 'open_clip', '`ViT-B-32.pt`')
  >>> print(text.partition('## ')[0].strip())
  ---
  library_name: open_clip
  pipeline_tag: zero-shot-image-classification
  tags:
  - clip
  ---
  <BLANKLINE>
  # CLIP ViT-B/32
  <BLANKLINE>
  Converted from `ViT-B-32.pt`.
  """
  run = _run(model.step) if model.step else None
  return rendering.render(
    'card.md.jinja',
    model=model,
    name=_name(model.config),
    sizes=describe(model.config),
    format=format,
    source=source,
    run=run,
    base_model=run['base_model'] if run else base_model,
    license=license,
    hub_names=_HUB_NAMES,
    version=modelstock_jax.__version__,
    jax_version=metadata.version('jax'),
    flax_version=metadata.version('flax'),
  )


def describe(model: clip.CLIPConfig) -> str:
  """Describe the sizes of a CLIP in a line.

  >>> for part in describe(clip.SIZES['ViT-B/32']).split('; '):
  ...   print(part)
  image tower of 224 px in patches of 32, width 768, depth 12
  text tower of width 512, depth 12
  151,277,313 parameters
  """
  vision, text = model.vision, model.text
  towers = [
    f'image tower of {vision.image_size} px in patches of {vision.patch_size}, '
    f'width {vision.width}, depth {vision.depth}'
  ]
  if text:
    towers.append(f'text tower of width {text.width}, depth {text.depth}')
  like = jax.eval_shape(clip.create(model).init, jax.random.key(0))
  count = sum(leaf.size for leaf in jax.tree.leaves(like))
  return '; '.join([*towers, f'{count:,} parameters'])


def _name(model: clip.CLIPConfig) -> str:
  for name, known in clip.SIZES.items():
    if (model.embed_dim, model.vision) == (known.embed_dim, known.vision):
      return f'CLIP {name}'
  vision = model.vision
  return (
    f'CLIP of width {vision.width}, depth {vision.depth}, '
    f'patches of {vision.patch_size}'
  )


def _accuracies(
  rows: Sequence[evaluation.Row], config: config_lib.Config
) -> list[tuple[str, str, float]]:
  """Return benchmark, data set and accuracy of a run's own merge."""
  of_merge = (models_lib.method_of(config.merge), config.seed)
  names = {results.VALIDATION: config.data.dataset}
  return [
    (
      results.benchmark_title(row.benchmark),
      names.get(row.benchmark) or data.find_benchmark(row.benchmark).dataset,
      row.accuracy,
    )
    for row in rows
    if (row.method, row.seed) == of_merge and '@' not in row.benchmark
  ]


def _run(checkpoint: pathlib.Path) -> dict[str, Any]:
  """Return what the card shows of the run that trained a model."""
  workdir, step = checkpoint.parents[1], int(checkpoint.name)
  summary = summary_lib.read(workdir)
  config, rows = summary.config, summary.rows
  # `modelstock evaluate` takes the latest checkpoint and does not record it.
  latest = runs.find(workdir)
  is_latest = latest is not None and latest.name == checkpoint.name
  if not is_latest or (rows and summary_lib.is_older(workdir)):
    rows = []
  merges = [
    line
    for line in summary.lines
    if line['kind'] == 'merge' and line['step'] == step
  ]
  values: dict[str, Any] = {
    'config': config,
    'step': step,
    'epoch': merges[-1]['epoch'] if merges else None,
    'merged_when': results.merged_when(config.merge.mode),
    'command': [
      'modelstock train --config=defaults.py --workdir=WORKDIR',
      *(
        _quoted(flag)
        for flag in config.to_flags()
        # Where it runs is for the devices of whoever runs it again.
        if not flag.startswith(tuple(f'--config.{key}=' for key in auto.KEYS))
      ),
    ],
    'accuracy': rows
    and tables.markdown_table(rows, num_models=config.merge.num_models),
    'base_model': hub.model_id(config.anchor.weights),
    'index': _accuracies(rows, config),
    'merges': None,
  }
  if merges and merges[-1]['cosine']:  # one model alone has no angle
    values['merges'] = merges_lib.collect([{step: merges[-1]}])
    values['by_layer'] = tables.markdown(tables.by_layer(values['merges']))
  return values


def _quoted(flag: str) -> str:
  """Quote a flag for a shell; a tuple of names in double quotes."""
  plain = "'" in flag and not set(flag) & set('"$`\\!')
  return f'"{flag}"' if plain else shlex.quote(flag)
