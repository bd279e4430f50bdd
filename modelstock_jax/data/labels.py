"""The labels of a source, read once and remembered."""

from concurrent import futures
import hashlib
import logging
import os
import pathlib
from typing import Any

from etils import epath
import numpy as np

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
  places = _places(source)
  for place in places:
    try:
      with place.open('rb') as file:
        labels = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
      continue
    if labels.shape == (len(source),):
      return labels
  _log.info('Reading %s for its labels.', source.name)
  with futures.ThreadPoolExecutor() as pool:
    labels = examples_lib.stack(
      source.name,
      lambda index: {'label': np.int32(source[index]['label'])},
      len(source),
      pool,
    )['label']
  for place in places:
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      # A reader sees all of it or nothing, whichever process wrote it last.
      temporary = place.with_name(f'{place.name}.{os.getpid()}.tmp')
      with temporary.open('wb') as file:
        np.save(file, labels)
      temporary.replace(place)
      break
    except OSError as error:
      _log.info('The labels cannot be kept in %s: %s', place, error)
  return labels


def present(source: Any) -> tuple[int, ...]:
  """Return the labels that occur in a source, ascending; kept as by `read`."""
  return tuple(np.unique(read(source)).tolist())


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


def user_cache() -> pathlib.Path:
  """Return $XDG_CACHE_HOME/modelstock_jax, for what its folder cannot hold."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'modelstock_jax'


def _places(source: Any) -> list[epath.Path]:
  """Return the files that may keep the labels of this very source."""
  if _BUNDLED in pathlib.Path(source.path).parents:
    return []  # small, and the package is not ours to write in
  about = f'{source.path} {source.name} {len(source)}'
  digest = hashlib.sha256(about.encode()).hexdigest()[:16]
  folders = (source.path, user_cache())
  return [epath.Path(folder) / f'labels_{digest}.npy' for folder in folders]
