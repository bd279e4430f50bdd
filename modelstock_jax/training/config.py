"""The config of a run: the door that it comes in through.

A config file is a Python file with `get_config()`, which starts from
`defaults()`, an `ml_collections.ConfigDict`, and sets what differs. `validate`
makes a frozen `Config` of it; its keys are in `config_keys`.

A file may add a section, whose keys and values are not checked:

  with config.unlocked():
    config.car_ft = config_lib.section(weight=1.0)

and may define functions that take the place of `clip_task`'s, see `HOOKS`.
"""

import ast
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import importlib
import os
import pathlib
import re
import runpy
import sys
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

import ml_collections
import pydantic
import pydantic_core

from modelstock_jax.formats import text as text_lib
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import validation

# Functions that a config file may define; see `clip_task.prepare`.
HOOKS = ('get_task', 'get_optimizer', 'get_source', 'get_finish')

if TYPE_CHECKING:
  ConfigDict = Any  # the types of its values are not known statically
else:
  ConfigDict = ml_collections.ConfigDict


def _added_section(value: Any) -> ml_collections.FrozenConfigDict:
  if not isinstance(value, Mapping):
    raise pydantic_core.PydanticCustomError('extra_forbidden', 'unknown')
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
  return ml_collections.FrozenConfigDict(values)


class Config(config_keys.Section):
  """All keys of a run.

  Attributes:
    seed: of all random numbers
    hooks: functions that the config file defines, as text: see `HOOKS`. Set by
      `load`; nothing is ever imported from the config.json of a workdir
  """

  model_config = pydantic.ConfigDict(extra='allow')
  # pyrefly: ignore[bad-override]
  __pydantic_extra__: dict[
    str, Annotated[Any, pydantic.PlainValidator(_added_section)]
  ]

  seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] = 0
  hooks: tuple[str, ...] = ()
  model: config_keys.Model = config_keys.Model()
  anchor: config_keys.Anchor = config_keys.Anchor()
  data: config_keys.Data = config_keys.Data()
  augment: config_keys.Augment = config_keys.Augment()
  train: config_keys.Train = config_keys.Train()
  merge: config_keys.Merge = config_keys.Merge()
  mesh: config_keys.Mesh = config_keys.Mesh()
  checkpoint: config_keys.Checkpoint = config_keys.Checkpoint()
  evaluate: config_keys.Evaluate = config_keys.Evaluate()
  log: config_keys.Log = config_keys.Log()
  hosts: config_keys.Hosts = config_keys.Hosts()

  if TYPE_CHECKING:

    def __getattr__(self, name: str) -> Any: ...  # an added section

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'Config':
    stock, num_models = self.mesh.stock, self.merge.num_models
    problems = []
    if num_models == 1 and self.merge.strength != 1:
      problems.append(
        'merge.strength: must be 1.0 with merge.num_models=1, where nothing is '
        f'merged, got {self.merge.strength!r}.'
      )
    if stock not in ('auto', 1, num_models):
      problems.append(
        f'mesh.stock: must be 1 or merge.num_models ({num_models}), got '
        f'{stock}.'
      )
    if self.train.models == 'map' and stock not in ('auto', 1):
      problems.append(
        f"train.models: 'map' requires mesh.stock=1, got {stock}, which gives "
        'each model separate devices.'
      )
    if self.data.cache and self.augment.transform(1).random:
      problems.append(
        'data.cache: keeps decoded images, which augment.* changes in every '
        'epoch; turn one of them off.'
      )
    if problems:
      raise ValueError('\n  '.join(problems))
    return self

  def to_flags(self) -> list[str]:
    """Return the flags that turn the defaults into this config.

    Sections that the config file adds are left out: they require the file.

    >>> override(defaults(), ['--config.merge.every=2']).to_flags()
    ['--config.merge.every=2']
    """
    declared = self.model_dump(include={*Config.model_fields})
    lines = changes_lib.differences(Config(), declared)
    # A key has no colon, a value may.
    keys = [line.partition(': ')[0] for line in lines]
    values = [functools.reduce(getattr, key.split('.'), self) for key in keys]
    return [f'--config.{k}={v}' for k, v in zip(keys, values, strict=True)]

  def to_config_dict(self) -> ConfigDict:
    """Return a locked ConfigDict, whose types are checked by `validate`."""
    values = self.model_dump()
    for name in self.model_extra or ():  # whose values keep their types
      values[name] = section(**values[name].to_dict())
    return ml_collections.ConfigDict(values, type_safe=False).lock()


