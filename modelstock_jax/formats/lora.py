"""LoRA adapters of peft: low-rank displacements of the weights of a base.

  adapter_config.json: the base, lora_alpha, the kind of the scale, ...
  adapter_model.safetensors or adapter_model.bin, each name after PREFIX:
    MODULE.lora_A.weight [r, in, ...], MODULE.lora_B.weight [out, r, ...]
    MODULE.lora_embedding_A [r, rows], MODULE.lora_embedding_B [columns, r]
    NAME: a whole tensor, of modules_to_save or a bias

The displacement of a weight [out, in] is s B A; of embeddings, and of weights
[in, out], it is the transpose.

Source: peft/tuners/lora and peft/utils/save_and_load.py of peft.
"""

from collections.abc import Mapping
import math
import pathlib
import re
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax.formats import safetensors
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text
from modelstock_jax.formats import torch

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
Tensors = Mapping[str, tensors_lib.Tensor]
# A or B of a module, its own or that of an embedding.
_NAME = re.escape(PREFIX) + r'(.+)\.lora_(embedding_|)([AB])(?:\.weight|)'
# What two adapters must agree in.
_BASE = ('base_model_name_or_path', 'revision', 'fan_in_fan_out')
# Kinds of LoRA whose displacement is not s B A.
_OTHER_KINDS = (
  *('use_dora', 'use_qalora', 'use_bdlora', 'lora_bias', 'layer_replication'),
  *('alora_invocation_tokens', 'trainable_token_indices', 'target_parameters'),
  *('arrow_config', 'kasa_config', 'monteclora_config', 'velora_config'),
)
# Initialisations that also change the weights of the base.
_CHANGED_BASE = ('pissa', 'olora', 'loftq', 'corda', 'lora_ga')


class Factors(NamedTuple):
  """The factors of a displacement, which is s B A or its transpose.

  Attributes:
    a: [r, in, ...].
    b: [out, r, ...].
    scale: s.
    embedding: True if the weight is that of an embedding.
    transposed: True if the weight is stored [in, out].
  """

  a: tensors_lib.Tensor
  b: tensors_lib.Tensor
  scale: float
  embedding: bool
  transposed: bool

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """Return `[rows, r]` and `[r, columns]` as stored, to be scaled by s."""
    rank = self.a.shape[0]
    a = self.a.read(0, self.a.size).reshape(rank, -1)
    b = self.b.read(0, self.b.size).reshape(-1, rank)
    return (a.T, b.T) if self.transposed else (b, a)


