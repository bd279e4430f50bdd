"""The merge of matched tensors, by several threads."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import pathlib
from typing import NamedTuple

import numpy as np

from modelstock_jax.files import angles
from modelstock_jax.files import blocks
from modelstock_jax.files import match
from modelstock_jax.files import output as output_lib
from modelstock_jax.formats import text
from modelstock_jax.merging import options as options_lib


class Measured(NamedTuple):
  """Measurements of tensors that share a cosine.

  Attributes:
    names: names of the tensors.
    cosine: float64[] mean cosine of the displacements, or float64[filters].
    ratio: the ratio that was used, shaped as the cosine.
    moved: bool[N], True for each model that differs from the anchor.
  """

  names: list[str]
  cosine: np.ndarray
  ratio: np.ndarray
  moved: np.ndarray


class Work(NamedTuple):
  """The settings that all threads share.

  Attributes:
    tensors: tensors by name.
    paths: paths of the anchor and the models.
    out: output that the result is written to.
    options: options of the merge.
    strength: multiplies every ratio.
  """

  tensors: Mapping[str, match.Matched]
  paths: Sequence[pathlib.Path]
  out: output_lib.Output
  options: options_lib.StockOptions
  strength: float

  def run(
    self,
    groups: Sequence[list[str]],
    threads: int,
    progress: Callable[[int, int], None] | None,
  ) -> list[Measured]:
    """Merge all groups.

    Args:
      groups: names of the tensors that share a cosine; with `unit='model'`
        each tensor by itself.
      threads: number of threads.
      progress: is called with the bytes that are merged, and their total.

    Returns:
      The measurements of the groups that have tensors to merge.

    Raises:
      ValueError: values are not finite, or integers differ.
    """

    def size(names: list[str]) -> int:
      return sum(self.tensors[name].nbytes for name in names)

    # The largest first: nobody has to wait for one at the end.
    groups = sorted(groups, key=size, reverse=True)
    total, done, measured = size([*self.tensors]), 0, []
    with futures.ThreadPoolExecutor(threads) as pool:
      shared = None
      if self.options.unit == 'model':
        merged = [t for t in self.tensors.values() if t.merged]
        shared = np.sum(list(pool.map(self._gram, merged)), axis=0)
      results = pool.map(lambda names: self._merge(names, shared), groups)
      for names, result in zip(groups, results, strict=True):
        measured += [result] if result else []
        done += size(names)
        if progress is not None:
          progress(done, total)
    return measured

  def _rows(self, tensor: match.Matched) -> blocks.Rows | None:
    if self.options.unit != 'filter':
      return None
    return blocks.rows_of(tensor.anchor, tensor.size)

  def _gram(self, tensor: match.Matched) -> np.ndarray:
    stored = tensor.cached().stored
    gram = blocks.gram(stored, tensor.size, self._rows(tensor))
    if np.isfinite(gram).all():
      return gram
    counts = [blocks.count_broken(each, tensor.size) for each in stored]
    broken = [
      f'{count} in {path}'
      for count, path in zip(counts, self.paths, strict=True)
      if count
    ]
    what = ', '.join(broken) or 'none, but they are too far apart to be squared'
    raise ValueError(
      f'{text.plain(tensor.name)}: values that are not finite: {what}. Take a '
      'checkpoint from before training diverged.'
    )

  def _merge(
    self, names: list[str], shared: np.ndarray | None
  ) -> Measured | None:
    """Merge the tensors that share a cosine; None if they have no cosine."""
    tensors = [self.tensors[name].cached() for name in names]
    merged = [tensor for tensor in tensors if tensor.merged]
    measured = None
    if merged:
      gram = shared
      if gram is None:
        gram = np.sum([self._gram(tensor) for tensor in merged], axis=0)
      cosine = angles.mean_cosine(gram, self.options.average)
      ratio = angles.ratio(
        cosine,
        gram.shape[-1],
        clip=self.options.clip,
        strength=self.strength,
      )
      squares = np.diagonal(gram, axis1=-2, axis2=-1)
      moved = np.any(squares.reshape(-1, squares.shape[-1]) > 0, axis=0)
      measured = Measured([t.name for t in merged], cosine, ratio, moved)
    for tensor in tensors:
      if not tensor.anchor.floating:
        self._copy(tensor)
      elif measured is None or not tensor.merged:
        self._blend(tensor, np.ones(()))
      else:
        self._blend(tensor, measured.ratio)
    return measured

  def _copy(self, tensor: match.Matched) -> None:
    if not blocks.equal(tensor.stored, tensor.size):
      raise ValueError(
        f'{text.plain(tensor.name)}: {tensor.anchor.dtype} values differ, and '
        'only floating-point weights are merged. Counters: save the models '
        'without them. Quantised weights: take the checkpoints before they '
        'were quantised.'
      )
    for start, part in blocks.windows(tensor.anchor, tensor.size):
      self.out.write(tensor.name, start, part)

  def _blend(self, tensor: match.Matched, ratio: np.ndarray) -> None:
    rows = self._rows(tensor) if ratio.ndim else None
    for start, part in blocks.blend(
      tensor.stored, tensor.size, ratio, tensor.dtype, rows
    ):
      # All other dtypes reach 3e38.
      if tensor.dtype == np.float16 and not np.all(np.isfinite(part)):
        raise ValueError(
          f'{text.plain(tensor.name)}: has values above 65504, which float16 '
          'does not hold. Give --dtype bfloat16 or float32.'
        )
      self.out.write(tensor.name, start, part)
