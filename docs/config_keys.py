"""Writes docs/config_keys.md, the page of all keys of a config.

Run `python docs/config_keys.py` after a change of `training/config_keys.py`.
"""

import inspect
import pathlib
import re

from modelstock_jax.training import config
from modelstock_jax.training import config_keys

PAGE = pathlib.Path(__file__).with_suffix('.md')

_HEAD = """# Keys of a config

A config file defines `get_config()`, which starts from
`training.defaults()` and sets what differs. Every key is a flag of
`modelstock train`, `plan` and `demo` as well: `--config.train.epochs=3`. A key
that does not exist, or a value out of range, is an error that lists all of the
problems. A file may add a section of its own, which is not checked, with
`training.config.section`.

A config file is a Python program, and the commands run it. Only use one that
you wrote or have read. The `config.json` of a workdir is data: no command runs
or imports anything because of it.
"""


def page() -> str:
  """Return the text of the page."""
  return _HEAD + '\n'.join(_section(config.Config, '')).rstrip() + '\n'


def _section(kind: type[config_keys.Section], prefix: str) -> list[str]:
  """Return the lines of a section and of those in it."""
  doc = inspect.getdoc(kind) or ''
  about, _, attributes = doc.partition('\n\nAttributes:\n')
  texts = dict(re.findall(r'(?ms)^  (\w+): (.*?)(?=^  \w|\Z)', attributes))
  schemas = kind.model_json_schema()['properties']
  lines = [f'## {prefix[:-1]}'] if prefix else []
  lines += [
    '',
    about,
    '',
    '| key | values | default | description |',
    '|---|---|---|---|',
  ]
  sections = []
  for name, field in kind.model_fields.items():
    if isinstance(field.default, config_keys.Section):
      sections += ['', *_section(type(field.default), f'{prefix}{name}.')]
      continue
    text = ' '.join(texts[name].split())
    cells = (
      f'`{prefix}{name}`',
      _values(schemas[name]),
      f'`{field.default!r}`',
      text,
    )
    lines.append(f'| {" | ".join(cells)} |')
  return lines + sections


def _values(schema: dict) -> str:
  """Return the type of a key and its range, or its choices."""
  if 'enum' in schema:
    return ', '.join(f"`'{choice}'`" for choice in schema['enum'])
  if 'anyOf' in schema:
    return _values(schema['anyOf'][0])
  if schema.get('type') == 'array':
    return f'tuple of {_values(schema["items"])}'
  names = {
    'integer': 'int',
    'number': 'float',
    'string': 'str',
    'boolean': 'bool',
  }
  kind = schema.get('type', 'str or int')
  words = [names.get(kind, kind)]
  if {'minimum', 'maximum'} <= schema.keys():
    words = [f'{words[0]}, {schema["minimum"]} to {schema["maximum"]}']
  elif 'minimum' in schema:
    words.append(f'>= {schema["minimum"]}')
  if 'exclusiveMaximum' in schema:
    words.append(f'< {schema["exclusiveMaximum"]}')
  return ' '.join(words)


if __name__ == '__main__':
  PAGE.write_text(page(), encoding='utf-8')
