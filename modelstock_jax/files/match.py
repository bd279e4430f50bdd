"""Tensors of several checkpoints, matched by name."""

from collections.abc import Mapping
from collections.abc import Sequence
import logging
import math
import re
from typing import NamedTuple

import numpy as np

from modelstock_jax.formats import detect
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

_log = logging.getLogger(__name__)

_MOST = 20  # problems in an error
# Remedies in errors.
_COMMON = (
  ' --common merges what all of them have, the first rows of tensors that have '
  'more in some, and leaves the rest out.'
)
# Tensors whose rows are tokens or positions, which may grow; not a grid's.
_GROWING = re.compile(
  r'(?!.*(visi|visual|relative)).*'
  r'(embed|position|vocab|wte|wpe|lm_head|shared|predictions)'
)
_DTYPE = ' --dtype says which dtype the result is to have.'


class Matched(NamedTuple):
  """A tensor of all checkpoints, and the part of it that is merged.

  Attributes:
    name: name of the tensor.
    stored: the anchor's tensor, then the models'.
    shape: shape of the result: fewer rows than some, where they differ.
    dtype: dtype of the result.
    merged: False for a tensor that is averaged, or has to be equal in all.
    axis: the axis of which each index has a cosine of its own: filters, or
      stacked layers. None: the tensor has one cosine.
  """

  name: str
  stored: tuple[tensors_lib.Tensor, ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  merged: bool
  axis: int | None = None

  @property
  def anchor(self) -> tensors_lib.Tensor:
    """The anchor's tensor."""
    return self.stored[0]

  @property
  def size(self) -> int:
    """Number of elements of the result, the first ones of each tensor."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the result."""
    return self.size * self.dtype.itemsize

  def cached(self) -> 'Matched':
    """Return it for repeated reads."""
    return self._replace(stored=tuple(t.cached() for t in self.stored))


def by_names_of(
  anchor: detect.Checkpoint, model: detect.Checkpoint
) -> detect.Checkpoint:
  """Give the tensors of a model the anchor's names, whatever wraps either."""
  plain = tensors_lib.unwrapped(anchor.tensors)
  names = {short: name for name, short in plain.items()}
  tensors = {
    names.get(short, name): model.tensors[name]
    for name, short in tensors_lib.unwrapped(model.tensors).items()
  }
  if tensors.keys() == set(model.tensors) or len(tensors) < len(model.tensors):
    return model
  _log.info('%s: matched without the prefixes of wrappers.', model.path)
  return model._replace(tensors=tensors)


def match(
  checkpoints: Sequence[detect.Checkpoint], dtype: str | None, common: bool
) -> tuple[dict[str, Matched], list[str]]:
  """Match the tensors of checkpoints by name.

  Args:
    checkpoints: the anchor, then the models.
    dtype: dtype of the result; None requires that all have the same.
    common: leave out what not all have, and take the rows that all have.

  Returns:
    What all checkpoints have, and the names of what not all of them have.

  Raises:
    ValueError: they do not fit together; the differences are listed.
  """
  tensors, left_out, problems, remedies = {}, [], [], set()
  for name in dict.fromkeys(name for c in checkpoints for name in c.tensors):
    label = text.plain(name)
    lacking = [str(c.path) for c in checkpoints if name not in c.tensors]
    if lacking:
      left_out.append(name)
      listed = len(left_out) <= _MOST
      if listed and (twin := _twin(name, checkpoints)):
        problems.append(f'{label} and {text.plain(twin)} differ by the prefix')
      elif not common:
        problems.append(f'{label}: not in {", ".join(lacking)}')
        remedies.add(_COMMON)
      continue
    stored = tuple(c.tensors[name] for c in checkpoints)
    shape, shapes = stored[0].shape, {tensor.shape for tensor in stored}
    each = ', '.join(f'{c.path} {c.tensors[name]}' for c in checkpoints)
    if len(shapes) > 1:
      rows = all(shapes) and len({shape[1:] for shape in shapes}) == 1
      rows = rows and bool(_GROWING.match(name))
      what = f'{"rows" if rows else "shapes"} differ'
      if not all(math.prod(shape) for shape in shapes):
        rows, what = False, 'empty in some, which were saved before their parts'
        what += ' were gathered (DeepSpeed: stage3_gather_16bit_weights...)'
      if not rows or not common:
        problems.append(f'{label}: {what}: {each}')
        remedies |= {_COMMON} if rows else set()
        continue
      shape = (min(shape[0] for shape in shapes), *shape[1:])
    floating = all(tensor.floating for tensor in stored)
    if len({tensor.dtype for tensor in stored}) > 1 and not (
      dtype and floating
    ):
      problems.append(f'{label}: dtypes differ: {each}')
      remedies |= set() if dtype else {_DTYPE}
    tensors[name] = Matched(
      name,
      stored,
      shape,
      tensors_lib.DTYPES[dtype] if dtype and floating else stored[0].dtype,
      floating
      and name not in checkpoints[0].averaged
      # Not what all have from one file: the base of adapters.
      and any(tensor is not stored[0] for tensor in stored),
    )
  if not tensors and not problems:
    problems.append('they have no tensor in common')
  anchor, *models = (str(c.path) for c in checkpoints)
  text.raise_problems(
    f'{", ".join(models)} do not fit the anchor {anchor}.'
    + ''.join(sorted(remedies)),
    problems,
    most=_MOST,
  )
  return tensors, left_out


def _twin(name: str, checkpoints: Sequence[detect.Checkpoint]) -> str | None:
  """Return the name that stands for this one in checkpoints without it."""
  names: set[str] = set()
  for checkpoint in sorted(checkpoints, key=lambda c: name in c.tensors):
    if name in checkpoint.tensors:  # which come last
      names -= checkpoint.tensors.keys()
    else:
      names |= checkpoint.tensors.keys()
  twins = (
    n
    for n in names
    if f'.{n}'.endswith(f'.{name}') or f'.{name}'.endswith(f'.{n}')
  )
  return next(twins, None)


def groups(
  tensors: Mapping[str, Matched], layers: str | None
) -> list[list[str]]:
  """Group the tensors that share a cosine.

  Args:
    tensors: tensors by name.
    layers: a regular expression: names that it matches with the same groups
      belong together. None: every tensor by itself.

  Raises:
    ValueError: `layers` matches no name, or tensors with unequal numbers of
      stacked layers.
  """
  if layers is None:
    return [[name] for name in tensors]
  tensors_lib.select('layers', tensors, layers)
  members: dict[str | tuple, list[str]] = {}
  for name in tensors:
    matched = re.fullmatch(layers, name)
    members.setdefault(matched.groups() if matched else name, []).append(name)
  for names in members.values():
    merged = [tensors[name] for name in names if tensors[name].merged]
    counts = {1 if t.axis is None else t.shape[t.axis] for t in merged}
    if len(counts) > 1:
      raise ValueError(
        f'layers: {text.listed(names)} share a cosine, but their numbers of '
        f'stacked layers are {sorted(counts)}. Give the same --stacked to all.'
      )
  return list(members.values())
