"""The two passes over a tensor: inner products, then the merge, in blocks.

All is computed in float64, so that what is written is rounded once, whatever
its dtype. Blocks of all tensors fit the cache that cores share, and lie in the
same memory each time: no copy of a tensor is made. Smaller ones would leave
threads waiting for each other, between one block and the next.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import math

import numpy as np

from modelstock_jax.files import match
from modelstock_jax.formats import tensors as tensors_lib

# Elements of each tensor that are worked on at once.
BLOCK = 2**17


def gram(tensor: match.Matched) -> tuple[np.ndarray, float, np.ndarray]:
  """Compute inner products of the displacements d_i = w_i - w_0 of one tensor.

  Args:
    tensor: w_0, and N tensors like it.

  Returns:
    float64[N, N], or float64[shape[axis], N, N] if it has an axis of filters or
    of stacked layers; the inner product of w_0 with itself; and int64[N],
    elements of each model that are the anchor's.
  """
  number = len(tensor.stored) - 1
  lead = () if tensor.axis is None else (tensor.shape[tensor.axis],)
  upper = np.zeros((*lead, number, number))
  by_index = upper.reshape(-1, number, number)
  square, unmoved = 0.0, np.zeros(number, np.int64)
  with np.errstate(over='ignore', invalid='ignore'):  # callers check it
    for _, indices, center, *steps in _blocks(tensor):
      square += float(_dot(center, center).sum())
      for i, step in enumerate(steps):
        step -= center
        unmoved[i] += np.count_nonzero(step == 0)
      for i in range(number):
        for j in range(i, number):
          by_index[indices, i, j] += _dot(steps[i], steps[j])
  return upper + np.swapaxes(np.triu(upper, k=1), -1, -2), square, unmoved


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Compute inner products of pieces [before, count, after]: [count]."""
  # BLAS would start threads of its own in each of ours.
  return np.einsum('bca,bca->c', left, right)


def blend(
  tensor: match.Matched,
  ratios: np.ndarray,
  weights: Sequence[float] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
  """Merge one tensor, (1 - t) w_0 + t mean(w_i): exact at t = 0 and t = 1.

  Args:
    tensor: w_0, and N tensors like it.
    ratios: float64[K] t, or float64[K, shape[axis]] if it has an axis.
    weights: N weights of the mean, whose sum is 1; None: all are equal.

  Yields:
    The number of elements before, and elements [K, elements], which are
    overwritten by the next ones.
  """
  out = np.empty((len(ratios), min(BLOCK, tensor.size)), tensor.dtype)
  for start, indices, center, *models in _blocks(tensor):
    for model, weight in zip(models, weights or (), strict=False):
      model *= weight
    total = models[0]
    for model in models[1:]:
      total += model
    for index, ratio in enumerate(ratios):
      t = ratio.reshape(-1, 1)[indices]
      share = t if weights else t / len(models)
      # The last one overwrites the blocks: new memory costs as much as a pass.
      last = index == len(ratios) - 1
      blended = np.multiply(total, share, out=total if last else None)
      blended += np.multiply(center, 1 - t, out=center if last else None)
      out[index, : total.size] = blended.reshape(-1)
    yield start, out[:, : total.size]


def windows(
  tensor: tensors_lib.Tensor, size: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Yield the first elements of a tensor: the number before, and elements."""
  for start in range(0, size, BLOCK):
    yield start, tensor.read(start, min(start + BLOCK, size))


def equal(stored: Sequence[tensors_lib.Tensor], size: int) -> bool:
  """Return True if the first elements of several tensors have the same bits."""
  return all(
    np.array_equal(parts[0][1].view(np.uint8), part.view(np.uint8))
    for parts in zip(*(windows(t, size) for t in stored), strict=True)
    for _, part in parts[1:]
  )


def count_broken(tensor: tensors_lib.Tensor, size: int) -> int:
  """Count the NaN and infinite ones among the first elements."""
  return sum(
    int(np.sum(~np.isfinite(part.astype(np.float32, copy=False))))
    for _, part in windows(tensor, size)
  )


def _blocks(tensor: match.Matched) -> Iterator[tuple]:
  """Yield pieces of all tensors, which are taken as [before, count, after].

  `count` is the axis, `before` and `after` are the axes on either side of it. A
  piece has at most `BLOCK` elements: several `before`, else several `count`,
  else a part of `after`.

  Yields:
    The index of the first element, the indices of the axis that it takes, and
    for each tensor float64[before, count, after].
  """
  shape, axis, size = tensor.shape, tensor.axis, tensor.size
  count, after = 1, size
  if axis is not None:
    count, after = shape[axis], math.prod(shape[axis + 1 :])
  units = (1, after, count * after, size)
  fit = sum(unit <= BLOCK for unit in units[:3])
  # A piece is a multiple of a unit, and lies within the next larger one.
  unit, bound = max(units[fit - 1], 1), units[fit]
  view = ((1, 1, -1), (1, -1, after), (-1, count, after))[fit - 1]
  block = BLOCK // unit * unit
  buffers = np.empty((len(tensor.stored), min(block, size)))
  start = 0
  while start < size:
    stop = min(start + block, start // bound * bound + bound, size)
    pieces = []
    for stored, buffer in zip(tensor.stored, buffers, strict=True):
      piece = buffer[: stop - start]
      piece[:] = stored.read(start, stop)
      pieces.append(piece.reshape(view))
    first = start // after % count
    yield start, slice(first, first + pieces[0].shape[1]), *pieces
    start = stop
