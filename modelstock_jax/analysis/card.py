"""The model card of a converted CLIP: Markdown for its README.md."""

from collections.abc import Sequence
import functools
from importlib import metadata
import pathlib
import shlex
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

import modelstock_jax
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.analysis import merges as merges_lib
from modelstock_jax.analysis import results
from modelstock_jax.formats import runs
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import metrics

# Logits of the head in torch: `directory` is the converted folder, and
# `pixel_values` are normalised images, float32[B, C, Y, X].
TORCH_LOADER = """\
import json
from pathlib import Path
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection
tower = CLIPVisionModelWithProjection.from_pretrained(directory)
head = load_file(f'{directory}/classifier.safetensors')
labels = json.loads(Path(directory, 'labels.json').read_text('utf-8'))
embeds = tower(pixel_values).image_embeds
logits = F.linear(F.normalize(embeds, dim=-1), head['weight'], head['bias'])
"""

_MANY = 60  # layers; more than this are shown in a table that opens


class Run(NamedTuple):
  """Where a merged model comes from.

  Attributes:
    workdir: of the training run.
    step: of the checkpoint, in optimizer steps.
  """

  workdir: pathlib.Path
  step: int


def card(
  model: clip.CLIPConfig,
  format: str,
  source: str | Run,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  num_classes: int | None = None,
) -> str:
  """Describes a converted CLIP: what it is, how to load it, how it was made.

  Of a run it says what its workdir says, and of that what holds at the step.

  Args:
    model: the sizes of what was written.
    format: of the files, see `clip.save_pretrained`.
    source: the run that trained it, or words for the checkpoint that was
      converted.
    mean: of the pixels, 0..1, for each channel.
    std: standard deviation of the pixels.
    num_classes: K of the classification head, None without one.

  Returns:
    Markdown, after the YAML that the Hugging Face hub reads.

  Raises:
    FileNotFoundError: the workdir has no config.
    ValueError: a file of the workdir is damaged.

  >>> text = card(
  ...   clip.SIZES['ViT-B/32'],
  ...   'open_clip',
  ...   '`ViT-B-32.pt`',
  ...   mean=(0.5, 0.5, 0.5),
  ...   std=(0.5, 0.5, 0.5),
  ... )
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
  has_head = num_classes is not None
  name = _name(model)
  if isinstance(source, Run):
    title = f'Model Stock of {name}'
    about, made = _of_run(source, model)
  else:
    title, about, made = name, f'Converted from {source}.', []
  parts = [
    _front_matter(model, format, has_head, merged=isinstance(source, Run)),
    f'# {title}',
    about,
    '## Sizes',
    _sizes(model, mean, std, num_classes),
    '## Loading',
    *_loading(model, format, has_head),
    *made,
    '## Versions',
    'Converted with ' + ', '.join(_versions()) + '.',
  ]
  return '\n\n'.join(parts) + '\n'


def describe(model: clip.CLIPConfig) -> str:
  """Says the sizes of a CLIP in a line.

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


def flags(config: config_lib.ConfigDict) -> list[str]:
  """The flags that make a config of the defaults.

  >>> config = config_lib.override(
  ...   config_lib.defaults(), ['--config.merge.every=2']
  ... )
  >>> flags(config)
  ['--config.merge.every=2']
  """
  # Keys have no colon, values may.
  changed = [
    line.partition(': ')[0]
    for line in changes_lib.differences(config_lib.defaults(), config)
  ]
  return [
    f'--config.{key}={functools.reduce(getattr, key.split("."), config)}'
    for key in changed
  ]


def _front_matter(
  model: clip.CLIPConfig, format: str, has_head: bool, *, merged: bool
) -> str:
  # Neither the licence nor the hub's names of data sets are known here.
  library = {'huggingface': 'transformers', 'open_clip': 'open_clip'}
  if model.text:
    task = 'zero-shot-image-classification'
  else:
    task = 'image-classification' if has_head else 'image-feature-extraction'
  lines = [
    *([f'library_name: {library[format]}'] if format in library else []),
    f'pipeline_tag: {task}',
    'tags:',
    *(f'- {tag}' for tag in ['clip', *['model-stock', 'merge'] * merged]),
  ]
  return '\n'.join(['---', *lines, '---'])


def _name(model: clip.CLIPConfig) -> str:
  for name, known in clip.SIZES.items():
    if (model.embed_dim, model.vision) == (known.embed_dim, known.vision):
      return f'CLIP {name}'
  vision = model.vision
  return (
    f'CLIP of width {vision.width}, depth {vision.depth}, '
    f'patches of {vision.patch_size}'
  )


