"""The recipes of mergekit, of its method `model_stock`."""

from collections.abc import Iterator
from collections.abc import Mapping
import itertools
import logging
import os
import pathlib
import re
from typing import Any

from modelstock_jax.formats import hub
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text
from modelstock_jax.merging import options as options_lib

_log = logging.getLogger(__name__)

# Keys, where `[]` is an item: names of checkpoints, and values of any kind.
_MODELS = ('base_model', 'models[].model', 'slices[].sources[].model')
_FREE = {'name', 'models', 'models[].parameters.weight', 'parameters', 'slices'}
_FREE |= {f'{name}.{part}' for name in _MODELS for part in ('revision', 'lora')}
_FREE |= {*_MODELS, 'slices[].sources[].layer_range[]'}
# What mergekit's model_stock does not read, and what is not done here.
_IGNORED = re.compile(
  r'chat_template|(.+\.)?parameters\.(weight|density|normalize|int8_mask|t|'
  r'rescale|lambda|epsilon|gamma)(\[.*)?|.+\.parameters'
)
# What a config.json calls its number of layers.
_LAYERS = ('num_hidden_layers', 'n_layer', 'num_layers', 'n_layers')
# Limits of a recipe, which bound the time and the memory that it takes: PyYAML
# looks through all open brackets at every word, and aliases repeat.
_MAX_BYTES, _MAX_BRACKETS, _MAX_ROWS = 50_000, 500, 10_000


def read_recipe(path: str | pathlib.Path) -> dict[str, Any]:
  """Read a recipe as the arguments of `files.merge`, but for its output.

  Args:
    path: a YAML file with `merge_method: model_stock`.

  Returns:
    'anchor', 'models', 'dtype', and 'options' without clipping: mergekit does
    not clip cosines. What has no effect is logged.

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
  values, lines = _read_yaml(text.existing_file(path))
  anchor = _name(values, 'base_model')
  dtypes, tokenizers = (None, *tensors_lib.FLOATING), (None, 'base', anchor)
  choices = {
    'merge_method': ('model_stock',),
    'dtype': dtypes,
    'out_dtype': dtypes,
    'parameters.filter_wise': (True, False),
    'slices[].base_model': (anchor,),
    'tokenizer_source': tokenizers,
    'tokenizer.source': tokenizers,
    'tokenizer.tokens': (None,),
  }
  required = {'merge_method', 'base_model'}
  problems = [f'{key}: is missing.' for key in required - values.keys()]
  known, ignored, models = _FREE | choices.keys(), {}, []
  for key, value in values.items():
    kind = re.sub(r'\[\d+\]', '[]', key)
    where = f'line {lines[key]}: {text.plain(key)}'
    wanted = choices.get(kind, (value,))
    if _IGNORED.fullmatch(kind):
      ignored[lines[key]] = where
    elif kind not in known:
      near = text.nearest(kind, known)
      problems.append(f'{where}: is not known here; the nearest is {near}.')
    elif kind in _MODELS and not isinstance(value, str):
      problems.append(f'{where}: is {text.shown(value)}, must be a checkpoint.')
    elif value not in wanted and os.path.normpath(str(value)) not in wanted:
      problems.append(
        f'{where}: is {text.shown(value)}, must be one of {wanted}; the '
        f'nearest is {text.nearest(str(value), map(str, wanted))}.'
      )
    elif kind == 'models[].model':
      models.append(_name(values, key))
  if not problems:
    models += _whole_models(values, lines, anchor, problems)
  text.raise_problems(f'{path} asks for what is not done here.', problems)
  for where in ignored.values():
    _log.info('%s, %s has no effect.', path, where)
  return {
    'anchor': anchor,
    # mergekit lets the base stand among the models, and does not merge it.
    'models': [model for model in models if model != anchor],
    'options': options_lib.StockOptions(
      'filter' if values.get('parameters.filter_wise') else 'layer', clip=False
    ),
    'dtype': values.get('out_dtype') or values.get('dtype'),
  }


def _name(values: Mapping[str, Any], key: str) -> str:
  """Return the name of a checkpoint, which mergekit may also write in parts."""
  name = os.path.normpath(str(values.get(key)))
  for sign, part in (('@', 'revision'), ('+', 'lora')):
    if values.get(f'{key}.{part}'):
      name += f'{sign}{values[f"{key}.{part}"]}'
  return name


def _whole_models(
  values: Mapping[str, Any],
  lines: Mapping[str, int],
  anchor: str,
  problems: list[str],
) -> list[str]:
  """Return the models of slices, each of which must be there as a whole."""
  edges: dict[str, list[Any]] = {}
  for key in values:
    if key.startswith('slices') and key.endswith('].model'):
      start = f'{key.removesuffix("model")}layer_range'
      ends = [values.get(f'{start}[{n}]') for n in (0, 1)]
      edges.setdefault(_name(values, key), [lines[key]]).extend(ends)
  if not edges:
    return []
  with text.explained(f'{anchor}: slices take its layers. ', kinds=Exception):
    folder = hub.local_path(anchor.partition('+')[0])
    config = text.read_json(folder / 'config.json')
    config = config.get('text_config', config)
    layers = next(config[key] for key in _LAYERS if key in config)
  problems += [
    f'line {line}: layer_range of {model}: {[first, *inner, last]} must join '
    f'from 0 to {layers}, the layers of the complete model.'
    for model, (line, first, *inner, last) in edges.items()
    if (first, last) != (0, layers) or inner[::2] != inner[1::2]
  ]
  return [*edges]


def _read_yaml(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, int]]:
  """Return the values and lines of a recipe, by keys like 'models[0].model'."""
  import yaml

  def flat(node: Any, key: str) -> Iterator[tuple[str, Any, int]]:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode) or not node.value:
      value = loader.construct_object(node) if node.value else None
      # A model may be {model: {path: ...}}, and its adapter.
      yield re.sub(r'(model|lora)(\.model|\.path)+', r'\1', key), value, line
      return
    items = [(f'[{n}]', item) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):  # without the signs of our keys
      items = [('.' + re.sub(r'\W', ' ', k.value), v) for k, v in node.value]
    if len(dict(items)) < len(items):
      raise ValueError(f'one of the keys from line {line} on stands twice')
    for name, item in items:
      yield from flat(item, f'{key}{name}'.removeprefix('.'))

  try:
    if path.stat().st_size > _MAX_BYTES:
      raise ValueError(f'it has more than {_MAX_BYTES} bytes')
    data = path.read_bytes()
    if sum(map(data.count, (b'[', b'{'))) > _MAX_BRACKETS:
      raise ValueError(f'it has more than {_MAX_BRACKETS} brackets')
    loader = yaml.SafeLoader(data)
    node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode):
      raise ValueError('it is no mapping')
    rows = [*itertools.islice(flat(node, ''), _MAX_ROWS + 1)]
    if len(rows) > _MAX_ROWS:
      raise ValueError(f'it has more than {_MAX_ROWS} values')
  except Exception as error:  # PyYAML raises whatever it likes
    cause = text.plain(' '.join(str(error).split()))
    if 'another document' in cause:
      cause += '; save each as a file of its own, and merge them in that order'
    raise ValueError(f'{path} is not a recipe in YAML: {cause}.') from error
  return {k: v for k, v, _ in rows}, {k: line for k, _, line in rows}
