"""Checkpoints that Orbax wrote for any trainer, read through windows.

An item is a folder with `_METADATA`, JSON that lists the keys of each leaf, and
the arrays: zarr or zarr3, in one OCDBT store or in a folder each. Items stand
in the folder of a step, beside what tells that it is complete; steps stand in
the root of a `CheckpointManager`. What is written here is the plainest form
that Orbax reads: zarr, each array one chunk without compression, so that its
file holds the elements in C order.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import math
import os
import pathlib
import re
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax.formats import remote
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

METADATA = '_METADATA'
# Files that tell that a step is complete, the second by a time in it.
_COMMITTED, _STEP = 'commit_success.txt', '_CHECKPOINT_METADATA'
# Files that fit a checkpoint of the same form as they are.
_COMPANIONS = (
  *(_COMMITTED, _STEP, 'orbax.checkpoint'),
  *('_strings.json', '_sharding'),
)
# Items of weights, the likeliest first.
_ITEMS = (*tensors_lib.SUBTREES, 'default', 'items', 'state', 'pytree', 'model')
# Bytes of decoded chunks that all reads share. A window that does not align
# with chunks would decode each chunk once for every window of it, as it would
# larger chunks: arrays of those are read as a whole.
_CACHE = 2**28
# Elements that are read at once, at most, where an axis allows it.
_WINDOW = 2**20


class _Leaf(NamedTuple):
  """A leaf: its keys joined by '/', its array, and all that Orbax states."""

  name: str
  array: str | None
  entry: dict[str, Any]


def find(path: pathlib.Path) -> pathlib.Path | None:
  """Find the item of weights that `path` stands for.

  Args:
    path: an item, the folder of a step, or that of several, of which the latest
      complete one counts.

  Returns:
    The folder of the item; None if there is none.

  Raises:
    ValueError: the step is not complete, or it has several items and none of
      them has a name that trainers use for weights.
  """
  if (path / METADATA).is_file():
    _check_complete(path)
    return path
  folders = sorted(child for child in path.iterdir() if child.is_dir())
  items = {f.name: f for f in folders if (f / METADATA).is_file()}
  if items:
    _check_complete(path)
    names = [name for name in _ITEMS if name in items] or [*items]
    if len(names) > 1 and names[0] not in _ITEMS:
      raise ValueError(
        f'{path} holds several items: {text.listed(items)}. Name the folder of '
        'the one that has the weights.'
      )
    return items[names[0]]
  steps = {
    int(matched[1]): folder
    for folder in folders
    if (matched := re.fullmatch(r'(?:\w+_)?(\d+)', folder.name))
    and _complete(folder)
  }
  return find(steps[max(steps)]) if steps else None


def _complete(step: pathlib.Path) -> bool:
  if (step / _COMMITTED).is_file() or not (step / _STEP).is_file():
    return True  # older versions renamed a folder when it was complete
  return bool(text.read_json(step / _STEP).get('commit_timestamp_nsecs'))


def _check_complete(step: pathlib.Path) -> None:
  if '.orbax-checkpoint-tmp' in str(step) or not _complete(step):
    raise ValueError(
      f'{step} is not complete: the run that wrote it was interrupted. Take '
      'another step.'
    )


def read(
  item: pathlib.Path, select: str | None = None, *, replicas: bool = False
) -> dict[str, tensors_lib.Tensor]:
  """Find the arrays of an item, and read none.

  Args:
    item: the folder of an item, see `find`.
    select: which arrays, see `tensors.select`.
    replicas: see `tensors.select`.

  Returns:
    The arrays by their keys, joined by '/', in the order of the item.

  Raises:
    FileNotFoundError: there is no item.
    ValueError: it is damaged, or nothing is selected.
  """
  import tensorstore as ts

  leaves, meta = _leaves(item)
  arrays = {leaf.name: leaf.array for leaf in leaves if leaf.array is not None}
  names = tensors_lib.select(str(item), arrays, select, replicas=replicas)
  context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE}})
  opened = {
    name: ts.open(
      _spec(item, meta, arrays[source]), read=True, open=True, context=context
    )
    for name, source in names.items()
  }
  named = {}
  for name, future in opened.items():
    where = f'{item}: the array {text.plain(name)}'
    with _explained(where):
      named[name] = _tensor(remote.result(future), where)
  return named


def _tensor(array: Any, where: str) -> tensors_lib.Tensor:
  dtype, shape = array.dtype.numpy_dtype, tuple(array.shape)
  if dtype.name not in tensors_lib.DTYPES or len(shape) > tensors_lib.MAX_RANK:
    raise ValueError(f'it has the dtype {dtype} and the shape {list(shape)}')
  chunk = math.prod(array.chunk_layout.read_chunk.shape or ()) * dtype.itemsize
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if chunk > memory:  # TensorStore would abort
    raise ValueError(
      f'a chunk of it takes {chunk / 1e9:.3g} GB, and this machine has '
      f'{memory / 1e9:.3g} GB of memory'
    )

  def window(start: int, stop: int) -> np.ndarray:
    with _explained(where):
      return _elements(array, start, stop)

  def load() -> np.ndarray:
    with _explained(where):
      return remote.result(array.read()).reshape(shape)

  axis = tensors_lib.last_axis(shape)
  by_windows = window if chunk <= _CACHE else None
  return tensors_lib.Tensor(shape, dtype, load, by_windows, axis)


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
  """Raise what TensorStore raises as a ValueError of one line."""
  try:
    yield
  except (ValueError, OSError) as error:
    cause = text.plain(text.first_line(error))
    raise ValueError(
      f'{where} cannot be read: {cause}. Copy the checkpoint again, or take '
      'another step.'
    ) from error


def _elements(array: Any, start: int, stop: int) -> np.ndarray:
  """Read elements in C order, by slices of the first axis that is cut."""
  if start == stop:
    return np.empty(0, array.dtype.numpy_dtype)
  if not array.rank:
    return remote.result(array.read()).reshape(1)
  row = math.prod(array.shape[1:])
  first, last = start // row, -(-stop // row)
  if row <= _WINDOW:
    rows = remote.result(array[first:last].read()).reshape(-1)
    return rows[start - first * row : stop - first * row]
  parts = [
    _elements(array[i], max(start - i * row, 0), min(stop - i * row, row))
    for i in range(first, last)
  ]
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _spec(
  item: pathlib.Path, meta: Mapping[str, Any], name: str
) -> dict[str, Any]:
  """Return where TensorStore finds an array."""
  kvstore = remote.kvstore(item)
  kvstore['path'] += '/'
  if meta.get('use_ocdbt', (item / 'manifest.ocdbt').is_file()):
    kvstore = {'driver': 'ocdbt', 'base': kvstore, 'path': f'{name}/'}
  else:
    kvstore['path'] += f'{name}/'
  return {
    'driver': 'zarr3' if meta.get('use_zarr3') else 'zarr',
    'kvstore': kvstore,
    # Older versions did not store a chunk of zeros.
    'fill_missing_data_reads': not meta.get(
      'store_array_data_equal_to_fill_value'
    ),
  }


def _leaves(item: pathlib.Path) -> tuple[list[_Leaf], dict[str, Any]]:
  """Return the leaves of an item, and its metadata."""
  path = item / METADATA
  with text.explained(
    f'{path} is not the metadata of an item of Orbax: ',
    kinds=(ValueError, KeyError, TypeError, AttributeError),
  ):
    meta = text.read_json(path, text.MANY_VALUES)
    leaves = [_leaf(entry) for entry in meta['tree_metadata'].values()]
    if len({leaf.name for leaf in leaves}) < len(leaves):
      raise ValueError('two leaves have the same name')
  return leaves, meta


def _leaf(entry: dict[str, Any]) -> _Leaf:
  keys = [str(key['key']) for key in entry['key_metadata']]
  array = '.'.join(keys)
  if not {'', '.', '..'}.isdisjoint(array.split('/')) or '\0' in array:
    raise ValueError(f'{text.shown(array)} cannot be the name of an array')
  kind = entry['value_metadata']['value_type']
  has_array = kind not in ('string', 'None')
  return _Leaf('/'.join(keys), array if has_array else None, entry)


def new_files(
  root: pathlib.Path,
  item: pathlib.Path,
  arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
) -> tuple[dict[str, str], dict[str, bytes]]:
  """Describe a checkpoint of the same form as another, with other arrays.

  Args:
    root: a checkpoint, see `find`.
    item: its item.
    arrays: shape and dtype of each array of the new one, by names that the
      other has. Leaves without an array come along if they are in the same
      sub-tree.

  Returns:
    The file of each array by its name, which is to hold its elements in C
    order; and the contents of all other files by their paths. All paths are
    relative to what `root` becomes.
  """
  leaves, meta = _leaves(item)
  tops = {name.split('/')[0] for name in arrays}
  inner = item.relative_to(root)
  files, others, entries = {}, {}, {}
  for key, leaf in zip(meta['tree_metadata'], leaves, strict=True):
    if leaf.name in arrays:
      shape, dtype = arrays[leaf.name]
      folder = inner / str(leaf.array)
      files[leaf.name] = str(folder / ('.'.join('0' * len(shape)) or '0'))
      others[str(folder / '.zarray')] = _json(_zarray(shape, dtype))
    elif leaf.array or leaf.name.split('/')[0] not in tops:
      continue
    value = {**leaf.entry['value_metadata']}
    value.pop('write_shape', None)  # of the writer's chunks
    entries[key] = {**leaf.entry, 'value_metadata': value}
  others[str(inner / METADATA)] = _json(
    {**meta, 'tree_metadata': entries, 'use_ocdbt': False, 'use_zarr3': False}
  )
  for folder in (item, *item.parents)[: len(inner.parts) + 1]:
    for name in _COMPANIONS:
      if (folder / name).is_file():
        path = str((folder / name).relative_to(root))
        others[path] = (folder / name).read_bytes()
  return files, others


def _zarray(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
  """Return the metadata of a zarr array of one chunk that is not compressed.

  Source: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html
  """
  return {
    'zarr_format': 2,
    'shape': shape,
    'chunks': [max(size, 1) for size in shape],
    # Those of ml_dtypes go by their names.
    'dtype': dtype.name if dtype.kind == 'V' else dtype.str,
    'compressor': None,
    'fill_value': None,
    'filters': None,
    'order': 'C',
    'dimension_separator': '.',
  }


def _json(value: Any) -> bytes:
  return json.dumps(value).encode()
