"""The model card of a converted CLIP: Markdown for its README.md."""

from collections.abc import Sequence
from importlib import metadata

import jax

import modelstock_jax
from modelstock_jax import clip
from modelstock_jax.report import card_of_run

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


def card(
  model: clip.CLIPConfig,
  format: str,
  source: str | card_of_run.Run,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  num_classes: int | None = None,
) -> str:
  """Describe a converted CLIP: its sizes, how to load it, how it was made.

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
  if isinstance(source, card_of_run.Run):
    title = f'Model Stock of {name}'
    about, made = card_of_run.describe(source, model)
  else:
    title, about, made = name, f'Converted from {source}.', []
  parts = [
    _front_matter(model, format, has_head, merged=bool(made)),
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
  """Return paragraphs and code; `directory` is the folder of the card."""
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
  """Return code that loads a converted CLIP from `directory` in JAX.

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


def _versions() -> list[str]:
  names = ('jax', 'flax')
  return [
    f'modelstock_jax {modelstock_jax.__version__}',
    *(f'{name} {metadata.version(name)}' for name in names),
  ]
