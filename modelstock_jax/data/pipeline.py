"""Batches for training N models and for evaluating them, read by Grain."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import contextlib
import functools
import logging
import math
import os
import sys
import threading
from typing import Any
from typing import Protocol

import grain
import numpy as np

from modelstock_jax.data import augment as augment_lib
from modelstock_jax.data import benchmarks
from modelstock_jax.data import preprocessing
from modelstock_jax.data import shifts

Batch = dict[str, np.ndarray]
Decode = Callable[[bytes], np.ndarray]
Augment = Callable[[bytes, np.random.Generator], np.ndarray]

_log = logging.getLogger(__name__)

# Examples that a thread takes at a time: few, so that threads finish together.
_PART = 8
# Beyond these, threads wait for one another: about a fifteenth of the work on
# an image of ImageNet's size holds Python's lock.
_MOST_THREADS = 16

_Example = tuple[np.ndarray, Any]  # an image and its label


class Records(Protocol):
  """What can be read: a `sources.Source`, or another of its kind."""

  name: str
  channels: int

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def steps_per_epoch(source: Records, batch_size: int) -> int:
  """Returns the number of whole batches in one pass: the rest is dropped.

  Args:
    source: the training examples.
    batch_size: examples per model and step.

  Raises:
    ValueError: there is no whole batch.

  >>> from modelstock_jax.data import sources
  >>> steps_per_epoch(sources.open_source('digits', 'train[:200]'), 60)
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
  """Batches in order, prepared ahead in threads that `close()` ends."""

  def __init__(
    self,
    batch: Callable[..., Batch],
    *,
    length: int = sys.maxsize,
    start: int = 0,
    num_threads: int,
  ):
    self._pool = _pool(num_threads)
    # Two readers, so that the threads go on with the next batch while the
    # last examples of one are on their way.
    self._batches = iterate(
      functools.partial(batch, pool=self._pool),
      length=length,
      start=start,
      num_threads=min(2, num_threads),
    )

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, int]:
    """Returns the number of the next batch, as Grain keeps it."""
    return self._batches.get_state()

  def close(self) -> None:
    """Ends the threads; there is no next batch after this."""
    if self._pool is not None:
      self._pool.shutdown(wait=False, cancel_futures=True)
    self._batches.close()


