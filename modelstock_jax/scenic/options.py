"""The block `config.model_stock` of a Scenic config."""

from collections.abc import Iterator
import difflib
from typing import Any
from typing import NamedTuple

import ml_collections

from modelstock_jax.merging import options as merge_options

_CHOICES = {
  'opt_state': ('keep', 'average', 'reset'),
  'layers': ('leaf', 'qkv'),
  'unit': tuple(u for u in merge_options.UNITS if u != 'filter'),
  'average': merge_options.AVERAGES,
}


def defaults() -> ml_collections.ConfigDict:
  """The block with all its keys, each explained.

  >>> config = defaults()
  >>> config.num_models, config.merge_every
  (2, 'epoch')
  """
  block = ml_collections.ConfigDict()
  # Models trained side by side, each on `config.batch_size` examples a step.
  block.num_models = 2
  # When they are merged and go on from the merge: 'epoch', 'end' (once), or
  # every so many epochs.
  block.merge_every = 'epoch'
  # What becomes of their optimizers at a merge: 'keep' each model's moments,
  # 'average' them, or 'reset'. The schedule goes on.
  block.opt_state = 'keep'
  # Leaves that share a cosine: each 'leaf' its own; or query, key and value
  # together ('qkv'), which are one tensor in the paper's PyTorch models.
  block.layers = 'leaf'
  # See `modelstock_jax.model_stock`.
  block.unit = 'layer'
  block.average = 'cosine'
  block.clip = True
  block.strength = 1.0
  # Devices along the models: 1, and all devices advance all models; or
  # num_models, and each model has devices of its own.
  block.mesh_stock = 1
  # Whether a run that is resumed reads over the batches that it has trained
  # on, to end where it would have without the interruption. If False, it
  # starts the data again, as Scenic's trainers do.
  block.replay_data = True
  # What all models start from, and are measured from.
  block.anchor = ml_collections.ConfigDict()
  # A Scenic checkpoint or workdir, an AugReg .npz, or what
  # `modelstock_jax.clip.load_pretrained` reads. '' is the initialisation.
  block.anchor.path = ''
  # The classification head: of the 'checkpoint', of the 'init'ialisation, by
  # CLIP's text tower ('zero_shot'), or a .npz or .safetensors file with
  # 'kernel' [D, K] and 'bias' [K].
  block.anchor.head = 'checkpoint'
  # JSON with 'names' of classes and 'templates', for 'zero_shot'.
  block.anchor.prompts = ''
  # Folder of CLIP's tokenizer, for 'zero_shot'; '' is OpenAI's vocabulary.
  block.anchor.tokenizer = ''
  # Trust a .npy of Scenic's CLIP: a pickle, which can run any code.
  block.anchor.allow_pickle = False
  return block


# Of Scenic's other trainers; left unsaid, these would be ignored.
_UNSUPPORTED = {
  'init_from': 'set config.model_stock.anchor',
  'accum_steps': 'use a smaller config.batch_size',
  'num_grad_accum_steps': 'use a smaller config.batch_size',
  'optax': 'set config.optimizer and config.optimizer_configs',
  'schedule': 'set config.lr_configs',
  'fewshot': 'evaluate the merged checkpoint with it',
}


class Anchor(NamedTuple):
  """`config.model_stock.anchor`, see `defaults`."""

  path: str
  head: str
  prompts: str
  tokenizer: str
  allow_pickle: bool


class Options(NamedTuple):
  """`config.model_stock`, see `defaults`."""

  num_models: int
  merge_every: str | int
  opt_state: str
  layers: str
  stock: merge_options.StockOptions
  strength: float
  mesh_stock: int
  replay_data: bool
  anchor: Anchor


def read(config: ml_collections.ConfigDict) -> Options:
  """The options of a Scenic config, those that it does not set by default.

  Args:
    config: of a Scenic run; of it only 'model_stock' is read, if there.

  Raises:
    ValueError: unknown keys or values; all of them at once.

  >>> import ml_collections
  >>> read(ml_collections.ConfigDict({'model_stock': {'merge_every': 2}}))[:2]
  (2, 2)
  """
  block = config.get('model_stock', ml_collections.ConfigDict())
  problems: list[str] = []
  values = _filled(defaults(), block, 'model_stock', problems)
  if not problems:
    problems += _problems(values)
  if problems:
    raise ValueError('config:\n' + '\n'.join(f'  {p}' for p in problems))
  values['anchor'] = Anchor(**values['anchor'])
  values['stock'] = merge_options.StockOptions(
    *(values.pop(key) for key in ('unit', 'average', 'clip'))
  )
  if values['merge_every'] not in ('epoch', 'end'):
    values['merge_every'] = int(values['merge_every'])
  return Options(**values)


