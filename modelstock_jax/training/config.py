"""The configuration of a run: its keys, and the door it comes in through.

A config file is a Python file with `get_config()`, which starts from
`defaults()` and sets what differs. Keys and types are fixed here, so a
misspelt key or a value of the wrong type is an error where it is written.

A file may add a section of its own, whose keys and values are not checked:

  with config.unlocked():
    config.car_ft = config_lib.section(weight=1.0)

and may define functions that take the place of `clip_task`'s, see `HOOKS`.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import importlib.util
import json
import pathlib
import re
import sys
from typing import TYPE_CHECKING
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_dict
from ml_collections import config_flags

from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config_checks as checks

# Functions that a config file may define; see `clip_task.prepare`.
HOOKS = ('get_task', 'get_optimizer', 'get_source', 'get_finish')

if TYPE_CHECKING:
  ConfigDict = Any  # values have types of their own, which it cannot tell
else:
  ConfigDict = ml_collections.ConfigDict


_DEFAULTS = dict(
  seed=0,
  # Functions that the config file defines, as text: see `HOOKS`. Set by
  # `load`; nothing is ever imported from the config.json of a workdir.
  hooks=(),
  # The network (see clip.CLIPConfig).
  model=dict(
    embed_dim=512,
    image=dict(
      image_size=224,
      patch_size=32,
      channels=3,
      width=768,
      depth=12,
      heads=12,
    ),
    text=dict(
      context_length=77, vocab_size=49408, width=512, depth=12, heads=8
    ),
    activation='quick_gelu',  # or 'gelu'
    dtype='bfloat16',  # of computation; weights are float32
  ),
  anchor=dict(
    # What clip.load_pretrained takes: a file, a folder or an id of the
    # Hugging Face hub; or the name of one that ships.
    weights='',
    head='zero_shot',  # or 'linear_probe'
    # CLIP's names and 80 templates; or the path of a JSON file, see
    # clip.prompts.read_prompts; or 'characters': captions of 0-9, A-Z.
    prompts='imagenet',
    # Folder or file; '' is beside the weights, else OpenAI's.
    tokenizer='',
    allow_pickle=False,  # trust a pickle, which can run any code
  ),
  data=dict(
    dataset='',  # TFDS name
    data_dir='',  # '' is what ships with the package
    train='train',  # TFDS split
    validation='validation',
    cache=False,  # decode a small training set into memory
    # Training examples that cannot be read: others take their places, and
    # more than these are an error.
    max_bad_examples=10,
    mean=(0.48145466, 0.4578275, 0.40821073),  # of CLIP, pixels in 0..1
    std=(0.26862954, 0.26130258, 0.27577711),
  ),
  # Of training images, see data.Augment. As it stands it is CLIP's own
  # transform, without anything random.
  augment=dict(
    crop_scale=(1.0, 1.0),  # shares of the area, such as (0.08, 1.0)
    crop_ratio=(3 / 4, 4 / 3),  # width / height
    flip=0.0,  # how often, 0..1
    color_jitter=0.0,
    randaugment_count=0,  # operations on an image
    randaugment_magnitude=0.0,  # 0..30
  ),
  train=dict(
    epochs=10,
    batch_size=512,  # examples of each model in a step
    learning_rate=3e-5,  # peak of warm-up and cosine
    warmup_steps=500,
    weight_decay=0.1,  # on every tensor
    clip_norm=1.0,  # of each model's gradient; 0 is off
    label_smoothing=0.0,
    mixup=0.0,  # alpha of the Beta distribution; 0 is off
    # Less memory, more time, the same result up to rounding:
    accumulate=1,  # parts of a batch, one after the other
    remat='none',  # compute again: each 'block', or all but its 'dots'
    models='side_by_side',  # or 'in_turn', for which mesh.stock is 1
  ),
  merge=dict(
    num_models=2,  # 1 is plain fine-tuning: its merge is itself
    anchor='pretrained',  # or 'last_merge'
    opt_state='keep',  # or 'average', 'reset'
    unit='layer',  # or 'filter', 'model'
    average='cosine',  # or 'angle'
    clip=True,
    strength=1.0,
  ),
  mesh=dict(
    stock=1,  # devices along the stack: 1 or merge.num_models
    # Weights and moments of so many elements or more are split over the
    # devices of a model (FSDP), 65536 for instance; 0 is off.
    fsdp_min_size=0,
  ),
  checkpoint=dict(
    every_merges=1,  # the last merge is always saved
    every_steps=1000,  # besides; 0 is off
  ),
  evaluate=dict(
    batch_size=512,
    every_epochs=1,  # on the validation split
    benchmarks=(),  # names, see data.BENCHMARKS
  ),
  log=dict(every_steps=50),
  # Of several processes, see `hosts.start`.
  hosts=dict(
    initialization_seconds=300,  # to wait for all processes
    heartbeat_seconds=100,  # silence after which a process counts as lost
    shutdown_seconds=60,  # that a process which ends waits for the others
  ),
  # Contrastive pretraining of an anchor, for those who have none.
  pretrain=dict(
    steps=1000,
    batch_size=256,
    learning_rate=1e-3,
    warmup_steps=100,
    weight_decay=0.1,
    seed=0,
  ),
)


def defaults() -> ConfigDict:
  """Return all keys of a run with their default values, locked.

  Returns:
    A `ConfigDict` whose values are those of the paper's lineage where there
    is one (WiSE-FT's ViT-B/32 recipe: AdamW 3e-5, weight decay 0.1, batch
    512, 10 epochs, 500 warm-up steps).
  """
  config: ConfigDict = ml_collections.ConfigDict(_DEFAULTS)
  # 'epoch', 'end' or a number of epochs: a value of any type.
  config.merge.every = config_dict.placeholder(object)
  config.merge.every = 'epoch'
  return config.lock()


def section(**values: Any) -> ConfigDict:
  """Return a section to add to a config."""
  return ml_collections.ConfigDict(values)


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> ConfigDict:
  """Read a config file, apply overrides and validate the result.

  Args:
    path: a Python file that defines `get_config()`.
    overrides: flags as written on a command line, '--config.train.epochs=3'.

  Returns:
    The frozen config.

  Raises:
    ValueError: for an unknown key (naming the nearest one), a value of the
      wrong type or out of range.
    FileNotFoundError: if there is no such file.
  """
  return load_with_hooks(path, overrides)[0]


def load_with_hooks(
  path: str | pathlib.Path,
  overrides: Sequence[str] = (),
  sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[ConfigDict, dict[str, Callable[..., Any]]]:
  """Read a config file, and the functions of `HOOKS` that it defines.

  Args:
    path: as `load`. Like a script, the file may import those beside it.
    overrides: likewise.
    sections: added where the config does not have them.

  Returns:
    The frozen config, and keyword arguments of `clip_task.prepare`.

  Raises:
    ValueError: as `load`.
    FileNotFoundError: likewise.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'--config={path}: there is no such file.')
  spec = importlib.util.spec_from_file_location('modelstock_config', path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    sys.path.insert(0, str(path.absolute().parent))
    try:
      spec.loader.exec_module(module)
    finally:
      del sys.path[0]
    config = module.get_config()
    with config.unlocked():
      for name, values in (sections or {}).items():
        if name not in config:
          config[name] = section(**values)
    hooks = {name: getattr(module, name, None) for name in HOOKS}
    hooks = {name: hook for name, hook in hooks.items() if hook is not None}
    config.hooks = tuple(f'{path.stem}.{name}' for name in hooks)
  except (AttributeError, KeyError, TypeError) as error:
    # ConfigDict's own message names the nearest key.
    raise ValueError(f'{path}: {_text(error)}') from error
  return validate(override(config, overrides)), hooks


def check_task(
  config: ConfigDict, of: str, get_task: Callable[..., Any] | None
) -> None:
  """Check that the task of a run is at hand, if it is one of its own.

  Args:
    config: of the run.
    of: what the run was asked for by, '--workdir=...'.
    get_task: of its config file; None if no file was given.

  Raises:
    ValueError: the config's file defines a task, and none is given.
  """
  names = [name for name in config.hooks if name.endswith('.get_task')]
  if names and get_task is None:
    raise ValueError(
      f'{of}: the run trained a task of its own, {names}. Give the file that '
      'defines it: --config=FILE.'
    )


def override(config: ConfigDict, flag_values: Sequence[str]) -> ConfigDict:
  """Applies '--config.a.b=v' flags to a copy of a config.

  >>> override(defaults(), ['--config.train.epochs=3']).train.epochs
  3
  """
  config = _copy(config)
  parsed = flags.FlagValues()
  known = dict(changes_lib.flatten(config))
  for flag in flag_values:
    key = flag.partition('=')[0].removeprefix('--config.')
    if key not in known:
      near = checks.nearest(key, known)
      raise ValueError(
        f'{flag}: there is no such key; the nearest one is --config.{near} '
        f'(now {known[near]!r}).'
      )
    if '=' not in flag:
      raise ValueError(f'{flag}: a value is missing, write --config.{key}=...')
  arguments = ['modelstock', *flag_values]
  try:
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=parsed, sys_argv=arguments
    )
    parsed(arguments)
  except (TypeError, ValueError, flags.Error) as error:
    raise ValueError(f'{" ".join(flag_values)}: {_text(error)}') from error
  if str(config.merge.every).isdecimal():  # a flag brings it as text
    config.merge.every = int(config.merge.every)
  return config