def defaults() -> ConfigDict:
  """Return all keys of a run with their default values, locked.

  Returns:
    A `ConfigDict` whose values are those of the paper's lineage where there
    is one (WiSE-FT's ViT-B/32 recipe: AdamW 3e-5, weight decay 0.1, batch
    512, 10 epochs, 500 warm-up steps).
  """
  return Config().to_config_dict()


def section(**values: Any) -> ConfigDict:
  """Return a section to add to a config."""
  return ml_collections.ConfigDict(values)


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
  """Read a config file, apply overrides and validate the result.

  Args:
    path: a Python file that defines `get_config()`, or the name of one that
      comes with the package: 'digits'. `FILE.py:NAME` calls
      `get_config('NAME')`.
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
) -> tuple[Config, dict[str, Callable[..., Any]]]:
  """Read a config file, and the functions of `HOOKS` that it defines.

  Args:
    path: as `load`. Like a script, the file may import those beside it.
    overrides: likewise.

  Returns:
    The frozen config, and keyword arguments of `clip_task.prepare`.

  Raises:
    ValueError: as `load`.
    FileNotFoundError: likewise.
  """
  if re.fullmatch(r'\w+(:\w+)?', str(path)) and not os.path.exists(path):
    path = bundled(*str(path).split(':'))
  file, *variant = re.split(r'(?<=[.]py):', str(path))
  path = pathlib.Path(file)
  if not path.is_file():
    raise FileNotFoundError(f'--config={path}: there is no such file.')
  _check_source(path)
  sys.path.insert(0, str(path.absolute().parent))
  try:
    names = runpy.run_path(str(path))
    if 'get_config' not in names:
      raise ValueError('there is no get_config().')
    config = names['get_config'](*variant)
    hooks = {name: names[name] for name in HOOKS if name in names}
    config.hooks = tuple(f'{path.stem}.{name}' for name in hooks)
    config = validate(config)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: {_text(error)}') from error
  finally:
    del sys.path[0]
  return override(config, overrides), hooks


def _check_source(path: pathlib.Path) -> None:
  """Raise ValueError for a file that is no config file, and run nothing."""
  try:
    source = path.read_bytes()
    ast.parse(source)
  except (SyntaxError, ValueError) as error:  # also of null bytes
    raise ValueError(f'--config={path}: is not Python: {error}.') from error
  if not re.search(rb'get_config|import \*', source):
    raise ValueError(
      f'--config={path}: there is no get_config() in it. Give the Python file '
      'of the config; the command of a run is in its run.json.'
    )


def bundled(name: str, *variant: str) -> str:
  """Return the path of a config of the package, with its variant.

  Raises:
    FileNotFoundError: there is no such config.
  """
  package: Any = importlib.import_module('modelstock_jax.configs')
  paths = {
    path.stem: path for path in pathlib.Path(package.__path__[0]).iterdir()
  }
  if name not in paths:
    names = sorted(each for each in paths if not each.startswith('_'))
    raise FileNotFoundError(
      f'--config={name}: there is no such file, and the package has none of '
      f'that name, but {", ".join(names)}.'
    )
  return ':'.join([str(paths[name]), *variant])


def check_task(
  hooks: Sequence[str], of: str, get_task: Callable[..., Any] | None
) -> None:
  """Check that the config file is given of a run that defines its task.

  Args:
    hooks: of the run's config.
    of: the flag that names the run, '--workdir=...'.
    get_task: of its config file; None if no file was given.

  Raises:
    ValueError: the config file defined a task, and none is given.
  """
  names = [name for name in hooks if name.endswith('.get_task')]
  if names and get_task is None:
    raise ValueError(
      f'{of}: the config file of the run defines its task, {names}. Give that '
      'file: --config=FILE.'
    )


def override(
  config: Config | ConfigDict, flag_values: Sequence[str] = ()
) -> Config:
  """Apply flags '--config.a.b=v' to a config and validate the result.

  >>> override(defaults(), ['--config.train.epochs=3']).train.epochs
  3

  Args:
    config: a valid config, which stays as it is.
    flag_values: flags as written on a command line.

  Raises:
    ValueError: for an unknown key (naming the nearest one), a value of the
      wrong type or out of range.
  """
  config = validate(config)
  values = config.to_config_dict()
  known = changes_lib.flatten(values)
  for flag in flag_values:
    key, assigned, text = flag.removeprefix('--config.').partition('=')
    if key not in known:
      near = text_lib.nearest(key, known)
      raise ValueError(
        f'{text_lib.plain(flag)}: there is no such key; the nearest one is '
        f'--config.{near} (now {known[near]!r}).'
      )
    if not assigned:
      raise ValueError(f'{flag}: has no value. Set it with {flag}=VALUE.')
    # Sections that the file adds have types of their own.
    with text_lib.explained(f'{flag}: ', kinds=TypeError):
      values.update_from_flattened_dict({key: _parse(text, known[key])})
  return validate(values)


def _parse(text: str, old: Any) -> Any:
  """Return the value that a flag gives to a key; a text if it is no literal."""
  if isinstance(old, str):
    return text
  try:
    return ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return text


def validate(config: Config | ConfigDict) -> Config:
  """Check types and ranges of all values.

  Args:
    config: a `ConfigDict` that started from `defaults`; keys that it lacks have
      their default values.

  Returns:
    The frozen config.

  Raises:
    ValueError: lists every problem, with the key, its value and what it may be.
  """
  if isinstance(config, Config):
    return config
  return validation.parse(Config, config)


def from_json(
  path: str | pathlib.Path, *, allow_pickle: bool = False
) -> Config:
  """Read the config.json of a workdir.

  Args:
    path: of the file.
    allow_pickle: `anchor.allow_pickle` of the result. Whoever wrote the workdir
      does not decide what this user trusts: that of the file is not taken.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is not valid; of a config of another version, lists the
      keys that are gone or new.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: there is no such file; is this the workdir of a run?'
    )
  with text_lib.explained(f'{path}: ', '.'):
    values = text_lib.read_json(path)
  try:
    config = Config.model_validate_json(path.read_bytes())
  except pydantic.ValidationError as error:
    message = validation.problems(error, Config)
    if any(e['type'] == 'extra_forbidden' for e in error.errors()):
      old = changes_lib.flatten(values)
      new = [key for key in changes_lib.flatten(Config()) if key not in old]
      message += (
        '\nAnother version has written it. Keys that are new: '
        f'{text_lib.listed(new)}.'
      )
    raise ValueError(f'{path}: {message}') from error
  anchor = config.anchor.model_copy(update={'allow_pickle': allow_pickle})
  return config.model_copy(update={'anchor': anchor})


def _text(error: Exception) -> str:
  """Return the message of an error; of an unknown key, the nearest one."""
  wrapped = error.args[0] if isinstance(error, AttributeError) else error
  if not isinstance(wrapped, KeyError):
    return str(error)
  [key, *_] = re.findall(r'\w+', str(wrapped.args[0]).removeprefix('Key'))
  known = [*Config.model_fields, *changes_lib.flatten(Config())]
  near = text_lib.nearest(key, known)
  return f'{key}: no such key; the nearest is {near}.'
