"""The labels of a source, read once and remembered."""

from concurrent import futures
import hashlib
import logging
import pathlib
from typing import Any

import numpy as np

from modelstock_jax.data import cache
from modelstock_jax.data import examples as examples_lib

_log = logging.getLogger(__name__)

_BUNDLED = pathlib.Path(__file__).parent / 'prepared'


def read(source: Any) -> np.ndarray:
  """Return the labels of all records, without decoding an image.

  Records hold label and image together, so the first call reads all of the
  source: 140 GB for the training images of ImageNet. The labels are then kept
  in the folder of the data or, where that cannot be written, in
  $XDG_CACHE_HOME/modelstock_jax. The labels of bundled sets are not kept.

  Args:
    source: records whose labels are `int`.

  Returns:
    `int32[n]`.

  >>> from modelstock_jax.data import sources
  >>> read(sources.open_source('digits', 'test[:3]'))
  array([0, 1, 2], dtype=int32)
  """
  about = f'{source.path} {source.name} {len(source)}'
  digest = hashlib.sha256(about.encode()).hexdigest()[:16]
  places = cache.places(source.path, f'labels_{digest}.npy')
  if _BUNDLED in pathlib.Path(source.path).parents:
    places = []  # small, and the package is not ours to write in
  labels = cache.load(places, (len(source),))
  if labels is not None:
    return labels
  _log.info('Reading %s for its labels.', source.name)
  with futures.ThreadPoolExecutor() as pool:
    labels = examples_lib.stack(
      source.name,
      lambda index: {'label': np.int32(source[index]['label'])},
      len(source),
      pool,
    )['label']
  cache.save(places, labels)
  return labels


def held_out(
  labels: np.ndarray, per_class: int = 26
) -> tuple[np.ndarray, np.ndarray]:
  """Split a training set in two: to train on, and to choose by.

  Args:
    labels: `int[n]`, of all examples.
    per_class: drawn from every class; 26 of ImageNet's are 26,000, as Model
      Soups holds out. What is drawn of a class depends on its label, the
      number of its examples and nothing else.

  Returns:
    The places of both parts, `int64[n - k]` and `int64[k]`, each ascending.

  Raises:
    ValueError: a class has too few examples to leave one; names all of them.

  >>> train, chosen = held_out(np.array([0, 1, 0, 1, 1, 0]), per_class=1)
  >>> len(train), len(chosen)
  (4, 2)
  """
  labels = np.asarray(labels)
  if per_class < 1:
    raise ValueError(f'per_class={per_class}: must be at least 1')
  classes, counts = np.unique(labels, return_counts=True)
  sizes = dict(zip(classes.tolist(), counts.tolist(), strict=True))
  few = {label: size for label, size in sizes.items() if size <= per_class}
  if few or not sizes:
    raise ValueError(
      f'per_class={per_class}: these classes have no more examples: {few}'
    )
  drawn = [
    np.random.default_rng(label).choice(
      np.flatnonzero(labels == label), per_class, replace=False
    )
    for label in sizes
  ]
  chosen = np.sort(np.concatenate(drawn))
  return np.setdiff1d(np.arange(len(labels)), chosen), chosen
