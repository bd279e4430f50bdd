"""Parameters in safetensors files, under flat names such as 'head/kernel'."""

from collections.abc import Mapping
from typing import Any

import jax

from modelstock_jax import merging
from modelstock_jax.formats import compare
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import text


def save_safetensors(
  params: Any, path: text.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
  """Write a tree of arrays to one safetensors file, atomically.

  Args:
    params: nested dicts of arrays; a leaf's name is its keys joined by '/'.
    path: the file to write. Its folder exists; an older file is replaced.
    metadata: texts to keep in the file, such as the config or the source.

  Raises:
    ValueError: a metadata value is not a string.
  """
  safetensors.write(path, dict(flatten(params)), metadata or {})


def load_safetensors(path: text.PathLike, like: Any) -> Any:
  """Read a file of `save_safetensors` into the structure of `like`.

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
  >>> import numpy as np
  >>> params = {'head': {'bias': np.ones(3, np.float32)}}
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save_safetensors(params, f'{folder}/w.safetensors', {'source': 'demo'})
  ...   restored = load_safetensors(f'{folder}/w.safetensors', like=params)
  ...   metadata = read_metadata(f'{folder}/w.safetensors')
  >>> restored['head']['bias'].shape, metadata
  ((3,), {'source': 'demo'})
  """
  wanted, stored = dict(flatten(like)), safetensors.read(path).tensors
  problems = compare.differences(wanted, stored)
  text.raise_problems(
    f'{path} does not fit the model. Load it with the config it was trained '
    'with.',
    problems,
  )
  leaves = [
    jax.device_put(stored[name].load(), getattr(leaf, 'sharding', None))
    for name, leaf in wanted.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_metadata(path: text.PathLike) -> dict[str, str]:
  """Read the texts kept in a safetensors file, without its tensors.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged.
  """
  return safetensors.read(path).metadata


def flatten(tree: Any) -> list[tuple[str, Any]]:
  """List the leaves of a tree, each with its keys joined by '/'."""
  return [
    (merging.path_name(path), leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]
