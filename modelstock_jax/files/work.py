"""The merge of matched tensors, by several threads."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import contextlib
import os
import pathlib
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

from modelstock_jax.files import angles
from modelstock_jax.files import blocks
from modelstock_jax.files import lora
from modelstock_jax.files import match
from modelstock_jax.files import methods
from modelstock_jax.files import output as output_lib
from modelstock_jax.formats import text
from modelstock_jax.merging import options as options_lib

Gram = tuple[np.ndarray, float, np.ndarray]  # as `blocks.gram` returns it


class Measured(NamedTuple):
  """Measurements of tensors that share a cosine.

  Attributes:
    names: names of the tensors.
    cosine: float64[] mean cosine of the displacements, or one for each filter
      or stacked layer; NaN of one model.
    ratio: the ratio that was used, shaped as the cosine; float64[K] of several
      outputs.
    gram: float64[N, N] inner products of the displacements, their sum if there
      are several.
    square: inner product of the anchor with itself.
    unmoved: int64[N] elements that are the anchor's, by model.
    size: number of elements.
    eps: spacing of the dtype above 1, the widest of the checkpoints'.
    errors: what truncation to a rank loses of adapters, by name.
  """

  names: list[str]
  cosine: np.ndarray
  ratio: np.ndarray
  gram: np.ndarray
  square: float
  unmoved: np.ndarray
  size: int
  eps: float
  errors: Mapping[str, float]


class Work(NamedTuple):
  """The settings that all threads share.

  Attributes:
    tensors: tensors by name.
    paths: paths of the anchor and the models.
    out: output that the result is written to; None measures only.
    options: options of Model Stock.
    strength: multiplies every ratio of Model Stock.
    method: the method.
    scales: K ratios by tensor; None: those of Model Stock.
    rank: the largest rank of a merged displacement; None: that of all.
  """

  tensors: Mapping[str, match.Matched]
  paths: Sequence[pathlib.Path]
  out: output_lib.Output | None
  options: options_lib.StockOptions
  strength: float
  method: methods.Method
  scales: Mapping[str, np.ndarray] | None
  rank: int | None

  def run(
    self,
    groups: Sequence[list[str]],
    threads: int,
    progress: Callable[[int, int], None],
  ) -> list[Measured]:
    """Merge groups.

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
    total, done, measured = sum(map(self.nbytes, groups)), 0, []
    stored = [x for t in self.tensors.values() for x in t.stored]
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    # The cache of files would not keep them until they are read again, and new
    # memory for it costs more time than the merge.
    large = sum(x.size * x.dtype.itemsize for x in stored) > memory / 2
    with futures.ThreadPoolExecutor(threads) as pool:
      grams = {}
      if self.options.unit == 'model':
        merged = [t for t in self.tensors.values() if t.merged]
        each = pool.map(self._gram, merged)
        grams = dict(zip((t.name for t in merged), each, strict=True))
      results: Any = pool.map(lambda names: self._merge(names, grams), groups)
      with contextlib.closing(results):  # starts no more if progress raises
        for names, result in zip(groups, results, strict=True):
          measured += [result] if result else []
          for name in names if large else ():
            for tensor in self.tensors[name].stored:
              tensor.forget()
          done += self.nbytes(names)
          progress(done, total)
    return measured

  def nbytes(self, names: Iterable[str]) -> int:
    """Return the bytes of tensors, in the result."""
    return sum(self.tensors[name].nbytes for name in names)

  def _gram(self, tensor: match.Matched) -> Gram:
    tensor = tensor.cached()
    if tensor.anchor.factors:
      gram = lora.gram(tensor), 0.0, np.zeros(len(self.paths) - 1, np.int64)
    else:
      gram = blocks.gram(tensor)
    if np.isfinite(gram[0]).all():
      return gram
    if blocks.equal(tensor.stored, tensor.size):  # such as a mask of -inf
      return np.zeros_like(gram[0]), 0.0, gram[2]
    counts = [blocks.count_broken(each, tensor.size) for each in tensor.stored]
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
    self, names: list[str], grams: Mapping[str, Gram]
  ) -> Measured | None:
    """Merge the tensors that share a cosine; None if they have no cosine."""
    tensors = [self.tensors[name].cached() for name in names]
    merged = [tensor for tensor in tensors if tensor.merged]
    parts = {t.name: grams.get(t.name) or self._gram(t) for t in merged}
    measured = self._measure(merged, parts, grams) if merged else None
    errors: dict[str, float] = {}
    for tensor in tensors:
      # 0 x would change the -inf of a mask, which has no displacement.
      still = tensor.name in parts and not np.any(parts[tensor.name][0])
      copied = not tensor.anchor.floating or (
        still and not tensor.anchor.factors
      )
      if copied and blocks.equal(tensor.stored, tensor.size):
        self._copy(tensor)
      elif not tensor.anchor.floating:
        raise ValueError(
          f'{text.plain(tensor.name)}: {tensor.anchor.dtype} values differ, '
          'and only floating-point weights are merged. Counters: save the '
          'models without them. Quantised weights: take the checkpoints before '
          'they were quantised.'
        )
      elif self.out is not None:
        ratios = np.ones(1)
        if self.scales is not None:
          ratios = self.scales[tensor.name]
        elif measured is not None and tensor.merged:
          ratios = measured.ratio[None]
        errors |= self._blend(tensor, ratios)
    return measured and measured._replace(errors=errors)

  def _measure(
    self,
    merged: Sequence[match.Matched],
    parts: Mapping[str, Gram],
    grams: Mapping[str, Gram],
  ) -> Measured:
    """Measure the tensors that share a cosine; of a model, given `grams`."""
    gram, square, unmoved = (
      np.sum(part, axis=0) for part in zip(*parts.values(), strict=True)
    )
    every = np.sum([x for x, *_ in grams.values()], axis=0) if grams else gram
    cosine = angles.mean_cosine(every, self.options.average, self.options.clip)
    if self.scales is not None:
      ratio = np.squeeze(self.scales[merged[0].name])
    else:
      ratio = angles.ratio(
        cosine,
        gram.shape[-1],
        clip=self.options.clip,
        strength=self.strength,
      )
    stored = [each for tensor in merged for each in tensor.stored]
    return Measured(
      [tensor.name for tensor in merged],
      cosine,
      ratio,
      gram.reshape(-1, *gram.shape[-2:]).sum(axis=0),
      square,
      unmoved,
      sum(tensor.size for tensor in merged) or 1,
      max(float(ml_dtypes.finfo(each.dtype).eps) for each in stored),
      {},
    )

  def _copy(self, tensor: match.Matched) -> None:
    count = len(self.method.outputs())
    stream = blocks.windows(tensor.anchor, tensor.size)
    self._write(tensor, ((tensor.name, at, [x] * count) for at, x in stream))

  def _blend(
    self, tensor: match.Matched, ratios: np.ndarray
  ) -> dict[str, float]:
    """Merge a tensor; return what truncation loses of an adapter, by name."""
    if tensor.anchor.factors:
      [ratio] = ratios
      arrays, error = lora.blend(tensor, ratio, self.rank)
      self._write(tensor, ((name, 0, [x]) for name, x in arrays.items()))
      return {tensor.name: error}
    weights = self.method.weigh(len(tensor.stored) - 1)
    stream = blocks.blend(tensor, ratios, weights)
    self._write(tensor, ((tensor.name, at, parts) for at, parts in stream))
    return {}

  def _write(self, tensor: match.Matched, stream: Iterable[tuple]) -> None:
    """Write pieces: a name, the first element, and elements for each output."""
    try:
      with np.errstate(over='raise'):
        for name, start, parts in stream:
          for folder, part in zip(self.method.outputs(), parts, strict=True):
            part = part.astype(tensor.dtype, copy=False)
            if self.out is not None:
              self.out.write(f'{folder}{name}', start, part)
    except FloatingPointError as error:
      raise ValueError(
        f'{text.plain(tensor.name)}: has values that {tensor.dtype} does not '
        'hold. Give --dtype bfloat16 or float32.'
      ) from error