def validate(config: ConfigDict) -> ConfigDict:
  """Checks types and ranges of all values; returns the config, frozen.

  Raises:
    ValueError: listing every problem, with the key, its value and what it
      may be.
  """
  problems = list(checks.problems(config, defaults()))
  if problems:
    raise ValueError('The config is not valid:\n  ' + '\n  '.join(problems))
  return ml_collections.FrozenConfigDict(config)


def to_json(config: ConfigDict) -> str:
  """A config as JSON text, one key a line."""
  return json.dumps(to_dict(config), indent=2, sort_keys=True)


def to_dict(config: ConfigDict) -> dict[str, Any]:
  """A config as the dict of its JSON: tuples are lists."""
  return json.loads(config.to_json())


def from_json(path: str | pathlib.Path) -> ConfigDict:
  """Reads the config.json of a workdir.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is not valid.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: there is no such file; is this the workdir of a run?'
    )
  config = defaults()
  text = path.read_text(encoding='utf-8')
  try:
    values = json.loads(text, object_hook=_tuples)
    with config.unlocked():  # sections of the config file's own
      for key in values.keys() - config.keys():
        if isinstance(values[key], dict):
          config[key] = section(**values[key])
    config.update(values)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: {_text(error)}') from error
  return validate(config)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
  """JSON has no tuples, a config no lists."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _copy(config: ConfigDict) -> ConfigDict:
  """A locked copy that shares nothing, of a config that may be frozen."""
  values = config.to_dict()
  merge = values.get('merge', {})
  every = merge.get('every')
  if 'every' in merge:  # of any type
    merge['every'] = config_dict.placeholder(object)
  copy = ml_collections.ConfigDict(values)
  if 'every' in merge:
    copy.merge.every = every
  return copy.lock()


def _text(error: Exception) -> str:
  """The message of a ConfigDict, with the nearest key if it is about one."""
  cause = error.args[0] if error.args else error
  if isinstance(cause, Exception) and cause is not error:
    return _text(cause)
  text = re.sub(' Other fields present: ".*"', '', str(cause))
  unknown = re.search(r'Key "(\w+)" does not exist', text)
  if unknown and 'Did you mean' not in text:
    keys = {
      key.rpartition('.')[2]: key for key, _ in changes_lib.flatten(defaults())
    }
    near = checks.nearest(unknown[1], keys)
    text += f' The nearest key is {keys[near]}.'
  return text
