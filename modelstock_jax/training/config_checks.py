"""What the values of a config may be: types, ranges and combinations."""

from collections.abc import Iterable
from collections.abc import Iterator
import difflib
from typing import Any

from modelstock_jax import data
from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import network
from modelstock_jax.merging import options as merge_options
from modelstock_jax.training import changes as changes_lib


def problems(config: Any, defaults: Any) -> Iterator[str]:
  """Yield every problem of a config, with the key, its value and the remedy.

  Args:
    config: a `ConfigDict`; sections that `defaults` do not have are skipped.
    defaults: all known keys, with values of the right types.
  """
  known = dict(changes_lib.flatten(defaults))
  sections = {key.partition('.')[0] for key in known}
  values = {
    key: value
    for key, value in changes_lib.flatten(config)
    if '.' not in key or key.partition('.')[0] in sections
  }
  for key in values.keys() - known.keys():
    near = nearest(key, known)
    yield f'{key}: there is no such key; the nearest one is {near}.'
  for key in known.keys() - values.keys():
    yield f'{key}: missing; start from training.config.defaults().'
  if known.keys() != values.keys():
    return
  for key, default in known.items():
    if key != 'merge.every' and not _same_type(values[key], default):
      yield (
        f'{key}: must be of type {type(default).__name__}, got {values[key]!r}.'
      )
  yield from _problems_of_sizes(values)
  yield from _problems_of_augmentation(values)
  every = values['merge.every']
  is_count = isinstance(every, int) and not isinstance(every, bool)
  if every not in ('epoch', 'end') and not (is_count and every >= 1):
    yield (
      "merge.every: must be 'epoch', 'end' or a number of epochs >= 1, "
      f'got {every!r}.'
    )
  for key, choices in _CHOICES.items():
    if values[key] not in choices:
      yield f'{key}: must be one of {choices}, got {values[key]!r}.'
  for key, least in _AT_LEAST.items():
    if isinstance(values[key], (int, float)) and not values[key] >= least:
      yield f'{key}: must be at least {least}, got {values[key]!r}.'
  if isinstance(values['seed'], int) and values['seed'] >= 2**32:
    yield f'seed: must be below 2**32, got {values["seed"]!r}.'
  if values['merge.num_models'] == 1 and values['merge.strength'] != 1:
    yield (
      'merge.strength: must be 1.0 with merge.num_models=1, where nothing is '
      f'merged, got {values["merge.strength"]!r}.'
    )
  stock, num_models = values['mesh.stock'], values['merge.num_models']
  if stock not in (1, num_models):
    yield (
      f'mesh.stock: must be 1 or merge.num_models ({num_models}), '
      f'got {stock!r}.'
    )
  if values['train.models'] == 'in_turn' and stock != 1:
    yield (
      f"train.models: 'in_turn' needs mesh.stock=1, got {stock!r}, which gives "
      'each model devices of its own.'
    )


def _problems_of_sizes(values: dict[str, Any]) -> Iterator[str]:
  """Towers that cannot be, where all of their sizes are whole numbers."""
  towers = {
    'model.image.': clip_config.VisionConfig,
    'model.text.': clip_config.TextConfig,
  }
  for prefix, tower in towers.items():
    sizes = {
      key.removeprefix(prefix): value
      for key, value in values.items()
      if key.startswith(prefix)
    }
    if all(type(size) is int for size in sizes.values()):
      try:
        tower(**sizes)
      except ValueError as error:
        yield f'{prefix}*: {error}'


def _problems_of_augmentation(values: dict[str, Any]) -> Iterator[str]:
  """Values that cannot be, and two keys that exclude each other."""
  settings = {
    key.removeprefix('augment.'): value
    for key, value in values.items()
    if key.startswith('augment.')
  }
  try:
    transform = data.Augment(1, **settings)
  except ValueError as error:
    yield f'augment.*: {error}'
  except TypeError:  # of the wrong type, which has been said
    pass
  else:
    if transform.random and values['data.cache']:
      yield (
        'data.cache: keeps images as they are once decoded, augment.* draws '
        'them anew each time; turn one of them off.'
      )


_CHOICES = {
  'model.activation': clip_config.ACTIVATIONS,
  'model.dtype': ('bfloat16', 'float16', 'float32'),
  'anchor.head': ('zero_shot', 'linear_probe'),
  'train.models': ('side_by_side', 'in_turn'),
  'train.remat': tuple(network.REMAT),
  'merge.anchor': ('pretrained', 'last_merge'),
  'merge.opt_state': ('keep', 'average', 'reset'),
  'merge.unit': merge_options.UNITS,
  'merge.average': merge_options.AVERAGES,
}

_AT_LEAST = {
  'seed': 0,
  'model.embed_dim': 1,
  'data.max_bad_examples': 0,
  'train.epochs': 1,
  'train.batch_size': 1,
  'train.learning_rate': 0.0,
  'train.warmup_steps': 0,
  'train.weight_decay': 0.0,
  'train.clip_norm': 0.0,
  'train.label_smoothing': 0.0,
  'train.mixup': 0.0,
  'train.accumulate': 1,
  'mesh.fsdp_min_size': 0,
  'merge.num_models': 1,
  'merge.strength': 0.0,
  'checkpoint.every_steps': 0,
  'checkpoint.every_merges': 1,
  'evaluate.batch_size': 1,
  'evaluate.every_epochs': 1,
  'log.every_steps': 1,
  'hosts.initialization_seconds': 1,
  'hosts.heartbeat_seconds': 1,
  'hosts.shutdown_seconds': 1,
}


def _same_type(value: Any, default: Any) -> bool:
  if isinstance(default, float):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  return type(value) is type(default)


def nearest(key: str, known: Iterable[str]) -> str:
  """Return the known key that is spelt most like this one."""
  return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