def merge_interval(
  options: Options, steps_per_epoch: int | None, total_steps: int
) -> int:
  """Steps between merges; `total_steps` if there is one, at the end.

  Raises:
    ValueError: merging by epochs where the length of an epoch is not known.
  """
  if options.merge_every == 'end':
    return total_steps
  if not steps_per_epoch:
    raise ValueError(
      f'config.model_stock.merge_every is {options.merge_every!r}, in epochs, '
      "but the dataset's meta_data has no 'num_train_examples' (or fewer than "
      "a batch): set it there, or merge_every='end'."
    )
  epochs = 1 if options.merge_every == 'epoch' else int(options.merge_every)
  return steps_per_epoch * epochs


def _filled(
  known: ml_collections.ConfigDict,
  block: Any,
  name: str,
  problems: list[str],
) -> dict[str, Any]:
  """Values of a block by key; what is wrong with it goes to `problems`."""
  values: dict[str, Any] = {}
  if not hasattr(block, 'items'):
    problems.append(f'{name}: must be a block of keys, got {block!r}.')
    return values
  given = dict(block.items())
  for key in given.keys() - set(known):
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)[0]
    problems.append(f'{name}.{key}: no such key; the nearest is {near}.')
  for key, default in known.items():
    value = given.get(key, default)
    path = f'{name}.{key}'
    if isinstance(default, ml_collections.ConfigDict):
      values[key] = _filled(default, value, path, problems)
    elif not _same_type(key, value, default):
      kind = type(default).__name__
      problems.append(f'{path}: must be a {kind}, got {value!r}.')
    else:
      values[key] = value
  return values


def _problems(values: dict[str, Any]) -> Iterator[str]:
  for key, choices in _CHOICES.items():
    if values[key] not in choices:
      yield (
        f'model_stock.{key}: must be one of {choices}, got {values[key]!r}.'
      )
  number, every = values['num_models'], values['merge_every']
  if number < 2:
    yield (
      f'model_stock.num_models: must be 2 or more, got {number}; one model '
      "trains with Scenic's own classification_trainer."
    )
  # A flag, --config.model_stock.merge_every=2, is text.
  whole = str(every).isdigit() and int(every) >= 1
  if every not in ('epoch', 'end') and not whole:
    yield (
      "model_stock.merge_every: must be 'epoch', 'end' or a number of epochs, "
      f'got {every!r}.'
    )
  if values['mesh_stock'] not in (1, number):
    yield (
      f'model_stock.mesh_stock: must be 1 or num_models ({number}), got '
      f'{values["mesh_stock"]}.'
    )
  if values['strength'] < 0:
    yield (
      f'model_stock.strength: must be 0 or more, got {values["strength"]}.'
    )
  anchor = values['anchor']
  zero_shot = anchor['head'] == 'zero_shot'
  if zero_shot and not anchor['prompts']:
    yield (
      "model_stock.anchor.prompts: must name a JSON file with 'names' and "
      "'templates' where the head is 'zero_shot'."
    )
  if not anchor['path'] and anchor['head'] != 'checkpoint':
    yield (
      f'model_stock.anchor.head: {anchor["head"]!r} takes model_stock.anchor.'
      'path, which is not set.'
    )
  for key in ('prompts', 'tokenizer'):
    if anchor[key] and not zero_shot:
      yield (
        f"model_stock.anchor.{key}: is for head='zero_shot', and the head is "
        f'{anchor["head"]!r}.'
      )


def _same_type(key: str, value: Any, default: Any) -> bool:
  if isinstance(value, bool) or isinstance(default, bool):
    return type(value) is type(default)
  if key == 'merge_every':
    return isinstance(value, (str, int))
  if isinstance(default, float):
    return isinstance(value, (int, float))
  return isinstance(value, type(default))


def check(config: Any) -> None:
  """Raise for what other trainers of Scenic do, and this one does not.

  Args:
    config: of the run.

  Raises:
    ValueError: lists every key that does not fit.
  """
  problems = [
    f'config.{key}: is not supported here; {remedy}.'
    for key, remedy in _UNSUPPORTED.items()
    if config.get(key)
  ]
  if bool(config.get('num_training_steps')) == bool(
    config.get('num_training_epochs')
  ):
    problems.append(
      'config: set one of num_training_epochs and num_training_steps, got '
      f'{config.get("num_training_epochs")!r} and '
      f'{config.get("num_training_steps")!r}.'
    )
  if problems:
    raise ValueError('\n'.join(problems))
