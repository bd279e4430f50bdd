"""`modelstock convert`."""

import argparse
import pathlib
import shlex
from typing import TYPE_CHECKING

from modelstock_jax.cli import evaluate
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
  evaluate.add_activation(parser)
  add('--license', help='license for the model card, such as mit')
  add(
    '--push',
    metavar='USER/NAME',
    help='upload OUT to this model of the Hugging Face hub',
  )
  add(
    '--dry-run',
    action='store_true',
    help='with --push: list the files and their sizes, and upload nothing',
  )


def run(args: argparse.Namespace) -> None:
  """Convert, and print what was read and written."""
  if args.dry_run and not args.push:
    raise ValueError('--dry-run: nothing would be uploaded without --push.')
  from modelstock_jax import clip
  from modelstock_jax.formats import hub
  from modelstock_jax.report import card
  from modelstock_jax.report import models

  trust = dict(allow_pickle=args.allow_pickle)
  flags = dict(image_size=args.image_size, activation=args.activation)
  model = models.read(args.source, **flags, **trust)
  if args.vision_only:
    model = models.without_text_tower(model)
  else:
    model = models.with_text_tower(model, **trust)
  model = _with_flags(model, args)
  path = pathlib.Path(args.source).expanduser()
  name = path.resolve().name if path.exists() else args.source
  clip.save_pretrained(
    model.params,
    args.target,
    args.format,
    config=model.config,
    labels=model.labels,
    card=card.card(
      model,
      args.format,
      f'`{name}`',
      base_model=hub.model_id(args.source),
      license=args.license,
    ),
    tokenizer=model.tokenizer,
    mean=model.mean,
    std=model.std,
  )
  classes = model.num_classes
  head = f', head of {classes} classes' if classes else ''
  print(f'Read {args.source}: {card.describe(model.config)}{head}.')
  print(f'Wrote {args.target}. Its README.md shows the code that loads it.')
  if model.config.text and not model.tokenizer:
    print('It has no tokenizer. Copy one with --tokenizer=DIR.')
  if args.dry_run:
    for file in sorted(pathlib.Path(args.target).iterdir()):
      print(f'{file.stat().st_size:>15,} bytes  {file.name}')
    command = shlex.join(['hf', 'upload', args.push, args.target])
    print(f'Nothing was uploaded. `{command}` uploads these files.')
  elif args.push:
    print(f'Uploaded to {hub.push(args.target, args.push)}.')


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
  if 'head' in model.params and model.labels is None:
    source = 'a data set that it does not name'
    if run := model.run:
      name, folder = run.data.dataset, run.data.data_dir
      source = f'the data set {name!r}, which is not in data_dir {folder!r}'
    raise FileNotFoundError(
      f'{args.source}: the names of the classes are those of {source}. Give '
      'them with --labels=FILE.'
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
