"""Pickled dicts of arrays, as Scenic keeps OpenAI's weights."""

from collections.abc import Mapping
import functools
from typing import Any

import numpy as np

from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text


def read(
  path: text.PathLike, *, allow_pickle: bool
) -> dict[str, tensors_lib.Tensor]:
  """Read a pickled dict of arrays.

  Args:
    path: the `.npy` file.
    allow_pickle: unpickling a file can run any code that its author put
      there; True says that it is trusted.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: `allow_pickle` is False, or the file holds something else.
  """
  path = text.existing_file(path)
  if not allow_pickle:
    raise ValueError(
      f'{path} is a pickle, which can run any code when it is read. If you '
      'trust where it comes from, pass allow_pickle=True (--allow-pickle; to '
      '`modelstock train` --config.anchor.allow_pickle=true).'
    )
  try:
    content = np.load(path, allow_pickle=True).item()
  except Exception as error:  # pickle raises whatever it likes
    raise ValueError(
      f'{path} is not a whole .npy file of a dict of arrays: '
      f'{text.plain(str(error))}'
    ) from error
  if not isinstance(content, dict) or not all(
    isinstance(name, str) and isinstance(array, np.ndarray | np.generic)
    for name, array in content.items()
  ):
    raise ValueError(f'{path} does not hold a dict of arrays by name.')
  return {
    name: tensors_lib.Tensor(
      array.shape, array.dtype, functools.partial(np.asarray, array)
    )
    for name, array in content.items()
  }


def write(path: text.PathLike, arrays: Mapping[str, Any]) -> None:
  """Write a pickled dict of arrays, as Scenic reads it. It runs nothing."""
  np.save(path, np.array(dict(arrays), object), allow_pickle=True)
