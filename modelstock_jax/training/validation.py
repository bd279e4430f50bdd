"""Problems that pydantic finds in a config, as lines with key and value."""

from typing import Any

import pydantic

from modelstock_jax.formats import text as text_lib
from modelstock_jax.training import changes

_MAX_LINES = 20


def problems(
  error: pydantic.ValidationError,
  kind: type[pydantic.BaseModel],
  prefix: str = '',
) -> str:
  """Return what is wrong with a config, a line for each problem.

  Args:
    error: of the validation of `kind`. A check that raises a ValueError may
      begin its message with a key; else its own key goes before it.
    kind: the type of the config.
    prefix: of all keys.
  """
  fields = dict.fromkeys(kind.model_fields)  # some have no default
  fields |= kind.model_construct().model_dump()
  known = [prefix + key for key in changes.flatten(fields)]
  return 'The config is not valid:\n  ' + '\n  '.join(
    _line(problem, prefix, known) for problem in error.errors()[:_MAX_LINES]
  )


def parse(kind: type[pydantic.BaseModel], block: Any, prefix: str = '') -> Any:
  """Check a block of a config.

  Args:
    kind: of the block.
    block: keys and values; what it does not set has its default.
    prefix: of its keys, for errors.

  Raises:
    ValueError: keys are unknown or values invalid; lists all of them.
  """
  values = block.to_dict() if hasattr(block, 'to_dict') else block
  try:
    return kind.model_validate(values)
  except pydantic.ValidationError as error:
    raise ValueError(problems(error, kind, prefix)) from error


def _line(problem: Any, prefix: str, known: list[str]) -> str:
  path = text_lib.plain('.'.join(map(str, problem['loc'])))
  key = (prefix + path).rstrip('.') or 'config'
  if problem['type'] == 'extra_forbidden':
    return f'{key}: no such key; the nearest is {text_lib.nearest(key, known)}.'
  message = problem['msg'].removeprefix('Value error, ')
  if problem['type'] == 'value_error' and message.startswith((path, key)):
    return message
  for theirs, ours in (
    ('Input should be', 'must be'),
    ('greater than or equal to', 'at least'),
    ('less than', 'below'),
  ):
    message = message.replace(theirs, ours)
  return f'{key}: {message}, got {text_lib.shown(problem["input"])}.'