def _sizes(
  model: clip.CLIPConfig,
  mean: Sequence[float],
  std: Sequence[float],
  num_classes: int | None,
) -> str:
  text = describe(model)
  lines = [
    f'{text[0].upper()}{text[1:]}.',
    f'Activation: {model.activation}. Embeddings: {model.embed_dim} features.',
    f'Pixels, in 0..1, are normalised with the mean {_numbers(mean)} and the '
    f'standard deviation {_numbers(std)} of each channel.',
  ]
  if model.text is None:
    lines.append('There is no text tower.')
  if num_classes is not None:
    lines.append(
      f'Classification head: {num_classes} classes, their names in '
      '`labels.json`.'
    )
  return '\n'.join(f'* {line}' for line in lines)


def _numbers(values: Sequence[float]) -> str:
  return f'({", ".join(f"{value:g}" for value in values)})'


def _loading(model: clip.CLIPConfig, format: str, has_head: bool) -> list[str]:
  """Paragraphs and code; `directory` is the folder of the card."""
  kind = 'CLIPModel' if model.text else 'CLIPVisionModelWithProjection'
  parts = ['`directory` is the folder of this file.']
  if format == 'huggingface':
    parts.append(
      _python(
        f'from transformers import {kind}\n'
        f'model = {kind}.from_pretrained(directory)\n'
      )
    )
  elif format == 'open_clip':
    parts.append(
      _python(
        'import open_clip\n'
        "model = open_clip.create_model(f'local-dir:{directory}')\n"
      )
    )
  else:
    parts.append(
      "`clip.npy` is what `load_model_vars` of Scenic's CLIP project takes as "
      '`checkpoint_path`.'
    )
  if has_head and format == 'huggingface':
    text = (
      'The classification head in torch, for normalised images `pixel_values`, '
      f'float32[B, {model.vision.channels}, Y, X]'
    )
    if model.text:
      text += ' (`transformers` lists the text tower, which it leaves out)'
    parts += [f'{text}:', _python(TORCH_LOADER)]
  elif has_head:
    parts.append(
      'The classification head is in `classifier.safetensors`: logits = '
      '(f / |f|) @ weight.T + bias, where f is the image embedding.'
    )
  parts += ['In JAX:', _python(jax_loader(format, has_head=has_head))]
  return parts


def jax_loader(format: str, *, has_head: bool) -> str:
  """Code that loads a converted CLIP from `directory` in JAX.

  >>> print(jax_loader('huggingface', has_head=False))
  from modelstock_jax import clip
  model, params = clip.load_pretrained(directory)
  <BLANKLINE>
  """
  path = 'directory'
  if format == 'scenic':
    path = "f'{directory}/clip.npy', allow_pickle=True"
  lines = [
    'from modelstock_jax import clip',
    f'model, params = clip.load_pretrained({path})',
    *['head, labels = clip.load_head(directory)'] * has_head,
  ]
  return '\n'.join(lines) + '\n'


def _python(code: str) -> str:
  return f'```python\n{code}```'


def _of_run(run: Run, model: clip.CLIPConfig) -> tuple[str, list[str]]:
  """What a run is, and the sections on how it was made."""
  config = config_lib.from_json(run.workdir / 'config.json')
  lines = [
    line
    for line in metrics.read(run.workdir)
    if line['kind'] == 'merge' and line['step'] == run.step
  ]
  rows = _results(run)
  sections = [
    '## Training',
    'The command, where `defaults.py` has the line `from '
    'modelstock_jax.training.config import defaults as get_config`:',
    _command(config),
    _data_sets(config, rows),
  ]
  if rows:
    sections += [
      '## Accuracy',
      results.table(
        rows,
        _in_distribution(config, rows),
        num_models=config.merge.num_models,
      ),
    ]
  if lines and lines[-1]['cosine']:  # one model alone has no angle
    sections += ['## The merge by layer', *_merge(lines[-1])]
  return _about(config, run, lines, model), sections


def _about(
  config: config_lib.ConfigDict,
  run: Run,
  lines: Sequence[Any],
  model: clip.CLIPConfig,
) -> str:
  merge = config.merge
  every = {
    'end': 'once, after the last epoch',
    'epoch': 'after every epoch',
    1: 'after every epoch',
  }.get(merge.every, f'every {merge.every} epochs')
  reached = f'step {run.step}'
  if lines:
    reached += f' (epoch {lines[-1]["epoch"]} of {config.train.epochs})'
  measured = {
    'pretrained': 'those weights',
    'last_merge': 'the last merge, at first from those weights',
  }[merge.anchor]
  head = {
    'zero_shot': f'zero-shot, of the prompts `{config.anchor.prompts}`',
    'linear_probe': 'as a linear probe',
  }[config.anchor.head]
  text = (
    f'{merge.num_models} classifiers, each an image tower and a head, were '
    f'fine-tuned side by side from `{config.anchor.weights}` and merged by '
    '[Model Stock](https://arxiv.org/abs/2403.19522) (arXiv:2403.19522) '
    f'{every}, displacements being measured from {measured}. This is their '
    f'merge after {reached}. The head began {head}.'
  )
  if model.text:
    text += (
      ' The text tower and the temperature are those of '
      f'`{config.anchor.weights}`.'
    )
  return text