def read(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
  """Find the tensors of an adapter, and read none of them.

  Args:
    path: the folder that peft has written.

  Returns:
    The displacements, by the names of the weights, each with `factors`, and
    the whole tensors, by their names; what the adapter says about its base.

  Raises:
    FileNotFoundError: the file of the weights is missing.
    ValueError: it is damaged, or of a kind whose displacement is not s B A.
  """
  file = path / WEIGHTS
  if file.exists():
    stored = safetensors.read(safetensors.check_inside(file)).tensors
  else:
    file = path / 'adapter_model.bin'
    stored = torch.read(safetensors.check_inside(file))
  # JSON may hold anything anywhere.
  with text.explained(f'{path / CONFIG}: ', kinds=Exception):
    config = text.read_json(path / CONFIG)
    _check_kind(config)
    tensors, problems = {}, []
    for name, tensor in stored.items():
      matched = re.fullmatch(_NAME, name)
      key, part = name.removeprefix(PREFIX), tensor
      if matched:
        key, part = f'{matched[1]}.weight', _product(config, stored, matched)
        if part and matched[3] == 'B':
          continue  # with its A
      if part is None or key in tensors or key == name or '.lora_' in key:
        problems.append(f'{text.plain(name)} {tensor}')
      else:
        tensors[key] = part
    text.raise_problems(
      'it takes pairs of A and B as peft saves them, and other tensors of '
      'modules. Save the adapter again with a newer peft.',
      problems,
      most=20,
    )
    return tensors, {key: str(config.get(key) or '') for key in _BASE}


def _check_kind(config: Mapping[str, Any]) -> None:
  kind, start = config.get('peft_type'), config.get('init_lora_weights')
  problems = [f'{key} is set' for key in _OTHER_KINDS if config.get(key)]
  if kind != 'LORA' or str(start).lower().startswith(_CHANGED_BASE):
    problems.append(f'peft_type={kind!r}, init_lora_weights={start!r}')
  text.raise_problems(
    'such an adapter is not a sum of s B A and its base. Merge it into its '
    "base first (peft's merge_and_unload), and merge the models.",
    problems,
  )


def _product(
  config: Mapping[str, Any], stored: Tensors, matched: re.Match[str]
) -> tensors_lib.Tensor | None:
  """Return the displacement of which A or B is named; None if they do not fit.

  Its windows are computed when they are read.
  """
  start, end = matched.span(3)
  name = matched.string
  a, b = (stored.get(f'{name[:start]}{letter}{name[end:]}') for letter in 'AB')
  if a is None or b is None or a.dtype != b.dtype or not a.floating:
    return None
  rank = a.shape[0] if a.size and len(a.shape) > 1 else 0
  if not rank or b.shape[1:2] != (rank,) or b.size != b.shape[0] * rank:
    return None
  scale = _alpha(config, matched[1])
  scale /= math.sqrt(rank) if config.get('use_rslora') else rank
  embedding = bool(matched[2])
  transposed = embedding or bool(config.get('fan_in_fan_out'))
  factors = Factors(a, b, scale, embedding, transposed)
  shape = (b.shape[0], *a.shape[1:])
  shape = shape[::-1] if transposed else shape
  columns = math.prod(shape[1:])

  def window(start: int, stop: int) -> np.ndarray:
    left, right = factors.arrays()
    first = start // columns
    rows = left[first : -(-stop // columns)].astype(np.float64)
    flat = (scale * rows @ right.astype(np.float64)).reshape(-1)
    return flat[start - first * columns :][: stop - start]

  def load() -> np.ndarray:
    return window(0, math.prod(shape)).reshape(shape)

  return tensors_lib.Tensor(shape, b.dtype, load, window, factors=factors)


def _alpha(config: Mapping[str, Any], module: str) -> float:
  """Return lora_alpha of a module; the first pattern that matches counts."""
  for pattern, alpha in (config.get('alpha_pattern') or {}).items():
    # With several repeats the time to match has no bound.
    if sum(map(pattern.count, '*+?{(')) > 1:
      raise ValueError(
        f'alpha_pattern: {text.shown(pattern)} is not read. Name the modules.'
      )
    if re.fullmatch(rf'(.*\.)?({pattern})', module):
      return float(alpha)
  return float(config['lora_alpha'])


def add(base: Tensors, adapter: Tensors) -> dict[str, tensors_lib.Tensor]:
  """Add an adapter to the tensors of its base; no product is computed.

  Args:
    base: by name.
    adapter: displacements and whole tensors, see `read`.

  Returns:
    The tensors of the base, those that have an adapter with float64 windows.

  Raises:
    ValueError: as `places`.
  """
  tensors = dict(base)
  # Whole tensors first: embeddings may have both.
  for name, place in sorted(
    places(base, adapter).items(), key=lambda x: bool(adapter[x[0]].factors)
  ):
    dtype, step = base[place].dtype, adapter[name]
    step = _sum(tensors[place], step) if step.factors else step
    tensors[place] = step._replace(dtype=dtype)
  return tensors


def _sum(
  base: tensors_lib.Tensor, step: tensors_lib.Tensor
) -> tensors_lib.Tensor:
  def window(start: int, stop: int) -> np.ndarray:
    return base.read(start, stop).astype(np.float64) + step.read(start, stop)

  return base._replace(load=lambda: base.load() + step.load(), window=window)


def places(base: Tensors, adapter: Tensors) -> dict[str, str]:
  """Find the tensors of a base that an adapter changes.

  It may lack the name of the model around it: 'transformer.h.0' is 'h.0'.

  Args:
    base: by name.
    adapter: displacements and whole tensors, see `read`.

  Returns:
    The names in the base, by the names of the adapter.

  Raises:
    ValueError: the base lacks a tensor, or has one of another shape or dtype.
  """
  places_in_base, problems = {}, []
  for name, tensor in adapter.items():
    names = name.replace('.base_layer.', '.').split('.', 1)
    place = next((n for n in ('.'.join(names), names[-1]) if n in base), '')
    stored = base.get(place)
    if stored and stored.shape == tensor.shape and stored.floating:
      places_in_base[name] = place
    else:
      label = f'{text.plain(name)} {tensor}'
      problems.append(f'{label}: the base has {stored or "none"}')
  text.raise_problems(
    'The anchor must be the base before it was quantised, with all that the '
    'adapter changes: a new head too, as it was before training.',
    problems,
    most=20,
  )
  return places_in_base
