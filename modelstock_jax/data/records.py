"""Sources of examples: random access by index, whatever a record holds."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import numpy as np


class Source(Protocol):
  """Records with random access by index: what batches are read from.

  Any class with these four members is a source. Threads call `source[index]`
  at the same time, so it must not depend on the order of the calls.

  Attributes:
    name: name of the data, with its version, and of the split; a run resumes
      only with the same.
    class_names: names of the classes, by label; empty where there are none.

  >>> class Texts:
  ...   name, class_names = 'texts', ()
  ...
  ...   def __len__(self):
  ...     return 4
  ...
  ...   def __getitem__(self, index):
  ...     return {'text': 'ab' * index}
  >>> from modelstock_jax.data import pipeline
  >>> batches = pipeline.eval_batches(
  ...   Texts(), batch_size=4, read=lambda record, i: {'n': len(record['text'])}
  ... )
  >>> next(batches)['n'].tolist()
  [0, 2, 4, 6]
  >>> batches.close()
  """

  name: str
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    """Return the number of records."""
    ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Return the record at `index`, or raise IndexError."""
    ...


class BadExample(ValueError):  # noqa: N818
  """An error of a record that cannot be made an example.

  A `read` function raises it to have another record take the place.
  """


class ArraySource:
  """Records in memory: the rows of some arrays.

  Args:
    name: name of the data, for messages.
    arrays: arrays by the names of the features, each [n, ...].
    class_names: names of the classes, by label; empty where there are none.

  Raises:
    ValueError: there is no array, or they differ in their length.

  >>> source = ArraySource('xor', {'x': [[0, 1], [1, 1]], 'label': [1, 0]})
  >>> len(source), source[0]['x'].tolist(), int(source[0]['label'])
  (2, [0, 1], 1)
  """

  def __init__(
    self,
    name: str,
    arrays: Mapping[str, Any],
    class_names: Sequence[str] = (),
  ):
    self.name = name
    self.class_names = tuple(class_names)
    self._arrays = {key: np.asarray(array) for key, array in arrays.items()}
    shapes = {key: array.shape for key, array in self._arrays.items()}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths:
      raise ValueError(
        f'{name}: arrays have the shapes {shapes}: pass at least one, all of '
        'the same length'
      )

  def __len__(self) -> int:
    return len(next(iter(self._arrays.values())))

  def __getitem__(self, index: int) -> dict[str, Any]:
    check_index(self, index)
    return self.take(index)

  def take(self, places: int | np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows at `places`, int[...], as {name: [..., *shape]}."""
    return {key: array[places] for key, array in self._arrays.items()}


class Chain:
  """Several sources of one length and the same classes, one after another.

  Args:
    parts: the sources, at least one.

  Raises:
    ValueError: they differ in length or classes.
  """

  def __init__(self, parts: Sequence[Source]):
    first = parts[0]
    for part in parts:
      # Of parts of one size, the share of right answers is the parts' mean.
      if len(part) != len(first) or part.class_names != first.class_names:
        raise ValueError(
          f'{part.name} has {len(part)} records, {first.name} has '
          f'{len(first)}, or their classes differ: prepare both again'
        )
    self.name = f'{first.name} to {parts[-1].name}'
    self.class_names = first.class_names
    self.parts = tuple(parts)

  def __len__(self) -> int:
    return len(self.parts) * len(self.parts[0])

  def __getitem__(self, index: int) -> dict[str, Any]:
    check_index(self, index)
    part, place = divmod(index, len(self.parts[0]))
    return self.parts[part][place]


def check_index(source: Source, index: int) -> None:
  """Raise IndexError if a source has no record at `index`."""
  if not 0 <= index < len(source):
    raise IndexError(f'{source.name}[{index}]: it has {len(source)} records')
