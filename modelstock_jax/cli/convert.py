"""`modelstock convert`."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from modelstock_jax.formats import text

if TYPE_CHECKING:
  from modelstock_jax.report import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  add = parser.add_argument
  add(
    'source',
    metavar='IN',
    help='run directory or one of its checkpoints; folder of Hugging Face or '
    'open_clip; id of the Hugging Face hub; .pt, .pth, .bin, .ckpt, .npy or '
    '.safetensors file',
  )
  add('target', metavar='OUT', help='new folder')
  formats = ('huggingface', 'open_clip', 'scenic')
  add('--format', required=True, choices=formats, help='tool to write for')
  add('--vision-only', action='store_true', help='leave out the text tower')
  add(
    '--labels',
    metavar='FILE',
    help='JSON list of the names of the classes (default: those of the data)',
  )
  add(
    '--tokenizer',
    metavar='DIR',
    help='folder whose tokenizer files are copied (default: that of IN)',
  )
  add(
    '--image-size',
    type=int,
    metavar='N',
    help='width of the images in pixels, to which the positional embeddings '
    'are resized',
  )
  add(
    '--allow-pickle',
    action='store_true',
    help='read a .npy file, which can run any code: only if you trust it',
  )


def run(args: argparse.Namespace) -> None:
  """Convert, and print what was read and written."""
  from modelstock_jax import clip
  from modelstock_jax.report import card
  from modelstock_jax.report import models

  trust = dict(allow_pickle=args.allow_pickle)
  model = models.read(args.source, image_size=args.image_size, **trust)
  if args.vision_only:
    model = models.without_text_tower(model)
  else:
    model = models.with_text_tower(model, **trust)
  model = _with_flags(model, args)
  pixels = dict(mean=model.mean, std=model.std)
  path = pathlib.Path(args.source).expanduser()
  name = path.resolve().name if path.exists() else args.source
  clip.save_pretrained(
    model.params,
    args.target,
    args.format,
    config=model.config,
    labels=model.labels,
    card=card.card(
      model.config,
      args.format,
      model.step or f'`{name}`',
      num_classes=model.num_classes,
      **pixels,
    ),
    tokenizer=model.tokenizer,
    **pixels,
  )
  classes = model.num_classes
  head = f', head of {classes} classes' if classes else ''
  print(f'Read {args.source}: {card.describe(model.config)}{head}.')
  print(f'Wrote {args.target}. Its README.md shows the code that loads it.')
  if model.config.text and not model.tokenizer:
    print('It has no tokenizer. Copy one with --tokenizer=DIR.')


def _with_flags(
  model: 'models.Model', args: argparse.Namespace
) -> 'models.Model':
  """Apply the flags for tokenizer and labels."""
  if args.tokenizer is not None:
    if 'text' not in model.params:
      raise ValueError(
        f'--tokenizer={args.tokenizer}: there is no text tower to read its '
        'tokens. Leave the flag out.'
      )
    model = model._replace(tokenizer=pathlib.Path(args.tokenizer))
  if args.labels is not None:
    if 'head' not in model.params:
      raise ValueError(
        f'--labels={args.labels}: {args.source} has no classification head. '
        'Leave the flag out.'
      )
    model = model._replace(labels=_read_labels(args.labels))
  if model.run and model.labels is None:
    raise FileNotFoundError(
      f'The names of the classes are those of the data set '
      f'{model.run.data.dataset!r}, which is not in data_dir '
      f'{model.run.data.data_dir!r}. Give them with --labels=FILE.'
    )
  return model


def _read_labels(path: str) -> list[str]:
  with text.explained(f'--labels={path} must hold a JSON list of names: ', '.'):
    labels = text.read_json(path)
    if not isinstance(labels, list) or not all(
      isinstance(label, str) for label in labels
    ):
      raise ValueError(f'it holds {text.shown(labels)}')
    return labels
