"""Model Stock in JAX: `import modelstock_jax as ms` gives the merge.

Training, networks, data and the command line are sub-packages, imported by
name; what is here needs nothing but jax.
"""

import importlib
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
  from modelstock_jax.merging import Greedy
  from modelstock_jax.merging import Layer
  from modelstock_jax.merging import Merged
  from modelstock_jax.merging import Mono
  from modelstock_jax.merging import Scaled
  from modelstock_jax.merging import describe
  from modelstock_jax.merging import displacement_cosine
  from modelstock_jax.merging import displacement_gram
  from modelstock_jax.merging import ema
  from modelstock_jax.merging import greedy_soup
  from modelstock_jax.merging import interpolation_ratio
  from modelstock_jax.merging import lines
  from modelstock_jax.merging import merge_every
  from modelstock_jax.merging import model_stock
  from modelstock_jax.merging import mono_soup
  from modelstock_jax.merging import not_finite
  from modelstock_jax.merging import stack
  from modelstock_jax.merging import swa
  from modelstock_jax.merging import uniform_soup
  from modelstock_jax.merging import unstack
  from modelstock_jax.merging import wise_ft
  from modelstock_jax.merging import yoyo_scale

__version__ = '0.1.0'

__all__ = [
  'Greedy',
  'Layer',
  'Merged',
  'Mono',
  'Scaled',
  'describe',
  'displacement_cosine',
  'displacement_gram',
  'ema',
  'greedy_soup',
  'interpolation_ratio',
  'lines',
  'merge_every',
  'model_stock',
  'mono_soup',
  'not_finite',
  'stack',
  'swa',
  'uniform_soup',
  'unstack',
  'wise_ft',
  'yoyo_scale',
]


def __getattr__(name: str) -> Any:
  # On first use, so that `modelstock --help` does not wait for jax.
  if name in __all__:
    return getattr(importlib.import_module('modelstock_jax.merging'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*globals(), *__all__]
