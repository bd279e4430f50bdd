"""`modelstock convert`."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

from modelstock_jax.formats import text

if TYPE_CHECKING:
  from modelstock_jax import clip


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the flags of this command."""
  parser.add_argument(
    'source',
    metavar='IN',
    help='the workdir of a run, one of its checkpoints, a folder of Hugging '
    'Face or open_clip, the id of a model on the hub, or a .pt, .npy or '
    '.safetensors file',
  )
  parser.add_argument('target', metavar='OUT', help='a new folder')
  parser.add_argument(
    '--format',
    required=True,
    choices=('huggingface', 'open_clip', 'scenic'),
    help='whose files to write',
  )
  parser.add_argument(
    '--vision-only', action='store_true', help='leave the text tower out'
  )
  parser.add_argument(
    '--labels',
    metavar='FILE',
    help="names of the head's classes, a JSON list, in place of those of the "
    'data set',
  )
  parser.add_argument(
    '--tokenizer',
    metavar='DIR',
    help='folder whose tokenizer files are copied, where IN has none',
  )
  parser.add_argument(
    '--image-size',
    type=int,
    metavar='N',
    help='resize the positional embeddings for images of N pixels',
  )
  parser.add_argument(
    '--allow-pickle',
    action='store_true',
    help='read a .npy file, which can run any code: only if you trust it',
  )


def run(args: argparse.Namespace) -> None:
  """Convert, and print what was written and how to load it."""
  from modelstock_jax import clip
  from modelstock_jax.formats import runs
  from modelstock_jax.report import card

  path = pathlib.Path(args.source).expanduser()
  step = runs.find(path) if path.is_dir() else None
  checkpoint = _from_run(args, step) if step else _from_checkpoint(args, path)
  checkpoint = _as_asked(args, checkpoint)
  head = checkpoint.params.get('head')
  clip.save_pretrained(
    checkpoint.params,
    args.target,
    args.format,
    config=checkpoint.config,
    labels=checkpoint.labels,
    card=card.card(
      checkpoint.config,
      args.format,
      checkpoint.source,
      mean=checkpoint.mean,
      std=checkpoint.std,
      num_classes=None if head is None else len(head['bias']),
    ),
    tokenizer=checkpoint.tokenizer,
    mean=checkpoint.mean,
    std=checkpoint.std,
  )
  classes = '' if head is None else f', head of {len(head["bias"])} classes'
  print(f'Read {args.source}: {card.describe(checkpoint.config)}{classes}.')
  print(f'Wrote {args.target}: {_how_to_load(args, checkpoint.config)}')
  if checkpoint.config.text and not checkpoint.tokenizer:
    print('There was no tokenizer to copy; --tokenizer=DIR names one.')


class _Checkpoint(NamedTuple):
  """A CLIP to be written, and what goes with it."""

  config: 'clip.CLIPConfig'
  params: dict[str, Any]
  source: str | pathlib.Path  # for the model card
  mean: tuple[float, ...]
  std: tuple[float, ...]
  labels: list[str] | None = None  # of the head, if there is one
  tokenizer: pathlib.Path | None = None


def _from_run(args: argparse.Namespace, step: pathlib.Path) -> _Checkpoint:
  """Read the merge of a run, and the text tower of its anchor."""
  from modelstock_jax import clip
  from modelstock_jax.training import config as config_lib

  workdir = step.parents[1]
  config = config_lib.from_json(workdir / 'config.json')
  model, params = clip.load_pretrained(step, image_size=args.image_size)
  sizes, tokenizer = model.config, None
  if not args.vision_only:
    from modelstock_jax.training import anchor as anchor_lib
    from modelstock_jax.training import class_texts

    try:
      anchor = anchor_lib.read(
        config.anchor.weights,
        config.model.network(),
        text_tower=True,
        # Whoever wrote the workdir may not say what this user trusts.
        allow_pickle=args.allow_pickle,
      )
    except (FileNotFoundError, ValueError) as error:
      raise type(error)(
        f'{error}\nThe run in {workdir} has its text tower from there: put it '
        'back, or convert the image tower alone with --vision-only.'
      ) from error
    sizes = dataclasses.replace(sizes, text=anchor.model.config.text)
    for name in ('text', 'logit_scale'):
      params[name] = anchor.params[name]
    path = config.anchor.tokenizer
    path = path or anchor_lib.weights_path(config.anchor.weights)
    tokenizer = class_texts.tokenizer_folder(pathlib.Path(path))
  return _Checkpoint(
    sizes,
    params,
    step,
    mean=config.data.mean,
    std=config.data.std,
    labels=None
    if args.labels
    else _class_names(config.data.dataset, config.data.data_dir or None),
    tokenizer=tokenizer,
  )


def _class_names(dataset: str, data_dir: str | None) -> list[str]:
  """Return the names of the classes that a run has learnt."""
  from modelstock_jax import data

  try:
    return list(data.class_names(dataset, data_dir=data_dir))
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f'The names of the classes are those of the data set: {error}\nOr give '
      'them with --labels=FILE.'
    ) from error


