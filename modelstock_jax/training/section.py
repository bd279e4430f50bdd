"""The base of the sections of a config, and of numbers that may be words."""

import json
from typing import Any
from typing import Self

import pydantic


class Section(pydantic.BaseModel):
  """Keys of a config with their types, ranges and defaults; frozen."""

  model_config = pydantic.ConfigDict(
    frozen=True, extra='forbid', strict=True, allow_inf_nan=False
  )

  def to_json(self) -> str:
    """Return the values as JSON text, one key a line."""
    values = self.model_dump()
    return json.dumps(values, default=dict, indent=2, sort_keys=True)

  def to_dict(self) -> dict[str, Any]:
    """Return the values as JSON has them: tuples are lists."""
    return json.loads(self.to_json())

  def settle(self, **values: Any) -> Self:
    """Return the section with these values where it has 'auto'."""
    update = {k: v for k, v in values.items() if getattr(self, k) == 'auto'}
    return self.model_copy(update=update)


def number_or(*words: str, of: str, least: int = 1) -> pydantic.PlainValidator:
  """Return the check of a number that may be one of some words instead.

  Args:
    words: that are accepted.
    of: what is counted, for the error.
    least: the least number.
  """

  def check(value: Any) -> str | int:
    if isinstance(value, str) and value.isdecimal():  # as a flag has it
      value = int(value)
    if value in words or (type(value) is int and least <= value < 2**31):
      return value
    choices = ', '.join(map(repr, words))
    raise ValueError(f'must be {choices} or a number of {of} >= {least}')

  return pydantic.PlainValidator(check)
