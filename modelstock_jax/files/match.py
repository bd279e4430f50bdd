"""Tensors of several checkpoints, matched by name."""

from collections.abc import Sequence
import math
import re
from typing import NamedTuple

import numpy as np

from modelstock_jax.formats import detect
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

# Remedies in errors.
_COMMON = (
  ' --common merges what all of them have, the first rows of tensors that have '
  'more in some, and leaves the rest out.'
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
  """

  name: str
  stored: tuple[tensors_lib.Tensor, ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  merged: bool

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
      if not common:
        problems.append(f'{label}: not in {", ".join(lacking)}')
        remedies.add(_COMMON)
      continue
    stored = tuple(c.tensors[name] for c in checkpoints)
    shape, shapes = stored[0].shape, {tensor.shape for tensor in stored}
    each = ', '.join(f'{c.path} {c.tensors[name]}' for c in checkpoints)
    if len(shapes) > 1:
      rows = all(shapes) and len({shape[1:] for shape in shapes}) == 1
      if not rows or not common:
        problems.append(
          f'{label}: {"rows" if rows else "shapes"} differ: {each}'
        )
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
      floating and name not in checkpoints[0].averaged,
    )
  if not tensors and not problems:
    problems.append('they have no tensor in common')
  anchor, *models = (str(c.path) for c in checkpoints)
  text.raise_problems(
    f'{", ".join(models)} do not fit the anchor {anchor}.'
    + ''.join(sorted(remedies)),
    problems,
    most=20,
  )
  return tensors, left_out


def groups(names: Sequence[str], layers: str | None) -> list[list[str]]:
  """Group the tensors that share a cosine.

  Args:
    names: names of the tensors.
    layers: a regular expression: names that it matches with the same groups
      belong together. None: every tensor by itself.

  Raises:
    ValueError: `layers` matches no name.
  """
  if layers is None:
    return [[name] for name in names]
  members: dict[str | tuple, list[str]] = {}
  for name in names:
    matched = re.fullmatch(layers, name)
    members.setdefault(matched.groups() if matched else name, []).append(name)
  if not any(isinstance(key, tuple) for key in members):
    raise ValueError(
      f'layers: {text.shown(layers)} matches none of the {len(names)} names, '
      f'such as {text.shown(names[0])}. It must match a complete name.'
    )
  return list(members.values())
