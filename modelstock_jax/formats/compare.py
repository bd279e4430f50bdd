"""Differences between two sets of named tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from modelstock_jax.formats import text


def differences(
  wanted: Mapping[str, Any], stored: Mapping[str, Any], *, dtypes: bool = True
) -> list[str]:
  """List where a file does not hold the tensors that a model takes.

  Args:
    wanted: the model's tensors by name: anything with a shape and a dtype.
    stored: the file's.
    dtypes: compare dtypes too, not only names and shapes.

  Returns:
    A line for each name, in alphabetical order; empty if they agree.

  >>> a, b, c = (np.zeros(n, np.float32) for n in (2, 3, 4))
  >>> for line in differences({'a': a, 'b': b}, {'b': c, 'c': c}):
  ...   print(line)
  missing a: float32[2]
  b: file has float32[4], the model takes float32[3]
  extra c: float32[4]
  """
  left, right = (
    {
      name: (np.dtype(x.dtype).name if dtypes else '') + str(list(x.shape))
      for name, x in leaves.items()
    }
    for leaves in (wanted, stored)
  )
  problems = []
  for name in sorted(left.keys() | right.keys()):
    label = text.plain(name)
    if name not in right:
      problems.append(f'missing {label}: {left[name]}')
    elif name not in left:
      problems.append(f'extra {label}: {right[name]}')
    elif left[name] != right[name]:
      problems.append(
        f'{label}: file has {right[name]}, the model takes {left[name]}'
      )
  return problems
