"""Batches for training N models and for evaluating them, read by Grain.

Nothing here knows what an example is: a `read` function makes it of a record,
as named arrays. `preprocessing.image_reader` makes such functions for images.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import functools
import math
import sys
from typing import Any

import grain
import numpy as np

from modelstock_jax.data import examples as examples_lib
from modelstock_jax.data import records

Batch = dict[str, np.ndarray]
TrainRead = Callable[
  [dict[str, Any], np.random.Generator], examples_lib.Example
]
EvalRead = Callable[[dict[str, Any], int], examples_lib.Example]


def steps_per_epoch(source: records.Source, batch_size: int) -> int:
  """Return the number of full batches in one pass: the rest is dropped.

  Args:
    source: the training examples.
    batch_size: examples per model and step.

  Raises:
    ValueError: there is no full batch.

  >>> from modelstock_jax.data import records
  >>> steps_per_epoch(records.ArraySource('x', {'x': np.zeros(200)}), 60)
  3
  """
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size}: must be at least 1')
  if len(source) < batch_size:
    raise ValueError(
      f'{source.name} has {len(source)} examples, fewer than one batch of '
      f'{batch_size}: lower batch_size to {len(source)} or less'
    )
  return len(source) // batch_size


class Batches(Iterator[Batch]):
  """Batches in order, prepared ahead in threads that `close()` ends.

  Args:
    batch: maps the number of a batch and the pool of threads that read its
      examples to the batch; pure, so that threads may call it in any order.
    length: number of batches; endless if not given.
    start: the number of the first.
    num_threads: size of the pool, see `examples.thread_pool`; 0 computes within
      `next`, without a pool.

  >>> squares = Batches(
  ...   lambda number, pool: {'x': np.array(number**2)}, start=3, num_threads=1
  ... )
  >>> int(next(squares)['x'])
  9
  >>> squares.close()
  """

  def __init__(
    self,
    batch: Callable[[int, futures.Executor | None], Batch],
    *,
    length: int = sys.maxsize,
    start: int = 0,
    num_threads: int | None,
  ):
    self._pool = pool = examples_lib.thread_pool(num_threads)
    # Two readers, so that the threads go on with the next batch while the
    # last examples of one are on their way.
    readers = 2 if pool else 0
    options = grain.ReadOptions(
      num_threads=readers, prefetch_buffer_size=readers
    )
    batches = grain.MapDataset.range(length).map(
      lambda number: batch(number, pool)
    )
    self._batches = iter(batches.to_iter_dataset(options))
    self._batches.set_state({'next_index': start})

  def __next__(self) -> Batch:
    return next(self._batches)

  def close(self) -> None:
    """End the threads; there is no next batch after this."""
    if self._pool:
      self._pool.shutdown(wait=False, cancel_futures=True)
    self._batches.close()


def train_batches(
  source: records.Source,
  *,
  num_models: int,
  batch_size: int,
  seed: int,
  read: TrainRead | Sequence[TrainRead] | None = None,
  start: int = 0,
  cache: bool = False,
  models: Sequence[int] | None = None,
  rows: slice = slice(None),
  max_bad_examples: int = 0,
  num_threads: int | None = None,
) -> Batches:
  """Read batches for N models that train side by side, without end.

  Every model passes through all examples in its own order, drawn anew in every
  epoch. That order depends on the seed, the model and the epoch alone, and the
  random numbers of an example on these and its place in the source: the batch
  of a step does not depend on where reading began, and a process that reads
  only some models and rows reads the same as one that reads all.

  A record of which `read` raises `BadExample` is logged and replaced by the
  next one in the order of its model that is good.

  Args:
    source: the training examples.
    num_models: N; model i sees the same examples whatever N is.
    batch_size: B, examples per model and step.
    seed: seed of all orders and random numbers.
    read: makes the example of a record: named arrays, of the same shapes and
      dtypes in all examples. It draws from the generator that it gets. One
      for all models, or N of them. `None` takes records as they are.
    start: the step whose batch comes first.
    cache: True reads all examples once and keeps them in memory: for small
      sources, and a `read` that draws nothing. All must be good.
    models: the models that are read here, n of N; None for all.
    rows: rows of each model's batch that this process reads, b of B.
    max_bad_examples: number of different bad records this process may meet;
      one more is an error.
    num_threads: threads that read; two batches are kept ready. None is one for
      each CPU up to 16; 0 reads within `next`.

  Returns:
    An iterator of {name: [n, b, ...]}, for each name that `read` returns;
    `close()` ends its threads.

  Raises:
    ValueError: fewer examples than one batch, or models or rows that are not
      there; a `read` that draws from a cache; on reading, examples of different
      shapes or too many bad ones.

  >>> from modelstock_jax.data import records
  >>> source = records.ArraySource('halves', {'x': np.arange(6) / 2})
  >>> batches = train_batches(source, num_models=2, batch_size=3, seed=0)
  >>> next(batches)['x'].shape
  (2, 3)
  >>> batches.close()
  """
  steps = steps_per_epoch(source, batch_size)
  models = range(num_models) if models is None else models
  if not 0 <= min(models, default=-1) <= max(models, default=-1) < num_models:
    raise ValueError(f'models={models}: must be some of 0..{num_models - 1}')
  local_rows = _rows(rows, batch_size)
  shape = (len(models), len(local_rows))
  bad = examples_lib.BadExamples(max_bad_examples)
  if cache:
    source, read = examples_lib.in_memory(source, read, num_threads), None
  reads = read if isinstance(read, Sequence) else [read] * num_models
  if len(reads) != num_models:
    raise ValueError(
      f'read is a list of {len(reads)}: pass one function or {num_models}'
    )
  in_arrays = read is None and isinstance(source, records.ArraySource)
  # Threads may straddle epochs.
  order = functools.lru_cache(maxsize=2 * num_models)(
    functools.partial(_order, seed, len(source))
  )

  def batch(step: int, pool: futures.Executor | None) -> Batch:
    epoch, turn = divmod(step, steps)
    orders = [order(model, epoch) for model in models]
    first = turn * batch_size
    if in_arrays:
      return source.take(np.stack([o[first:][local_rows] for o in orders]))

    def one(number: int) -> examples_lib.Example:
      column, row = divmod(number, len(local_rows))
      model = models[column]
      for skipped in range(len(source)):
        position = (first + local_rows[row] + skipped) % len(source)
        place = int(orders[column][position])
        rng = examples_lib.generator(
          seed=seed, model=model, epoch=epoch, place=place
        )
        try:
          return examples_lib.make(source, place, reads[model], rng)
        except records.BadExample as error:
          bad.add(place, error)
      raise ValueError(f'{source.name}: no example can be read')

    examples = examples_lib.stack(
      source.name, one, len(models) * len(local_rows), pool
    )
    return {
      name: array.reshape(*shape, *array.shape[1:])
      for name, array in examples.items()
    }

  return Batches(batch, start=start, num_threads=num_threads)


def eval_batches(
  source: records.Source,
  *,
  batch_size: int,
  read: EvalRead | None = None,
  rows: slice = slice(None),
  num_threads: int | None = None,
) -> Batches:
  """Read every example of a source once, in order, then end.

  All batches have one shape, so an evaluation step compiles once: the last is
  filled up with zeros that `mask` marks `False`.

  Args:
    source: the examples.
    batch_size: B.
    read: makes the example of a record and its place in the source: as in
      `train_batches`, but with the place where that has a generator.
    rows: rows of each batch that this process reads, b of B.
    num_threads: see `train_batches`.

  Returns:
    An iterator of {name: [b, ...]}, for each name that `read` returns, and
    `mask`, `bool[b]`; `close()` ends its threads.

  Raises:
    ValueError: no examples, or rows that are not there; on reading, a bad
      example, named by its record, or examples of different shapes.

  >>> from modelstock_jax.data import records
  >>> source = records.ArraySource('halves', {'x': np.arange(5) / 2})
  >>> [b['mask'].tolist() for b in eval_batches(source, batch_size=3)]
  [[True, True, True], [True, True, False]]
  """
  if not len(source):
    raise ValueError(f'{source.name} has no examples: take another split')
  local_rows = _rows(rows, batch_size)

  def batch(number: int, pool: futures.Executor | None) -> Batch:
    first = number * batch_size
    mask = np.array([first + row < len(source) for row in local_rows])
    # One at least, whose shape the blank ones have.
    count = max(1, int(mask.sum()))
    start = first + local_rows[0] if mask[0] else first
    examples = examples_lib.stack(
      source.name,
      lambda i: examples_lib.make(source, start + i, read, start + i),
      count,
      pool,
    )
    for array in examples.values():
      array.resize((len(mask), *array.shape[1:]), refcheck=False)
      array[~mask] = 0
    return {**examples, 'mask': mask}

  return Batches(
    batch,
    length=math.ceil(len(source) / batch_size),
    num_threads=num_threads,
  )


def _order(seed: int, length: int, model: int, epoch: int) -> np.ndarray:
  """Return the order of the examples, int[length]."""
  # Grain's own shuffle costs 0.1 ms per index on a small source, and draws
  # epoch e from seed + e, which couples models with neighbouring seeds.
  return np.random.default_rng((seed, model, epoch)).permutation(length)


def _rows(rows: slice, batch_size: int) -> range:
  """Return the chosen rows of a batch, checked to follow one another."""
  chosen = range(batch_size)[rows]
  if not len(chosen) or chosen.step != 1:
    raise ValueError(
      f'rows={rows}: must be some of the rows of batch_size={batch_size}, one '
      'after another'
    )
  return chosen
