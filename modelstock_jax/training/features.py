"""Frozen image embeddings of a whole split, and a file that keeps them."""

from collections.abc import Callable
import functools
import hashlib
import logging
import os
import pathlib
from typing import Any
from typing import NamedTuple
import zipfile
import zlib

import jax
import numpy as np

from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.clip import heads
from modelstock_jax.formats import write
from modelstock_jax.training import sharding

Params = Any

# What numpy and zipfile raise: TypeError for a file of a single array,
# NotImplementedError for a compression that damage has made up.
_DAMAGE = (
  OSError,
  ValueError,
  EOFError,
  KeyError,
  TypeError,
  NotImplementedError,
  zipfile.BadZipFile,
  zlib.error,
)

_log = logging.getLogger(__name__)


class Features(NamedTuple):
  """Of every example of a split, in its order."""

  features: np.ndarray  # float32[n, D], of length 1
  labels: np.ndarray  # int32[n]


def image_features(
  encode: Callable[[Params, jax.Array], jax.Array],
  preprocess: Callable[[jax.Array], jax.Array],
  params: Params,
  placement: sharding.Placement,
  benchmark: data.Benchmark,
  *,
  image_size: int,
  batch_size: int,
  data_dir: str | None = None,
) -> Features:
  """Embeds every example once, on all devices.

  Compiled once for the same `encode`, `preprocess` and shapes: pass the same
  functions again for the next split.

  Args:
    encode: params, images -> embeddings float[B, D], such as
      `clip.create(config).encode_image`.
    preprocess: uint8 images to what `encode` takes.
    params: of `encode`, replicated over the mesh.
    placement: batches are spread over all its devices.
    benchmark: what to embed; for a split of training data
      `data.Benchmark('train', 'digits', 'train[:200]')`.
    image_size: of the network, pixels: CLIP's own transform.
    batch_size: examples in a step; rounded up to a multiple of the devices.
    data_dir: where prepared data sets are; None for those that ship.

  Returns:
    `Features`, normalised to length 1.

  Raises:
    FileNotFoundError: the data set is not in `data_dir`.
    ValueError: no such split, or no positive batch size.
  """
  batch_size += -batch_size % placement.mesh.size
  source = data.open_benchmark(benchmark, data_dir)
  features, labels = [], []
  batches = data.eval_batches(
    source,
    batch_size=batch_size,
    read=data.benchmark_reader(benchmark, source, image_size),
    rows=sharding.local_rows(placement, batch_size),
  )
  try:
    for batch in batches:
      batch = sharding.to_global(batch, placement.examples)
      found = _embed(encode, preprocess, placement.replicated, params, **batch)
      # On the host at once: all of ImageNet's may not fit on the devices.
      rows, label, mask = map(np.asarray, found)
      features.append(rows[mask])
      labels.append(label[mask])
  finally:
    batches.close()
  return Features(np.concatenate(features), np.concatenate(labels))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(encode, preprocess, replicated, params, *, image, label, mask):
  rows = heads.normalize(encode(params, preprocess(image)))
  # Every process takes all of them home.
  return jax.lax.with_sharding_constraint((rows, label, mask), replicated)


def digest(params: Params, *settings: object) -> str:
  """A key of what features depend on: SHA-256 of weights and settings.

  Args:
    params: of the network.
    *settings: whatever else the features depend on, such as the benchmark,
      mean and std; their `repr` counts.

  Returns:
    64 hexadecimal digits.

  >>> digest({'w': np.zeros(2)}, 'train') == digest({'w': np.zeros(2)}, 'test')
  False
  """
  found = hashlib.sha256(repr(settings).encode())
  for path, leaf in jax.tree.leaves_with_path(params):
    array = np.asarray(leaf, order='C')
    name = f'{merging.path_name(path)} {array.dtype.name} {array.shape}'
    found.update(name.encode())
    found.update(array.tobytes())
  return found.hexdigest()


def cached_features(
  path: str | os.PathLike[str], key: str, compute: Callable[[], Features]
) -> Features:
  """The features in a file, computed and written if it is not of this key.

  Args:
    path: the .npz file. Its folder exists.
    key: of all that the features depend on, as `digest` makes it.
    compute: called if there is no such file, if its key is another, or,
      with a warning in the log, if it is damaged.

  Returns:
    The features, equal bit for bit whether read or computed.

  >>> import tempfile
  >>> compute = lambda: Features(np.ones((3, 2), np.float32), np.arange(3))
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = pathlib.Path(folder, 'train.npz')
  ...   first = cached_features(path, 'key', compute)
  ...   again = cached_features(path, 'key', lambda: 1 / 0)
  >>> again.features.shape
  (3, 2)
  """
  path = pathlib.Path(path)
  found = _read(path, key)
  if sharding.all_processes_agree(found is not None):
    assert found is not None
    return found
  found = compute()
  if jax.process_index():
    return found
  with write.replacing(path) as temporary, temporary.open('wb') as file:
    np.savez(file, key=np.array(key), **found._asdict())
  return found


def _read(path: pathlib.Path, key: str) -> Features | None:
  try:
    with np.load(path, allow_pickle=False) as file:
      if str(file['key']) != key:
        return None
      return Features(file['features'], file['labels'])
  except FileNotFoundError:
    return None
  except _DAMAGE as error:
    _log.warning('%s cannot be read and is written again: %s', path, error)
    return None
