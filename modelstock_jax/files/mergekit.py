"""The recipes of mergekit, of its method `model_stock`."""

from collections.abc import Mapping
import pathlib
from typing import Any

from modelstock_jax.formats import text
from modelstock_jax.merging import options as options_lib

# The keys that a recipe may have; the last ones change nothing here.
_KEYS = {'merge_method', 'base_model', 'models', 'parameters', 'dtype'}
_KEYS |= {'out_dtype', 'tokenizer_source', 'tokenizer', 'name'}


def read_recipe(path: str | pathlib.Path) -> dict[str, Any]:
  """Read a recipe as the arguments of `files.merge`, but for its output.

  Args:
    path: a YAML file with `merge_method: model_stock`.

  Returns:
    'anchor', 'models', 'dtype', and 'options' without clipping: mergekit does
    not clip cosines.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: PyYAML is not installed.
    ValueError: it asks for what is not done here; all of that at once.

  >>> import pathlib, tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), 'recipe.yaml')
  >>> _ = path.write_text('''
  ... merge_method: model_stock
  ... base_model: base
  ... models: [{model: a}, {model: b}]
  ... parameters: {filter_wise: true}
  ... ''')
  >>> recipe = read_recipe(path)
  >>> recipe['anchor'], recipe['models'], recipe['options'].unit
  ('base', ['a', 'b'], 'filter')
  """
  recipe = _read_yaml(text.existing_file(path))
  problems = [
    f'{key}: is not known here. Take it out.'
    for key in sorted(text.plain(str(key)) for key in recipe.keys() - _KEYS)
  ]
  method = recipe.get('merge_method')
  if method != 'model_stock':
    problems.append(
      f'merge_method: is {text.shown(method)}, must be model_stock.'
    )
  anchor = _name(recipe.get('base_model'), 'base_model', problems)
  models = _models(recipe.get('models'), problems)
  parameters = recipe.get('parameters') or {}
  filters = None
  if isinstance(parameters, dict):
    filters = parameters.get('filter_wise', False)
  if not isinstance(filters, bool) or parameters.keys() - {'filter_wise'}:
    problems.append(
      f'parameters: are {text.shown(parameters)}, may be filter_wise: true or '
      'false.'
    )
  for key in ('tokenizer_source', 'tokenizer'):
    value = recipe.get(key)
    if isinstance(value, dict) and value.keys() == {'source'}:
      value = value['source']
    if value not in (None, 'base'):
      problems.append(
        f'{key}: is {text.shown(recipe[key])}, must be base: the tokenizer is '
        'that of base_model.'
      )
  text.raise_problems(f'{path} asks for what is not done here.', problems)
  return {
    'anchor': anchor,
    # mergekit lets the base stand among the models, and does not merge it.
    'models': [model for model in models if model != anchor],
    'options': options_lib.StockOptions(
      'filter' if filters else 'layer', clip=False
    ),
    'dtype': recipe.get('out_dtype') or recipe.get('dtype'),
  }


def _read_yaml(path: pathlib.Path) -> Mapping[Any, Any]:
  import yaml

  try:
    recipe = yaml.safe_load(path.read_text('utf-8'))
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not YAML: {error}') from error
  if not isinstance(recipe, dict):
    raise ValueError(f'{path} is not a recipe of mergekit: it is no mapping.')
  return recipe


def _models(entries: Any, problems: list[str]) -> list[str]:
  if not isinstance(entries, list):
    problems.append(
      f'models: is {text.shown(entries)}, must be a list of - model: PATH.'
    )
    return []
  models = []
  for number, entry in enumerate(entries):
    where = f'models[{number}]'
    if not isinstance(entry, dict) or entry.keys() - {'model', 'parameters'}:
      problems.append(f'{where}: is {text.shown(entry)}, must be model: PATH.')
    elif entry.get('parameters'):
      problems.append(f'{where}.parameters: Model Stock takes none.')
    else:
      models.append(_name(entry.get('model'), where, problems))
  return models


def _name(value: Any, where: str, problems: list[str]) -> str:
  """Return the path of a model, which mergekit may also write in parts."""
  for key in ('model', 'path'):
    if isinstance(value, dict) and value.keys() == {key}:
      value = value[key]
  if not isinstance(value, str):
    problems.append(
      f'{where}: is {text.shown(value)}, must be the path of a checkpoint.'
    )
  elif '+' in value and not pathlib.Path(value).exists():
    problems.append(
      f'{where}: {text.shown(value)} adds a LoRA to a model. Merge it into the '
      'model first.'
    )
  return str(value)
