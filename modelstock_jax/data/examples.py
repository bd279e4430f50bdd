"""Examples: made of records, stacked side by side in threads."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import contextlib
import functools
import logging
import os
import threading
from typing import Any

import numpy as np

from modelstock_jax.data import records

Example = Mapping[str, Any]  # what np.asarray takes, by name
Read = Callable[..., Example]

_log = logging.getLogger(__name__)

# Beyond these, threads wait for one another: about a fifteenth of the work on
# an image of ImageNet's size holds Python's lock.
_MOST_THREADS = 16
# Examples that a thread takes at a time: few, so that threads finish together.
_PART = 8


def generator(
  *, seed: int, model: int, epoch: int, place: int
) -> np.random.Generator:
  """Return the random numbers of one example, from four numbers alone.

  Philox encrypts a counter under a key: the seed is the key, the other three
  are words of the counter, and the word that is left counts the draws. So no
  two examples share numbers. It takes 8 microseconds.

  Args:
    seed: seed of the run, below 2**128.
    model: the model.
    epoch: the epoch.
    place: index of the example in its source.

  Returns:
    A generator at its start.

  >>> rng = generator(seed=0, model=1, epoch=2, place=3)
  >>> rng.random() == generator(seed=0, model=1, epoch=2, place=3).random()
  True
  """
  return np.random.Generator(
    np.random.Philox(key=seed, counter=[0, place, epoch, model])
  )


class BadExamples:
  """A count of the different bad examples, up to a limit."""

  def __init__(self, limit: int):
    self._limit = limit
    self._places: set[int] = set()
    self._lock = threading.Lock()

  def add(self, place: int, error: records.BadExample) -> None:
    """Count a bad example; raise ValueError beyond the limit."""
    with self._lock:
      if place in self._places:
        return
      if len(self._places) >= self._limit:
        raise ValueError(
          f'{error}. Examples that cannot be read: {len(self._places) + 1}, '
          f'max_bad_examples is {self._limit}. Prepare the data again, or '
          'raise the limit'
        ) from error
      self._places.add(place)
      _log.warning(
        '%s. Another example takes its place; %d such so far, at most %d.',
        error,
        len(self._places),
        self._limit,
      )


def make(
  source: records.Source, place: int, read: Read | None, argument: Any
) -> Example:
  """Read a record and make its example.

  Args:
    source: source of the record.
    place: its index.
    read: maps the record and `argument` to the example; None takes the
      record as it is.
    argument: second argument of `read`.

  Returns:
    The example.

  Raises:
    BadExample: `read` raised it; the message names the record.
  """
  record = source[place]
  if read is None:
    return record
  try:
    return read(record, argument)
  except records.BadExample as error:
    name = record.get('file_name', '')
    name = name.decode('utf-8', 'replace') if isinstance(name, bytes) else name
    raise records.BadExample(
      f'{source.name}[{place}]{f" ({name})" if name else ""}: {error}'
    ) from error


def in_memory(
  source: records.Source,
  read: Read | Sequence[Read] | None,
  num_threads: int | None,
) -> records.ArraySource:
  """Read all examples once and keep them.

  Args:
    source: the records.
    read: makes the example of a record and a generator, but draws nothing.
    num_threads: see `thread_pool`.

  Returns:
    The examples.

  Raises:
    ValueError: `read` draws random numbers, or an example is bad.
  """
  rng, untouched = np.random.default_rng(0), np.random.default_rng(0)
  first, *others = read if isinstance(read, Sequence) else [read]
  make(source, 0, first, rng)
  if others or rng.random() != untouched.random():
    raise ValueError(
      f'{source.name}: read draws every example anew: leave out cache'
    )

  one = functools.partial(make, source, read=first, argument=rng)
  with thread_pool(num_threads) or contextlib.nullcontext() as pool:
    arrays = stack(source.name, one, len(source), pool)
  return records.ArraySource(source.name, arrays, source.class_names)


def stack(
  name: str,
  one: Callable[[int], Example],
  count: int,
  pool: futures.Executor | None,
) -> dict[str, np.ndarray]:
  """Stack the examples 0..count - 1, which threads read side by side.

  Args:
    name: name of the source, for messages.
    one: maps the number of an example to the example.
    count: the number of examples, at least 1.
    pool: threads that read; None reads in this thread.

  Returns:
    {name: [count, ...]}.

  Raises:
    ValueError: examples differ in their names, shapes or dtypes.
  """
  first = {key: np.asarray(value) for key, value in one(0).items()}
  kinds = _kinds(first)
  # Each thread copies what it has read: stacking all of them afterwards
  # would be the work of one.
  batch = {
    key: np.empty((count, *array.shape), array.dtype)
    for key, array in first.items()
  }
  for key, array in first.items():
    batch[key][0] = array

  def read(part: range) -> None:
    for number in part:
      example = {key: np.asarray(value) for key, value in one(number).items()}
      if _kinds(example) != kinds:
        raise ValueError(
          f'{name}: a batch has examples of several shapes, such as '
          f'{_listed(kinds)} and {_listed(_kinds(example))}: pass a read= that '
          'makes all of one shape and dtype, as one that resizes and crops'
        )
      for key, array in example.items():
        batch[key][number] = array

  parts = [
    range(start, min(start + _PART, count)) for start in range(1, count, _PART)
  ]
  for _ in map(read, parts) if pool is None else pool.map(read, parts):
    pass  # raises what a thread raised
  return batch


def thread_pool(num_threads: int | None) -> futures.ThreadPoolExecutor | None:
  """Return a pool of threads that read.

  Args:
    num_threads: None is one for each CPU up to 16; 0 is no pool.
  """
  if num_threads == 0:
    return None
  if hasattr(os, 'sched_getaffinity'):  # not on every system
    cpus = len(os.sched_getaffinity(0))
  else:
    cpus = os.cpu_count() or 1
  number = num_threads or min(_MOST_THREADS, cpus)
  return futures.ThreadPoolExecutor(number, thread_name_prefix='decode')


def _kinds(
  example: Mapping[str, np.ndarray],
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  return {key: (array.shape, array.dtype) for key, array in example.items()}


def _listed(kinds: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
  return ', '.join(f'{key} {d}{[*s]}' for key, (s, d) in kinds.items())
