"""Axes of a tensor that hold several layers, or several models.

A scan over layers stores each kind of weight once, stacked on one axis. Each
index of that axis is a layer, with a cosine of its own. DiLoCo stores its
replicas on a leading axis. Each index of that one is a model.
"""

import collections
from collections.abc import Mapping
import logging
import pathlib
import re

from modelstock_jax.files import match
from modelstock_jax.formats import detect
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

_log = logging.getLogger(__name__)

# Keys below which MaxText, big_vision, Gemma and NNX keep the stacked layers.
_STACKS = re.compile(
  r'(?:.*/)?(?:(?:dense_|moe_)?layers|scanned_blocks|encoderblock'
  r'|stacked_layers/\w+)/(?!\d)'
)
_Stacked = Mapping[str, int | None]


def assign(
  tensors: Mapping[str, match.Matched], unit: str, stacked: _Stacked
) -> tuple[dict[str, match.Matched], dict[str, int | None]]:
  """Find the axis of each tensor whose indices have cosines of their own.

  Args:
    tensors: tensors by name.
    unit: see `options.StockOptions`.
    stacked: the axis of the layers by a regular expression of names, and None
      for names of tensors without one. The first that matches counts. Tensors
      that none matches are recognised by name and shape.

  Returns:
    The tensors with their axes; and `stacked` with what was recognised.

  Raises:
    ValueError: an expression matches nothing, or a tensor has no such axis.
  """
  for pattern in stacked:
    tensors_lib.select('stacked', tensors, pattern)
  if unit == 'layer':
    stacked = {**stacked, **_recognise(tensors, stacked)}
  assigned = {}
  for name, tensor in tensors.items():
    rank = len(tensor.shape)
    axis = next((a for p, a in stacked.items() if re.fullmatch(p, name)), None)
    if unit == 'filter' and rank > 1:
      axis = tensor.anchor.filter_axis
    if axis is not None and tensor.merged:
      if not -rank <= axis < rank:
        raise ValueError(
          f'{text.plain(name)}: stacked names axis {axis}, but the shape is '
          f'{list(tensor.shape)}. Give an axis that holds the layers.'
        )
      tensor = tensor._replace(axis=axis % rank)
    assigned[name] = tensor
  return assigned, {**stacked}


def _recognise(
  tensors: Mapping[str, match.Matched], stacked: _Stacked
) -> dict[str, int]:
  """Return the axis of each stack of layers, by an expression of its names."""
  axes, stacks = {}, collections.defaultdict(set)
  for name, tensor in tensors.items():
    stated = any(re.fullmatch(pattern, name) for pattern in stacked)
    if (stack := _STACKS.match(name)) and tensor.merged and not stated:
      stacks[stack[0]].add(tensor.shape)
  for prefix, shapes in stacks.items():
    pattern = f'{re.escape(prefix)}.*'
    # Trainers stack on the first axis, or MaxText on the second.
    shared = [k for k in (0, 1) if len({s[k:][:1] for s in shapes}) == 1]
    ranks = {len(shape) for shape in shapes}
    line = f"not taken for a stack. If it is one, --stacked '{pattern}=AXIS'"
    # The scale of one layer has an axis, and a kernel two.
    if len(shared) == 1 and min(ranks) > 1 and max(ranks) > 2:
      axes[pattern] = shared[0]
      line = f'stacked layers on axis {shared[0]}'
    _log.info('%s: %s.', prefix, line)
  return axes


def replicas(
  model: detect.Checkpoint, anchor: detect.Checkpoint
) -> list[detect.Checkpoint]:
  """Return the models of a checkpoint: several if an axis of replicas leads.

  Args:
    model: a checkpoint. It holds R models if each of its tensors has one more
      leading axis than the anchor's, of length R.
    anchor: the anchor.
  """
  shapes = {name: tensor.shape for name, tensor in anchor.tensors.items()}
  lengths = {
    t.shape[:1] if t.shape[1:] == shapes.get(name, t.shape[1:]) else ()
    for name, t in model.tensors.items()
  }
  if len(lengths) != 1 or () in lengths or model.kind == 'scenic':
    return [model]
  [[count]] = lengths
  _log.info('%s: %d replicas, each of which is a model.', model.path, count)
  return [
    model._replace(
      path=pathlib.Path(f'{model.path} (replica {index})'),
      tensors={name: t.part(index) for name, t in model.tensors.items()},
    )
    for index in range(count)
  ]
