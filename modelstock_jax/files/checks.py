"""What a merge requires of its arguments and of the checkpoints."""

from collections.abc import Mapping
from collections.abc import Sequence
import os
import pathlib
import re
from typing import Any

from modelstock_jax.files import layout
from modelstock_jax.files import methods
from modelstock_jax.files import output as output_lib
from modelstock_jax.files import work
from modelstock_jax.formats import detect
from modelstock_jax.formats import remote
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text
from modelstock_jax.formats import torch
from modelstock_jax.merging import options as options_lib

MAX_STRENGTH = 1000


def check_arguments(
  anchor: text.PathLike | None,
  models: Sequence[text.PathLike],
  output: text.PathLike | None,
  threads: int | None,
  options: options_lib.StockOptions,
  settings: Mapping[str, Any],
) -> None:
  """Raise one ValueError over all arguments of `merge` that are wrong."""
  problems, name = [], settings['method']['name']
  keys = ('dtype', 'layers', 'strength', 'stacked')
  dtype, layers, strength, stacked = (settings[key] for key in keys)
  if (dtype or 'float32') not in tensors_lib.FLOATING:
    names = ', '.join(tensors_lib.FLOATING)
    problems.append(f'dtype must be one of {names}, got {text.shown(dtype)}.')
  if isinstance(models, str | os.PathLike) or not models:
    takes = methods.takes(name)
    problems.append(f'models: {text.shown(models)}; {name} takes {takes}.')
  if anchor is None and name != 'soup':
    problems.append(f'anchor: not given; {name} takes {methods.takes(name)}.')
  stock = options, strength, layers, stacked if name != 'lines' else {}
  plain = options_lib.StockOptions(), 1, None, {}
  if name != 'model_stock' and stock != plain:
    problems.append(
      'unit, average, clip, strength, layers, stacked: are of model_stock, not '
      f'{name}; of lines is stacked alone.'
    )
  if not 0 <= strength <= MAX_STRENGTH:  # nor NaN
    problems.append(
      f'strength must be 0 to {MAX_STRENGTH}, got {text.shown(strength)}.'
    )
  for key, number in (('threads', threads), ('rank', settings['rank'])):
    if number is not None and number < 1:
      problems.append(f'{key} must be at least 1, got {number}.')
  for key in ('layers', 'stacked'):
    if settings[key] and options.unit != 'layer':
      problems.append(f"{key} is for unit 'layer', not {options.unit!r}.")
  patterns = [(key, settings[key]) for key in ('layers', 'select')]
  for key, pattern in (*patterns, *(('stacked', p) for p in stacked)):
    try:
      re.compile(pattern or '')
    except (re.error, RecursionError, OverflowError) as error:
      shown = text.shown(pattern)
      problems.append(f'{key}: {shown} is no regular expression: {error}.')
  if output is not None and remote.is_url(output):
    problems.append(f'{output}: name an output here, and copy it there then.')
  if problems:
    raise ValueError('\n  '.join(problems))


def check_checkpoints(
  checkpoints: Sequence[detect.Checkpoint],
  target: pathlib.Path | None,
  anchored: bool,
  method: methods.Method,
  rank: int | None,
) -> None:
  """Raise an error if the checkpoints, their number or the output do not fit.

  Args:
    checkpoints: the anchor, if there is one, and the models.
    target: the output, if there is one.
    anchored: True if the first is the anchor.
    method: the method.
    rank: of LoRA adapters, the largest rank of the result.

  Raises:
    ValueError: see above.
    FileExistsError: there is something at the output.
  """
  anchor, *models = checkpoints
  count = len(checkpoints) - anchored
  least, most, *_ = methods.METHODS[method.name]
  if not least <= count <= most or len(method.weights or ()) not in (0, count):
    each = ', weights one for each' * (method.weights is not None)
    raise ValueError(
      f'models: {text.listed(str(c.path) for c in checkpoints[anchored:])}; '
      f'{method.name} takes {methods.takes(method.name)}{each}.'
    )
  if anchor.kind == 'lora' and method.name != 'model_stock':
    raise ValueError(
      f'{method.name} does not take LoRA adapters. dense=True (--dense) with '
      'the base as the anchor takes them for full weights.'
    )
  if rank is not None and anchor.kind != 'lora':
    raise ValueError('rank is for LoRA adapters that become an adapter.')
  resolved = [checkpoint.path.resolve() for checkpoint in checkpoints]
  for number, path in enumerate(resolved):
    if path in resolved[:number]:
      first = anchored and path == resolved[0]
      same = 'the anchor' if first else 'given twice'
      raise ValueError(
        f'{path} is {same}. A merge takes the pretrained checkpoint as the '
        'anchor, and models that were fine-tuned from it, each once.'
      )
  for model in models:
    if (anchor.kind == 'scenic') != (model.kind == 'scenic'):
      raise ValueError(
        f'{anchor.path} is of kind {anchor.kind!r}, {model.path} of kind '
        f'{model.kind!r}: their tensors have other names. Convert one of them.'
      )
  if target is None:
    return
  output_lib.check_free(target)
  if target.suffix in (*torch.SUFFIXES, *detect.ARRAYS):
    raise ValueError(
      f'{target}: a merge is written as safetensors. Let --output end with '
      '.safetensors, or give a new folder.'
    )
  single = target.suffix == '.safetensors'
  if anchor.kind in (layout.NO_CONFIG if single else ('run',)):
    remedy = 'name a folder' if single else 'end with .safetensors'
    raise ValueError(
      f'{target}: checkpoints of kind {anchor.kind!r} are not merged into such '
      f'an output. Let --output {remedy}.'
    )
  if single and len(method.outputs()) > 1:
    raise ValueError(
      f'{target}: several alphas make a folder for each. Give one alpha, or '
      'let --output name a new folder.'
    )


def check_moved(
  measured: Sequence[work.Measured], models: Sequence[detect.Checkpoint]
) -> None:
  """Raise a ValueError if a model is equal to the anchor in every tensor."""
  for number, model in enumerate(models):
    if measured and not any(layer.gram[number, number] for layer in measured):
      raise ValueError(
        f'{model.path} is equal to the anchor in every tensor: it was not '
        'fine-tuned, or is the pretrained checkpoint itself.'
      )