def train_batches(
  source: Records,
  *,
  num_models: int,
  batch_size: int,
  seed: int,
  start: int = 0,
  decode: Decode | None = None,
  augment: Augment | Sequence[Augment] | None = None,
  cache: bool = False,
  models: Sequence[int] | None = None,
  rows: slice = slice(None),
  max_bad_images: int = 0,
  num_threads: int | None = None,
) -> Batches:
  """Reads batches for N models that train side by side, without end.

  Every model passes through all examples in its own order, drawn anew in every
  epoch. That order depends on the seed, the model and the epoch alone, and the
  random numbers of an example on these and its place in the source: the batch
  of a step does not depend on where reading began, and a process that reads
  only some models and rows reads what it would have read of the whole.

  An image that cannot be decoded is logged and replaced by the next one in the
  order of its model that can.

  Args:
    source: the training examples.
    num_models: N; model i sees the same examples whatever N is.
    batch_size: B, examples per model and step.
    seed: of all orders and augmentations.
    start: the step whose batch comes first.
    decode: from the encoded bytes to `uint8[H, W, C]`, one shape for all.
      `None` decodes and changes nothing else.
    augment: as `decode`, with a generator to draw from; instead of it. One
      for all models, or N of them.
    cache: whether to decode all examples once and keep them in memory: for
      small sources, without `augment`. All must be good.
    models: those that are read here, n of N; `None` for all.
    rows: those of each model's batch that this process reads, b of B.
    max_bad_images: how many different images that cannot be decoded this
      process may meet; one more is an error.
    num_threads: that decode; two batches are kept ready. `None` is one for
      each CPU up to 16; 0 reads within `next`.

  Returns:
    An iterator of `dict(image=uint8[n, b, H, W, C], label=int32[n, b])`;
    `close()` ends its threads.

  Raises:
    ValueError: fewer examples than one batch, or numbers out of range; on
      reading, images of different shapes or too many bad ones.

  >>> from modelstock_jax.data import sources
  >>> source = sources.open_source('digits', 'train[:200]')
  >>> batches = train_batches(source, num_models=2, batch_size=50, seed=0)
  >>> {name: array.shape for name, array in next(batches).items()}
  {'image': (2, 50, 8, 8, 1), 'label': (2, 50)}
  >>> batches.close()
  """
  steps = steps_per_epoch(source, batch_size)
  num_threads = _num_threads(num_threads)
  _check_least(
    ('num_models', num_models, 1),
    ('seed', seed, 0),
    ('start', start, 0),
    ('max_bad_images', max_bad_images, 0),
  )
  if augment is not None and (cache or decode is not None):
    raise ValueError(
      f'augment={augment} draws every image anew: leave out '
      f'{"cache" if cache else "decode"}'
    )
  models = range(num_models) if models is None else models
  if not 0 <= min(models, default=-1) <= max(models, default=-1) < num_models:
    raise ValueError(f'models={models}: must be some of 0..{num_models - 1}')
  local_rows = _rows(rows, batch_size)
  shape = (len(models), len(local_rows))
  decode = decode or _plain(source)
  bad = _BadImages(max_bad_images)

  # Grain's own shuffle costs 0.1 ms per index on a small source, and draws
  # epoch e from seed + e, which couples models with neighbouring seeds.
  @functools.lru_cache(maxsize=2 * num_models)  # threads may straddle epochs
  def order(model: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((seed, model, epoch))
    return rng.permutation(len(source))

  def example(model: int, epoch: int, place: int) -> _Example:
    if augment is None:
      return _example(source, place, decode)
    rng = augment_lib.generator(
      seed=seed, model=model, epoch=epoch, place=place
    )
    own = augment[model] if isinstance(augment, Sequence) else augment
    return _example(source, place, lambda encoded: own(encoded, rng))

  def batch(step: int, pool: futures.Executor | None) -> Batch:
    epoch, turn = divmod(step, steps)
    orders = [order(model, epoch) for model in models]
    first = turn * batch_size

    if cached is not None:
      index = np.stack([turns[first:][local_rows] for turns in orders])
      return {name: array[index] for name, array in cached.items()}

    def one(number: int) -> _Example:
      which, row = divmod(number, len(local_rows))
      for turn in range(len(source)):
        position = (first + local_rows[row] + turn) % len(source)
        place = int(orders[which][position])
        try:
          return example(models[which], epoch, place)
        except _BadImage as error:
          bad.add(place, error)
      raise ValueError(f'{source.name}: no image can be decoded')

    examples = _gather(source.name, one, len(models) * len(local_rows), pool)
    return {
      name: array.reshape(*shape, *array.shape[1:])
      for name, array in examples.items()
    }

  cached = None
  if cache:
    with _pool(num_threads) or contextlib.nullcontext() as pool:
      cached = _gather(
        source.name,
        lambda number: _example(source, number, decode),
        len(source),
        pool,
      )
  return Batches(batch, start=start, num_threads=num_threads)


def eval_batches(
  benchmark: benchmarks.Benchmark,
  *,
  batch_size: int,
  data_dir: str | None = None,
  source: Records | None = None,
  decode: Decode | None = None,
  rows: slice = slice(None),
  num_threads: int | None = None,
) -> Batches:
  """Reads every example of a benchmark once, in order, then ends.

  All batches have one shape, so an evaluation step compiles once: the last is
  filled up with blank images that `mask` marks `False`.

  Args:
    benchmark: what to read. Its shift, if any, depends on the place of an
      example in the split alone.
    batch_size: B.
    data_dir: the folder of the prepared data sets; `None` for the bundled.
    source: what `open_benchmark` gave, where that is at hand; it is not opened
      again, and `data_dir` not read.
    decode: as in `train_batches`.
    rows: those of each batch that this process reads, b of B.
    num_threads: as in `train_batches`.

  Returns:
    An iterator of `dict(image=uint8[b, H, W, C], label=int32[b, ...],
    mask=bool[b])`; `close()` ends its threads.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: no such split or shift, or numbers out of range; on reading,
      an image that cannot be decoded, named by its record.

  >>> digits = benchmarks.BENCHMARKS['digits']
  >>> [int(b['mask'].sum()) for b in eval_batches(digits, batch_size=256)]
  [256, 256, 85]
  """
  _check_least(('batch_size', batch_size, 1))
  num_threads = _num_threads(num_threads)
  local_rows = _rows(rows, batch_size)
  shift = benchmark.shift
  if shift is not None:
    shifts.find(shift)  # fails here, not in a worker thread
  if source is None:
    source = benchmarks.open_benchmark(benchmark, data_dir)
  decode = decode or _plain(source)

  def one(place: int) -> _Example:
    image, label = _example(source, place, decode)
    if shift is not None:
      image = shifts.apply(shift, image, place)
    return image, label

  def batch(number: int, pool: futures.Executor | None) -> Batch:
    first = number * batch_size
    mask = np.array([first + row < len(source) for row in local_rows])
    # One at least, whose shape the blank ones have.
    count = max(1, int(mask.sum()))
    start = first + local_rows[0] if mask[0] else first
    examples = _gather(source.name, lambda i: one(start + i), count, pool)
    for array in examples.values():
      array.resize((len(mask), *array.shape[1:]), refcheck=False)
      array[~mask] = 0
    return {**examples, 'mask': mask}

  return Batches(
    batch,
    length=math.ceil(len(source) / batch_size),
    num_threads=num_threads,
  )


class _Numbered:
  """Batches by number: what Grain takes for a source."""

  def __init__(self, batch: Callable[[int], Batch], length: int):
    self._batch = batch
    self._length = length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Batch:
    return self._batch(index)


def iterate(
  batch: Callable[[int], Batch],
  *,
  length: int = sys.maxsize,
  start: int = 0,
  num_threads: int = 2,
) -> grain.DatasetIterator:
  """Iterates over a function of the batch number, ahead of time, in threads.

  Args:
    batch: from the number of a batch to the batch; pure, so that threads may
      call it in any order.
    length: how many there are; endless if not given.
    start: the number of the first.
    num_threads: of the reader, which keeps as many batches ready, or two; 0
      computes within `next`.

  Returns:
    The batches in order. Grain's state of the iterator is the number of the
    next one, and `close()` ends its threads.

  >>> squares = iterate(lambda number: {'x': np.array(number**2)}, start=3)
  >>> int(next(squares)['x']), squares.get_state()
  (9, {'next_index': 4})
  >>> squares.close()
  """
  options = grain.ReadOptions(
    num_threads=num_threads,
    prefetch_buffer_size=max(2, num_threads) if num_threads else 0,
  )
  batches = grain.MapDataset.source(_Numbered(batch, length))
  iterator = iter(batches.to_iter_dataset(options))
  iterator.set_state({'next_index': start})
  return iterator


class _BadImage(ValueError):  # noqa: N818
  """One image cannot be decoded."""


class _BadImages:
  """Counts the different images that cannot be decoded, up to a limit."""

  def __init__(self, limit: int):
    self._limit = limit
    self._places: set[int] = set()
    self._lock = threading.Lock()

  def add(self, place: int, error: _BadImage) -> None:
    with self._lock:
      if place in self._places:
        return
      if len(self._places) >= self._limit:
        raise ValueError(
          f'{error}. Images that cannot be decoded: {len(self._places) + 1}, '
          f'max_bad_images is {self._limit}. Prepare the data again, or raise '
          'the limit'
        ) from error
      self._places.add(place)
      _log.warning(
        '%s. Another image takes its place; %d such so far, at most %d.',
        error,
        len(self._places),
        self._limit,
      )


def _example(
  source: Records, place: int, decode: Callable[[bytes], np.ndarray]
) -> _Example:
  record = source[place]
  try:
    return decode(record['image']), record['label']
  except (OSError, ValueError) as error:
    name = record.get('file_name', '')
    name = name.decode('utf-8', 'replace') if isinstance(name, bytes) else name
    raise _BadImage(
      f'{source.name}[{place}]{f" ({name})" if name else ""}: {error}'
    ) from error


def _gather(
  name: str,
  one: Callable[[int], _Example],
  count: int,
  pool: futures.Executor | None,
) -> Batch:
  """Stacks the examples 0..count - 1, which threads decode side by side."""
  first, label = one(0)
  # Each thread copies what it has decoded: stacking all of them afterwards
  # would be the work of one.
  images = np.empty((count, *first.shape), first.dtype)
  images[0] = first
  labels = [label] * count

  def read(part: range) -> None:
    for number in part:
      image, labels[number] = one(number)
      if image.shape != first.shape:
        raise ValueError(
          f'{name}: a batch has images of several shapes, such as '
          f'{first.shape} and {image.shape}: pass a decode= that resizes and '
          'crops'
        )
      images[number] = image

  if pool is None:
    read(range(1, count))
  else:
    parts = [
      range(start, min(start + _PART, count))
      for start in range(1, count, _PART)
    ]
    for _ in pool.map(read, parts):
      pass  # raises what a thread raised
  return {'image': images, 'label': np.array(labels, np.int32)}


def _plain(source: Records) -> Decode:
  return functools.partial(preprocessing.decode, channels=source.channels)


def _pool(num_threads: int) -> futures.ThreadPoolExecutor | None:
  if not num_threads:
    return None
  return futures.ThreadPoolExecutor(num_threads, thread_name_prefix='decode')


def _num_threads(num_threads: int | None) -> int:
  if num_threads is not None:
    _check_least(('num_threads', num_threads, 0))
    return num_threads
  if hasattr(os, 'sched_getaffinity'):  # not on every system
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))
  return min(_MOST_THREADS, os.cpu_count() or 1)


def _rows(rows: slice, batch_size: int) -> range:
  """The chosen rows of a batch, checked to be some, one after another."""
  chosen = range(batch_size)[rows]
  if not len(chosen) or chosen.step != 1:
    raise ValueError(
      f'rows={rows}: must be some rows of {batch_size}, one after another'
    )
  return chosen


def _check_least(*numbers: tuple[str, int, int]) -> None:
  problems = [
    f'{name}={value}: must be at least {least}'
    for name, value, least in numbers
    if value < least
  ]
  if problems:
    raise ValueError('; '.join(problems))
