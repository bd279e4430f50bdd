"""The recipes of mergekit, of its method `model_stock`."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

from modelstock_jax.formats import text
from modelstock_jax.merging import options as options_lib

# The keys that a recipe may have; the last ones change nothing here.
_KEYS = {'merge_method', 'base_model', 'models', 'parameters', 'dtype'}
_KEYS |= {'out_dtype', 'tokenizer_source', 'tokenizer', 'name'}
# Limits of a recipe, which bound the time and the memory that it takes: PyYAML
# looks through all open brackets at every word.
_MAX_BYTES, _MAX_BRACKETS = 50_000, 500
_CHECKPOINT = 'the path of a checkpoint (merge a LoRA into it first)'


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

  def require(valid: bool, key: str, value: Any, expected: str) -> None:
    if not valid:
      problems.append(f'{key}: is {text.shown(value)}, must be {expected}.')

  method = recipe.get('merge_method')
  require(method == 'model_stock', 'merge_method', method, 'model_stock')
  anchor = _path(recipe.get('base_model'))
  require(_names_checkpoint(anchor), 'base_model', anchor, _CHECKPOINT)
  entries = recipe.get('models')
  require(isinstance(entries, list), 'models', entries, 'a list')
  models = []
  for number, entry in enumerate(entries if isinstance(entries, list) else []):
    valid = isinstance(entry, dict) and entry.keys() <= {'model', 'parameters'}
    valid = valid and not entry.get('parameters')
    models.append(_path(entry.get('model')) if valid else None)
    valid = _names_checkpoint(models[-1])
    require(valid, f'models[{number}]', entry, f'model: {_CHECKPOINT}')
  parameters = recipe.get('parameters') or {}
  require(
    parameters in ({}, {'filter_wise': True}, {'filter_wise': False}),
    'parameters',
    parameters,
    'filter_wise: true or false',
  )
  for key in ('tokenizer_source', 'tokenizer'):
    value = recipe.get(key)
    valid = value in (None, 'base', {'source': 'base'})
    require(valid, key, value, 'base: the tokenizer is that of base_model')
  text.raise_problems(f'{path} asks for what is not done here.', problems)
  return {
    'anchor': anchor,
    # mergekit lets the base stand among the models, and does not merge it.
    'models': [model for model in models if model != anchor],
    'options': options_lib.StockOptions(
      'filter' if parameters.get('filter_wise') else 'layer', clip=False
    ),
    'dtype': recipe.get('out_dtype') or recipe.get('dtype'),
  }


def _read_yaml(path: pathlib.Path) -> Mapping[Any, Any]:
  import yaml

  class Loader(yaml.SafeLoader):
    """A loader of mappings without repeated keys, nor the merge key '<<'."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
      # Not that of SafeLoader: '<<' of '<<' may grow without bounds.
      base = yaml.constructor.BaseConstructor
      mapping = base.construct_mapping(self, node, deep)
      if len(mapping) < len(node.value):
        line = node.start_mark.line + 1
        raise ValueError(f'a key of line {line} stands twice')
      return mapping

  try:
    if path.stat().st_size > _MAX_BYTES:
      raise ValueError(f'it has more than {_MAX_BYTES} bytes')
    data = path.read_bytes()
    if sum(map(data.count, (b'[', b'{'))) > _MAX_BRACKETS:
      raise ValueError(f'it has more than {_MAX_BRACKETS} brackets')
    recipe = yaml.load(data, Loader)
  except Exception as error:  # PyYAML raises whatever it likes
    cause = text.plain(' '.join(str(error).split()))
    raise ValueError(f'{path} is not a recipe in YAML: {cause}.') from error
  if not isinstance(recipe, dict):
    raise ValueError(f'{path} is not a recipe of mergekit: it is no mapping.')
  return recipe


def _path(value: Any) -> Any:
  """Return the path of a model, which mergekit may also write in parts."""
  for key in ('model', 'path'):
    if isinstance(value, dict) and value.keys() == {key}:
      value = value[key]
  return value


def _names_checkpoint(value: Any) -> bool:
  """Return True for a path, which `+` in it makes a model and its LoRA."""
  return isinstance(value, str) and ('+' not in value or os.path.exists(value))
