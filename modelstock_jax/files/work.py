"""The merge of matched tensors, by several threads."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax.files import angles
from modelstock_jax.files import blocks
from modelstock_jax.files import match
from modelstock_jax.files import output as output_lib
from modelstock_jax.formats import text
from modelstock_jax.merging import options as options_lib

Groups = Sequence[tuple[str, list[str]]]


class Work(NamedTuple):
  """The settings that all threads share.

  Attributes:
    tensors: by name.
    averaged: names of what is averaged, not merged by its angle.
    paths: of the anchor and the models.
    out: where the result goes.
    options: of the merge.
    strength: multiplies every ratio.
    dtype: of the result; None: the anchor's.
  """

  tensors: Mapping[str, match.Matched]
  averaged: frozenset[str]
  paths: Sequence[pathlib.Path]
  out: output_lib.Output
  options: options_lib.StockOptions
  strength: float
  dtype: np.dtype | None

  def run(
    self,
    groups: Groups,
    threads: int,
    progress: Callable[[int, int], None] | None,
  ) -> None:
    """Merge all groups that are not done yet.

    Args:
      groups: names, and the tensors that share a cosine; of `unit='model'`
        each tensor by itself.
      threads: that work at the same time.
      progress: is called with the bytes that are merged, and all there are.

    Raises:
      ValueError: values are not finite, or integers differ.
    """
    total = sum(tensor.nbytes for tensor in self.tensors.values())
    finished = 0

    def report(names: Sequence[str]) -> None:
      nonlocal finished
      finished += sum(self.tensors[name].nbytes for name in names)
      if progress is not None:
        progress(finished, total)

    done = {record['group'] for record in self.out.records}
    todo = []
    for group, names in groups:
      if group in done:
        report(names)
      else:
        todo.append((group, names))
    # The largest first: nobody has to wait for one at the end.
    todo.sort(key=lambda item: -sum(self.tensors[n].size for n in item[1]))
    with futures.ThreadPoolExecutor(threads) as pool:
      shared = None
      if self.options.unit == 'model':
        merged = [t for t in self.tensors.values() if self._is_merged(t)]
        shared = np.sum(list(pool.map(self._gram, merged)), axis=0)
      for names in pool.map(lambda group: self._layer(group, shared), todo):
        report(names)

  def _is_merged(self, tensor: match.Matched) -> bool:
    return tensor.anchor.floating and tensor.name not in self.averaged

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

  def _layer(
    self, group: tuple[str, list[str]], shared: np.ndarray | None
  ) -> list[str]:
    """Merge the tensors that share a cosine, and return their names."""
    name, names = group
    tensors = [self.tensors[name].cached() for name in names]
    merged = [tensor for tensor in tensors if self._is_merged(tensor)]
    record: dict[str, Any] = {
      'group': name,
      'tensors': [tensor.name for tensor in merged],
    }
    ratio = np.ones(())
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
      moved = (squares.reshape(-1, squares.shape[-1]) > 0).any(axis=0)
      record |= {
        'cosine': cosine.tolist(),
        'ratio': ratio.tolist(),
        'moved': moved.tolist(),
      }
    for tensor in tensors:
      self._write(tensor, ratio if self._is_merged(tensor) else np.ones(()))
    self.out.done(record)
    return names

  def _write(self, tensor: match.Matched, ratio: np.ndarray) -> None:
    if not tensor.anchor.floating:
      if not blocks.equal(tensor.stored, tensor.size):
        raise ValueError(
          f'{text.plain(tensor.name)}: {tensor.anchor.dtype} values differ, '
          'and only floating-point weights are merged. Counters: save the '
          'models without them. Quantised weights: take the checkpoints before '
          'they were quantised.'
        )
      for start, part in blocks.windows(tensor.anchor, tensor.size):
        self.out.write(tensor.name, start, part)
      return
    dtype = self.dtype or tensor.anchor.dtype
    rows = self._rows(tensor) if np.ndim(ratio) else None
    for start, part in blocks.blend(
      tensor.stored, tensor.size, ratio, dtype, rows
    ):
      # All other dtypes reach 3e38.
      if dtype == np.float16 and not np.all(np.isfinite(part)):
        raise ValueError(
          f'{text.plain(tensor.name)}: has values above 65504, which float16 '
          'does not hold. Give --dtype bfloat16 or float32.'
        )
      self.out.write(tensor.name, start, part)
