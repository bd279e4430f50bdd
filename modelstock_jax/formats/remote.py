"""Checkpoints in buckets, `s3://` and `gs://`, by TensorStore.

The names of their files and the small files, such as metadata, come into a
folder here, which stands for the checkpoint; of a file of safetensors, its
header. Arrays stay where they are, and are read by windows.
"""

import os
import pathlib
import re
import struct
import tempfile
from typing import Any

from modelstock_jax.formats import text

# Seconds that a request may take, after which an error says so.
TIME_LIMIT = 300.0
_COPIED = re.compile(
  r'.*\.(json|txt|model|jinja|tiktoken|py)|_[A-Z_]+|_sharding|orbax\.checkpoint'
)
# The folders, until this process ends, and the stores that have their files.
_MIRRORS: dict[pathlib.Path, tuple[Any, Any]] = {}


def is_url(path: text.PathLike) -> bool:
  """Return True for the address of something in a bucket."""
  return str(path).startswith(('s3://', 'gs://'))


def mirror(url: str) -> pathlib.Path:
  """Return a folder, or a file in one, that stands for what a bucket holds.

  Args:
    url: of a folder or a file. Credentials are those of the environment; so
      is the server of S3 if it is not Amazon's, `AWS_ENDPOINT_URL`.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: the bucket cannot be read, or not within `TIME_LIMIT`.
  """
  import tensorstore as ts

  url = url.rstrip('/')
  holder = tempfile.TemporaryDirectory(prefix='modelstock_')
  root = pathlib.Path(holder.name, *url.split('/')[2:])  # for messages
  # A header may hold anything.
  with text.explained(f'{url} cannot be read: ', kinds=Exception):
    spec = ts.KvStore.Spec(url).to_json()
    if spec['driver'] == 's3' and 'AWS_ENDPOINT_URL' in os.environ:
      spec['endpoint'] = os.environ['AWS_ENDPOINT_URL']
      spec['aws_region'] = os.environ.get('AWS_REGION', 'us-east-1')
    store = result(ts.KvStore.open(spec))
    _MIRRORS[root] = holder, store
    names = ['']
    if not url.endswith('.safetensors'):
      keys = result(store.list())
      names = [key.decode() for key in keys if key.startswith(b'/')]
      names = [name for name in names if not name.endswith('/')]  # folders
    for name in names:
      path = pathlib.Path(f'{root}{name}')
      if '..' in path.parts:
        raise ValueError(f'{text.shown(name)} leads outside')
      path.parent.mkdir(parents=True, exist_ok=True)
      if path.suffix == '.safetensors':
        (length,) = struct.unpack('<Q', read(path, 0, 8))
        header = read(path, 8, 8 + min(length, text.MAX_BYTES))
        entries = text.parse_json(header, text.MANY_VALUES).values()
        ends = [entry.get('data_offsets', [0, 0])[1] for entry in entries]
        path.write_bytes(struct.pack('<Q', length) + header)
        os.truncate(path, 8 + length + max(ends))
      elif _COPIED.fullmatch(path.name):
        path.write_bytes(read(path, 0, None))
      else:
        path.touch()
  if not names:
    raise FileNotFoundError(
      f'{url}: there is no such folder, nor a file of safetensors. Of buckets, '
      'only Orbax and safetensors are read: copy what is of another format.'
    )
  return root


def kvstore(path: pathlib.Path) -> dict[str, Any]:
  """Return where TensorStore finds a path, in a folder of `mirror` or not."""
  for root, (_, store) in _MIRRORS.items():
    if path.is_relative_to(root):
      spec = store.spec().to_json()
      return {**spec, 'path': spec['path'] + str(path)[len(str(root)) :]}
  return {'driver': 'file', 'path': str(path)}


def read(path: pathlib.Path, start: int, stop: int | None) -> bytes:
  """Read bytes of a file in a folder of `mirror`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it does not have them, or not within `TIME_LIMIT`.
  """
  root = next(root for root in _MIRRORS if path.is_relative_to(root))
  store, key = _MIRRORS[root][1], str(path)[len(str(root)) :]
  answer = result(store.read(key, byte_range=slice(start, stop)))
  if answer.state == 'missing':
    raise FileNotFoundError('there is no such file')
  return answer.value


def result(future: Any) -> Any:
  """Return the result of a future of TensorStore, within `TIME_LIMIT`."""
  try:
    return future.result(timeout=TIME_LIMIT)
  except TimeoutError as error:
    raise ValueError(f'no answer within {TIME_LIMIT:g} s') from error
