"""Batches for training N models and for evaluating them, read by Grain."""

from collections.abc import Callable
import functools
import math
import sys

import grain
import numpy as np

from modelstock_jax.data import benchmarks
from modelstock_jax.data import preprocessing
from modelstock_jax.data import shifts
from modelstock_jax.data import sources

Batch = dict[str, np.ndarray]
Decode = Callable[[bytes], np.ndarray]


def steps_per_epoch(source: sources.Source, batch_size: int) -> int:
  """Returns the number of whole batches in one pass: the rest is dropped.

  Args:
    source: the training examples.
    batch_size: examples per model and step.

  Raises:
    ValueError: there is no whole batch.

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


def train_batches(
  source: sources.Source,
  *,
  num_models: int,
  batch_size: int,
  seed: int,
  start: int = 0,
  decode: Decode | None = None,
  cache: bool = False,
  num_threads: int = 2,
) -> grain.DatasetIterator:
  """Reads batches for N models that train side by side, without end.

  Every model passes through the whole source in its own order, drawn anew in
  every epoch. That order depends on the seed, the model and the epoch alone,
  so the batch of a step does not depend on where reading began.

  Args:
    source: the training examples.
    num_models: N; model i sees the same examples whatever N is.
    batch_size: B, examples per model and step.
    seed: of all orders.
    start: the step whose batch comes first.
    decode: from the encoded bytes to `uint8[H, W, C]`, one shape for all.
      `None` decodes and changes nothing else.
    cache: whether to decode the whole source once and keep it in memory:
      for small ones.
    num_threads: of the reader, which keeps twice as many batches ready; 0
      reads within `next`.

  Returns:
    An iterator of `dict(image=uint8[N, B, H, W, C], label=int32[N, B])`;
    `close()` ends its threads.

  Raises:
    ValueError: fewer examples than one batch, or a negative number; on
      reading, images of different shapes.

  >>> source = sources.open_source('digits', 'train[:200]')
  >>> batches = train_batches(source, num_models=2, batch_size=50, seed=0)
  >>> {name: array.shape for name, array in next(batches).items()}
  {'image': (2, 50, 8, 8, 1), 'label': (2, 50)}
  >>> batches.close()
  """
  steps = steps_per_epoch(source, batch_size)
  for name, value, least in (
    ('num_models', num_models, 1),
    ('seed', seed, 0),
    ('start', start, 0),
    ('num_threads', num_threads, 0),
  ):
    if value < least:
      raise ValueError(f'{name}={value}: must be at least {least}')
  read = _reader(source, decode)
  if cache:
    read = _cached(read, len(source))

  # Grain's own shuffle costs 0.1 ms per index on a small source, and draws
  # epoch e from seed + e, which couples models with neighbouring seeds.
  @functools.lru_cache(maxsize=2 * num_models)  # threads may straddle epochs
  def order(model: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((seed, model, epoch))
    return rng.permutation(len(source))

  def batch(step: int) -> Batch:
    epoch, turn = divmod(step, steps)
    places = slice(turn * batch_size, (turn + 1) * batch_size)
    models = [order(model, epoch)[places] for model in range(num_models)]
    return {
      name: array.reshape(num_models, batch_size, *array.shape[1:])
      for name, array in read(np.concatenate(models)).items()
    }

  return iterate(batch, start=start, num_threads=num_threads)


def eval_batches(
  benchmark: benchmarks.Benchmark,
  *,
  batch_size: int,
  data_dir: str | None = None,
  decode: Decode | None = None,
  num_threads: int = 2,
) -> grain.DatasetIterator:
  """Reads every example of a benchmark once, in order, then ends.

  All batches have one shape, so an evaluation step compiles once: the last is
  filled up with blank images that `mask` marks `False`.

  Args:
    benchmark: what to read. Its shift, if any, depends on the place of an
      example in the split alone.
    batch_size: B.
    data_dir: the folder of the prepared data sets; `None` for the bundled.
    decode: as in `train_batches`.
    num_threads: as in `train_batches`.

  Returns:
    An iterator of `dict(image=uint8[B, H, W, C], label=int32[B],
    mask=bool[B])`.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: no such split or shift, or no positive batch size.

  >>> digits = benchmarks.BENCHMARKS['digits']
  >>> [int(b['mask'].sum()) for b in eval_batches(digits, batch_size=256)]
  [256, 256, 85]
  """
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size}: must be at least 1')
  if benchmark.shift is not None:
    shifts.find(benchmark.shift)  # fails here, not in a worker thread
  source = sources.open_source(
    benchmark.dataset, benchmark.split, data_dir=data_dir
  )
  read = _reader(source, decode)

  def batch(number: int) -> Batch:
    first = number * batch_size
    places = np.arange(first, min(first + batch_size, len(source)))
    examples = read(places)
    if benchmark.shift is not None:
      examples['image'] = np.stack(
        [
          shifts.apply(benchmark.shift, image, int(place))
          for image, place in zip(examples['image'], places, strict=True)
        ]
      )
    missing = batch_size - len(places)
    examples['mask'] = np.ones(len(places), bool)
    return {
      name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
      for name, array in examples.items()
    }

  return iterate(
    batch,
    length=math.ceil(len(source) / batch_size),
    num_threads=num_threads,
  )


class _Batches:
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
    num_threads: of the reader, which keeps twice as many batches ready; 0
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
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  batches = grain.MapDataset.source(_Batches(batch, length))
  iterator = iter(batches.to_iter_dataset(options))
  iterator.set_state({'next_index': start})
  return iterator


def _reader(
  source: sources.Source, decode: Decode | None
) -> Callable[[np.ndarray], Batch]:
  decode = decode or functools.partial(
    preprocessing.decode, channels=source.channels
  )

  def read(places: np.ndarray) -> Batch:
    records = [source[int(place)] for place in places]
    images = [decode(record['image']) for record in records]
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
      raise ValueError(
        f'{source.name}: a batch has images of {len(shapes)} shapes, such as '
        f'{shapes[0]} and {shapes[-1]}: pass a decode= that resizes and crops'
      )
    labels = [record['label'] for record in records]
    return {'image': np.stack(images), 'label': np.array(labels, np.int32)}

  return read


def _cached(
  read: Callable[[np.ndarray], Batch], length: int
) -> Callable[[np.ndarray], Batch]:
  everything = read(np.arange(length))
  return lambda places: {
    name: array[places] for name, array in everything.items()
  }
