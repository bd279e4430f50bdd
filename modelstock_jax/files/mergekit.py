"""The recipes of mergekit, of its method `model_stock`."""

import pathlib
from typing import Any

# What a recipe may say; the last ones change nothing here.
_KEYS = {'merge_method', 'base_model', 'models', 'parameters', 'dtype'}
_KEYS |= {'out_dtype', 'tokenizer_source', 'tokenizer', 'name'}


def read_recipe(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads a recipe as the arguments of `files.merge`, but for its output.

  Args:
    path: a YAML file with `merge_method: model_stock`.

  Returns:
    'anchor', 'models', 'unit', 'dtype', and 'clip', which is False: mergekit
    does not clip cosines.

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
  >>> recipe['anchor'], recipe['models'], recipe['unit'], recipe['clip']
  ('base', ['a', 'b'], 'filter', False)
  """
  import yaml

  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such file.')
  try:
    recipe = yaml.safe_load(path.read_text('utf-8'))
  except yaml.YAMLError as error:
    raise ValueError(f'{path} is not YAML: {error}') from error
  if not isinstance(recipe, dict):
    raise ValueError(f'{path} is not a recipe of mergekit: it is no mapping.')
  problems = [
    f'{key}: is not known here. Take it out.'
    for key in sorted(map(str, recipe.keys() - _KEYS))
  ]
  method = recipe.get('merge_method')
  if method != 'model_stock':
    problems.append(f'merge_method: is {method!r}, must be model_stock.')
  anchor = _name(recipe.get('base_model'), 'base_model', problems)
  models = []
  entries = recipe.get('models')
  if not isinstance(entries, list):
    problems.append(f'models: is {entries!r}, must be a list of - model: PATH.')
    entries = []
  for number, entry in enumerate(entries):
    where = f'models[{number}]'
    if not isinstance(entry, dict) or entry.keys() - {'model', 'parameters'}:
      problems.append(f'{where}: is {entry!r}, must be model: PATH.')
    elif entry.get('parameters'):
      problems.append(f'{where}.parameters: Model Stock takes none.')
    else:
      models.append(_name(entry.get('model'), where, problems))
  parameters = recipe.get('parameters') or {}
  filters = None
  if isinstance(parameters, dict):
    filters = parameters.get('filter_wise', False)
  if not isinstance(filters, bool) or parameters.keys() - {'filter_wise'}:
    problems.append(
      f'parameters: are {parameters!r}, may be filter_wise: true or false.'
    )
  for key in ('tokenizer_source', 'tokenizer'):
    value = recipe.get(key)
    if isinstance(value, dict) and value.keys() == {'source'}:
      value = value['source']
    if value not in (None, 'base'):
      problems.append(
        f'{key}: is {recipe[key]!r}, must be base: the tokenizer is that of '
        'base_model.'
      )
  if problems:
    raise ValueError(
      f'{path} asks for what is not done here.\n  ' + '\n  '.join(problems)
    )
  return {
    'anchor': anchor,
    # mergekit lets the base stand among the models, and does not merge it.
    'models': [model for model in models if model != anchor],
    'unit': 'filter' if filters else 'layer',
    'clip': False,
    'dtype': recipe.get('out_dtype') or recipe.get('dtype'),
  }


def _name(value: Any, where: str, problems: list[str]) -> str:
  """The path of a model, which mergekit may also write in parts."""
  if isinstance(value, dict) and not value.keys() - {'model'}:
    value = value.get('model')
  if isinstance(value, dict) and value.keys() == {'path'}:
    value = value['path']
  if not isinstance(value, str):
    problems.append(f'{where}: is {value!r}, must be the path of a checkpoint.')
  elif '+' in value and not pathlib.Path(value).exists():
    problems.append(
      f'{where}: {value!r} adds a LoRA to a model. Merge it into the model '
      'first.'
    )
  return str(value)
