"""The two passes over a tensor: inner products, then the merge, in blocks.

All is computed in float64, so that what is written is rounded once, whatever
its dtype. A block fits the caches of a core: weights are read from memory once
for each pass, and no copy of a tensor is made.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from modelstock_jax.formats import tensors as tensors_lib

# Elements that are mapped at once, and that are worked on at once.
WINDOW, BLOCK = 2**20, 2**16
# Elements of a dot product. Of more than 10,000 OpenBLAS makes threads of its
# own, which would be in the way of ours.
_RUN = 2**13


class Rows(NamedTuple):
  """The layout of a tensor of which each filter has a ratio of its own.

  Attributes:
    count: rows.
    columns: elements of a row.
    first: True if rows are filters (PyTorch), False if columns are (Flax).
  """

  count: int
  columns: int
  first: bool

  @property
  def filters(self) -> int:
    """Number of filters."""
    return self.count if self.first else self.columns

  def at(self, start: int, count: int) -> slice:
    """Return the filters of `count` rows from element `start` on."""
    row = start // self.columns
    return slice(row, row + count) if self.first else slice(None)


def rows_of(tensor: tensors_lib.Tensor, size: int) -> Rows | None:
  """Return the filters of a tensor; None for one that has only one axis.

  Args:
    tensor: tensor of the anchor.
    size: elements that are merged: slices along the first axis.
  """
  if len(tensor.shape) < 2 or not size:
    return None
  first = tensor.filter_axis == 0
  columns = tensor.size // tensor.shape[0] if first else tensor.shape[-1]
  return Rows(size // columns, columns, first)


def gram(
  stored: Sequence[tensors_lib.Tensor], size: int, rows: Rows | None = None
) -> np.ndarray:
  """Compute inner products of the displacements d_i = w_i - w_0 of one tensor.

  Args:
    stored: w_0, and N tensors like it.
    size: elements of each, from the first on, that count.
    rows: None, or the filters, each of which has inner products.

  Returns:
    float64[N, N], or float64[filters, N, N].
  """
  number = len(stored) - 1
  lead = (rows.filters,) if rows else ()
  upper = np.zeros((*lead, number, number))
  with np.errstate(over='ignore', invalid='ignore'):  # callers check it
    for start, center, *others in _blocks(stored, size, rows):
      steps = [other - center for other in others]
      for i in range(number):
        for j in range(i, number):
          if rows is None:
            upper[i, j] += _dot(steps[i], steps[j])
          else:
            axes = 'rc,rc->r' if rows.first else 'rc,rc->c'
            sums = np.einsum(axes, steps[i], steps[j])
            upper[rows.at(start, len(center)), i, j] += sums
  return upper + np.swapaxes(np.triu(upper, k=1), -1, -2)


def blend(
  stored: Sequence[tensors_lib.Tensor],
  size: int,
  ratio: np.ndarray,
  dtype: np.dtype,
  rows: Rows | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
  """Merge one tensor, (1 - t) w_0 + t mean(w_i): exact at t = 0 and t = 1.

  Args:
    stored: w_0, and N tensors like it.
    size: elements of each, from the first on, that are merged.
    ratio: float64[] t, or float64[filters] with `rows`.
    dtype: dtype of the result.
    rows: see `gram`.

  Yields:
    The number of elements before, and elements.
  """
  ratio = np.asarray(ratio, np.float64)
  out, begun, filled = np.empty(0, dtype), 0, 0
  for start, center, *others in _blocks(stored, size, rows):
    t = ratio
    if rows is not None and rows.first:
      t = ratio[rows.at(start, len(center)), None]
    mean = others[0] + others[1]
    for other in others[2:]:
      mean += other
    mean *= 1 / len(others)
    mean *= t
    mean += (1 - t) * center
    if filled + mean.size > out.size:
      if filled:
        yield begun, out[:filled]
      begun, filled = start, 0
      out = np.empty(max(WINDOW, mean.size), dtype)
    with np.errstate(over='ignore'):  # callers check float16
      out[filled : filled + mean.size] = mean.reshape(-1)
    filled += mean.size
  if filled:
    yield begun, out[:filled]


def windows(
  tensor: tensors_lib.Tensor, size: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Yield the first elements of a tensor: the number before, and elements."""
  for start in range(0, size, WINDOW):
    yield start, tensor.read(start, min(start + WINDOW, size))


def equal(stored: Sequence[tensors_lib.Tensor], size: int) -> bool:
  """Return True if the first elements of several tensors are the same."""
  return all(
    np.array_equal(parts[0][1], part)
    for parts in zip(*(windows(t, size) for t in stored), strict=True)
    for _, part in parts[1:]
  )


def count_broken(tensor: tensors_lib.Tensor, size: int) -> int:
  """Count the NaN and infinite ones among the first elements."""
  return sum(
    int(np.sum(~np.isfinite(part.astype(np.float32, copy=False))))
    for _, part in windows(tensor, size)
  )


def _blocks(
  stored: Sequence[tensors_lib.Tensor], size: int, rows: Rows | None
) -> Iterator[tuple]:
  """Yield pieces of several tensors: where they begin, and each in float64.

  They are flat, or with `rows` of shape [rows, columns].
  """
  if rows is None:
    window, block = WINDOW, BLOCK
  else:
    block = max(1, BLOCK // max(rows.columns, 1)) * rows.columns
    window = max(1, WINDOW // block) * block
  for begin in range(0, size, window):
    end = min(begin + window, size)
    parts = [tensor.read(begin, end) for tensor in stored]
    for start in range(0, end - begin, block):
      pieces = [
        part[start : start + block].astype(np.float64) for part in parts
      ]
      if rows is not None:
        pieces = [piece.reshape(-1, rows.columns) for piece in pieces]
      yield begin + start, *pieces


def _dot(left: np.ndarray, right: np.ndarray) -> float:
  return sum(
    float(np.dot(left[k : k + _RUN], right[k : k + _RUN]))
    for k in range(0, left.size, _RUN)
  )