def _from_checkpoint(
  args: argparse.Namespace, path: pathlib.Path
) -> _Checkpoint:
  """Read what `load_pretrained` reads, and what lies beside it."""
  from modelstock_jax import clip
  from modelstock_jax.clip import saving
  from modelstock_jax.training import class_texts

  model, params = clip.load_pretrained(
    args.source, image_size=args.image_size, allow_pickle=args.allow_pickle
  )
  sizes, labels = model.config, None
  folder = _folder(path)
  if folder and (folder / saving.HEAD).is_file():
    params['head'], labels = clip.load_head(folder)
    features = len(params['head']['kernel'])
    if features != sizes.embed_dim:
      raise ValueError(
        f'{folder / saving.HEAD} takes {features} features, the tower gives '
        f'{sizes.embed_dim}. Take away what does not belong to {path}.'
      )
  mean, std = pixels(path, folder, sizes.vision.channels)
  return _Checkpoint(
    sizes,
    params,
    _name(args, path),
    mean=mean,
    std=std,
    labels=labels,
    tokenizer=class_texts.tokenizer_folder(folder) if folder else None,
  )


def _as_asked(args: argparse.Namespace, checkpoint: _Checkpoint) -> _Checkpoint:
  """Apply the flags for labels, tokenizer and towers."""
  params = dict(checkpoint.params)
  if args.vision_only:
    for name in ('text', 'logit_scale'):
      params.pop(name, None)
    config = dataclasses.replace(checkpoint.config, text=None)
    checkpoint = checkpoint._replace(config=config, tokenizer=None)
  if args.tokenizer is not None:
    if 'text' not in params:
      raise ValueError(
        f'--tokenizer={args.tokenizer}: there is no text tower to read its '
        'tokens. Leave the flag out.'
      )
    checkpoint = checkpoint._replace(tokenizer=pathlib.Path(args.tokenizer))
  if args.labels is not None:
    if 'head' not in params:
      raise ValueError(
        f'--labels={args.labels}: {args.source} has no classification head. '
        'Leave the flag out.'
      )
    checkpoint = checkpoint._replace(labels=_read_labels(args.labels))
  return checkpoint._replace(params=params)


def _read_labels(path: str) -> list[str]:
  try:
    labels = text.read_json(path)
  except ValueError as error:
    raise ValueError(f'--labels={path} is not JSON: {error}') from error
  if not isinstance(labels, list) or not all(
    isinstance(label, str) for label in labels
  ):
    raise ValueError(f'--labels={path} must hold a JSON list of names.')
  return labels


def _folder(path: pathlib.Path) -> pathlib.Path | None:
  """Return the folder of a checkpoint; None for a lone file."""
  if path.is_dir():
    return path
  if path.name == 'clip.npy':  # as save_pretrained names it
    return path.parent
  if path.exists():
    return None
  from modelstock_jax.clip import loading

  return loading.local_path(path)


def pixels(
  path: pathlib.Path, folder: pathlib.Path | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Return mean and std of the pixels: of the checkpoint, or else OpenAI's.

  Args:
    path: of the checkpoint.
    folder: with what belongs to it, if there is one.
    channels: of the images.

  Raises:
    ValueError: they cannot be read, or are not those of such images.
  """
  from modelstock_jax.clip import saving

  try:
    stated = _stated_pixels(path, folder)
    mean = tuple(map(float, stated.get('mean') or saving.MEAN))
    std = tuple(map(float, stated.get('std') or saving.STD))
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{path}: the mean and std of pixels that it states cannot be read: '
      f'{error}'
    ) from error
  if not len(mean) == len(std) == channels:
    raise ValueError(
      f'{path}: mean {mean} and std {std} of pixels are not those of images '
      f'with {channels} channels. State them in preprocessor_config.json '
      '(image_mean, image_std) beside the weights.'
    )
  return mean, std


def _stated_pixels(
  path: pathlib.Path, folder: pathlib.Path | None
) -> dict[str, Any]:
  """Return 'mean' and 'std' as far as a checkpoint states them."""
  from modelstock_jax import clip

  if folder and (folder / 'preprocessor_config.json').is_file():
    stated = text.read_json(folder / 'preprocessor_config.json')
    return {name: stated.get(f'image_{name}') for name in ('mean', 'std')}
  if folder and (folder / 'open_clip_config.json').is_file():
    stated = text.read_json(folder / 'open_clip_config.json')
    return stated.get('preprocess_cfg') or {}
  if path.suffix == '.safetensors':  # as training.pretrain writes it
    return text.parse_json(clip.read_metadata(path).get('pixels', '{}'))
  return {}


def _name(args: argparse.Namespace, path: pathlib.Path) -> str:
  """Return a name of what was read, without the folders of a machine."""
  if not path.exists():
    name = f'`{path}` of the Hugging Face hub'
  else:
    kind = 'folder' if path.is_dir() else 'file'
    name = f'the {kind} `{path.resolve().name}`'
  if args.image_size is not None:
    name += f', read for images of {args.image_size} px'
  return name


def _how_to_load(args: argparse.Namespace, sizes: 'clip.CLIPConfig') -> str:
  if args.format == 'open_clip':
    return f"open_clip.create_model('local-dir:{args.target}')"
  if args.format == 'scenic':
    return (
      f"checkpoint_path='{args.target}/clip.npy' of load_model_vars in "
      "Scenic's CLIP project"
    )
  kind = 'CLIPModel' if sizes.text else 'CLIPVisionModelWithProjection'
  return f"transformers.{kind}.from_pretrained('{args.target}')"