def _command(config: config_lib.ConfigDict) -> str:
  words = [
    'modelstock train --config=defaults.py --workdir=WORKDIR',
    *map(_quoted, flags(config)),
  ]
  return '```sh\n' + ' \\\n  '.join(words) + '\n```'


def _quoted(flag: str) -> str:
  """For a shell; a tuple of names in double quotes, for the eye."""
  plain = "'" in flag and not set(flag) & set('"$`\\!')
  return f'"{flag}"' if plain else shlex.quote(flag)


def _results(run: Run) -> list[results.Row]:
  """The rows of results.json, where they are of this checkpoint."""
  path = run.workdir / 'results.json'
  latest = runs.find(run.workdir)
  # `modelstock evaluate` takes the latest checkpoint, and does not say which.
  if not path.is_file() or latest is None or latest.name != str(run.step):
    return []
  if path.stat().st_mtime < latest.stat().st_mtime:
    return []
  return results.load(path)


def _in_distribution(
  config: config_lib.ConfigDict, rows: Sequence[results.Row]
) -> list[str]:
  """Names of the benchmarks on the data set of training, as it is."""
  found = []
  for name in dict.fromkeys(row.benchmark for row in rows):
    spec = data.BENCHMARKS.get(name)
    if spec and spec.dataset == config.data.dataset and not spec.shift:
      found.append(name)
  return found


def _data_sets(
  config: config_lib.ConfigDict, rows: Sequence[results.Row]
) -> str:
  """A table of what was trained and evaluated on, with versions and counts."""
  settings = config.data
  specs = [
    data.Benchmark('training', settings.dataset, settings.train),
    data.Benchmark('validation', settings.dataset, settings.validation),
  ]
  for name in dict.fromkeys(row.benchmark for row in rows):
    if name in data.BENCHMARKS:
      specs.append(data.BENCHMARKS[name])
  uses: dict[tuple[str, str], list[data.Benchmark]] = {}
  for spec in specs:
    uses.setdefault((spec.dataset, spec.split), []).append(spec)
  lines = [
    '| Data set (TFDS), version, split | Examples | For |',
    '|:--|--:|:--|',
  ]
  for (dataset, split), same in uses.items():
    try:
      source = data.open_benchmark(same[0], settings.data_dir or None)
      cells = f'`{source.name}` | {len(source)}'
    except OSError:  # not where the run is converted
      cells = f'`{dataset}`, split `{split}` | not at hand'
    names = ', '.join(spec.name for spec in same)
    lines.append(f'| {cells} | {names} |')
  return '\n'.join(lines)


def _merge(line: Any) -> list[str]:
  """Cosine and ratio of one merge: paragraphs and tables."""
  merges = merges_lib.collect([[line]])
  cosine, ratio = merges.cosine[0, -1], merges.ratio[0, -1]
  parts = [
    'Cosine of the angle between what training changed in one model and in '
    'another, and ratio of the merge (0: anchor, 1: plain average). The mean '
    f'ratio of the {len(merges.layers)} layers is {ratio.mean():.3f}.'
  ]
  order = np.argsort([layer.place for layer in merges.layers], kind='stable')
  table = '\n'.join(
    [
      '| Layer | Cosine | Ratio |',
      '|:--|--:|--:|',
      *(
        f'| `{merges.layers[i].name}` | {cosine[i]:.3f} | {ratio[i]:.3f} |'
        for i in order
      ),
    ]
  )
  if len(order) <= _MANY:
    return [*parts, table]
  return [
    *parts,
    _by_depth(merges, cosine, ratio),
    f'<details>\n<summary>All {len(order)} layers</summary>\n\n{table}\n\n'
    '</details>',
  ]


def _by_depth(
  merges: merges_lib.Merges, cosine: np.ndarray, ratio: np.ndarray
) -> str:
  """Means over the layers of a kind at a depth."""
  lines = [
    f'| Cosine / ratio | {" | ".join(merges.kinds)} |',
    '|:--|' + '--:|' * len(merges.kinds),
  ]
  for place, name in enumerate(merges.places):
    cells = []
    for kind in merges.kinds:
      chosen = merges.at_place(place) & merges.of_kind(kind)
      cells.append(
        f'{cosine[chosen].mean():.3f} / {ratio[chosen].mean():.3f}'
        if chosen.any()
        else '-'
      )
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def _versions() -> list[str]:
  names = ('jax', 'flax')
  return [
    f'modelstock_jax {modelstock_jax.__version__}',
    *(f'{name} {metadata.version(name)}' for name in names),
  ]
