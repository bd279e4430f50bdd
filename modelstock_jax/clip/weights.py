"""Parameters in safetensors files, under flat names such as 'head/kernel'."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from modelstock_jax import merging

PathLike = str | os.PathLike[str]


def save_safetensors(
  params: Any, path: PathLike, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes a tree of arrays to one safetensors file.

  The file appears whole or not at all: it is written beside `path` under a
  temporary name and then renamed.

  Args:
    params: nested dicts of arrays; a leaf's name is its keys joined by '/'.
    path: the file to write. Its folder exists; an older file is replaced.
    metadata: texts to keep in the file, such as the config or the source.

  Raises:
    ValueError: a metadata value is not a string, or `params` has no leaf.
  """
  path = pathlib.Path(path)
  metadata = dict(metadata or {})
  wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
  if wrong:
    raise ValueError(f'{path}: metadata {wrong} must be strings. Use str().')
  # order='C': the file holds a leaf's memory, which may be transposed.
  tensors = {
    name: np.asarray(leaf, order='C') for name, leaf in flatten(params)
  }
  if not tensors:
    raise ValueError(f'{path}: there is no array to save.')
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    safetensors.numpy.save_file(tensors, temporary, metadata)
    temporary.chmod(0o644)  # safetensors leaves it to its owner alone
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def load_safetensors(path: PathLike, like: Any) -> Any:
  """Reads a file of `save_safetensors` into the structure of `like`.

  Args:
    path: the file.
    like: tree of arrays or `jax.ShapeDtypeStruct`, for example
      `jax.eval_shape(model.init, key)`. A leaf with a sharding is placed so,
      one tensor at a time.

  Returns:
    Tree of `jax.Array`, equal to what was saved bit for bit.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, or its names, shapes or dtypes are not
      those of `like`; every difference is listed.

  >>> import tempfile
  >>> params = {'head': {'bias': np.ones(3, np.float32)}}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save_safetensors(params, f'{folder}/w.safetensors', {'source': 'demo'})
  ...   restored = load_safetensors(f'{folder}/w.safetensors', like=params)
  ...   metadata = read_metadata(f'{folder}/w.safetensors')
  >>> restored['head']['bias'].shape, metadata
  ((3,), {'source': 'demo'})
  """
  wanted = dict(flatten(like))
  with open_safetensors(path) as file:
    stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    problems = differences(
      {name: _describe(leaf) for name, leaf in wanted.items()},
      {name: _describe_slice(leaf) for name, leaf in stored.items()},
    )
    if problems:
      raise ValueError(
        f'{path} does not fit the model. Load it with the config it was '
        'trained with.\n  ' + '\n  '.join(problems)
      )
    leaves = [
      jax.device_put(file.get_tensor(name), getattr(leaf, 'sharding', None))
      for name, leaf in wanted.items()
    ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_metadata(path: PathLike) -> dict[str, str]:
  """Reads the texts kept in a safetensors file, without its tensors.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged.
  """
  with open_safetensors(path) as file:
    return file.metadata() or {}


def existing(path: PathLike) -> pathlib.Path:
  """The path of a file that is there; FileNotFoundError otherwise."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such file.')
  return path


def open_safetensors(path: PathLike) -> Any:
  """Opens a file for reading; its errors are those of `read_metadata`."""
  existing(path)
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is not a whole safetensors file ({error}). Copy it again.'
    ) from error


def differences(wanted: dict[str, str], stored: dict[str, str]) -> list[str]:
  """Complaints where a file does not hold what a model takes.

  Args:
    wanted: descriptions of the model's tensors, by name.
    stored: of the file's.

  >>> differences({'a': '[2]', 'b': '[3]'}, {'b': '[4]', 'c': '[5]'})
  ['missing a: [2]', 'b: file has [4], the model takes [3]', 'extra c: [5]']
  """
  problems = []
  for name in sorted(wanted.keys() | stored.keys()):
    if name not in stored:
      problems.append(f'missing {name}: {wanted[name]}')
    elif name not in wanted:
      problems.append(f'extra {name}: {stored[name]}')
    elif wanted[name] != stored[name]:
      problems.append(
        f'{name}: file has {stored[name]}, the model takes {wanted[name]}'
      )
  return problems


def flatten(tree: Any) -> list[tuple[str, Any]]:
  """The leaves of a tree, each with its keys joined by '/'."""
  return [
    (merging.path_name(path), leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]


def _describe(leaf: Any) -> str:
  return f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _describe_slice(stored: Any) -> str:
  return f'{dtype_name(stored)}{stored.get_shape()}'


def dtype_name(stored: Any) -> str:
  """Numpy's name of the dtype of a safetensors slice."""
  # safetensors writes F32, BF16, I8, U8, BOOL where numpy writes float32, ...
  code = stored.get_dtype()
  kind = code.rstrip('0123456789')
  return _KINDS.get(kind, kind) + code.removeprefix(kind)


_KINDS = {
  'F': 'float',
  'BF': 'bfloat',
  'I': 'int',
  'U': 'uint',
  'BOOL': 'bool',
}
