"""Merges of models: pure functions on trees of arrays, jax only."""

import importlib
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
  from modelstock_jax.merging.contrib.lines import lines
  from modelstock_jax.merging.contrib.mono import Mono
  from modelstock_jax.merging.contrib.mono import mono_soup
  from modelstock_jax.merging.contrib.yoyo import Scaled
  from modelstock_jax.merging.contrib.yoyo import yoyo_scale
  from modelstock_jax.merging.geometry import interpolation_ratio
  from modelstock_jax.merging.greedy import Greedy
  from modelstock_jax.merging.greedy import greedy_soup
  from modelstock_jax.merging.layers import Layer
  from modelstock_jax.merging.layers import Layers as Layers
  from modelstock_jax.merging.layers import displacement_gram
  from modelstock_jax.merging.leaves import path_name as path_name
  from modelstock_jax.merging.options import StockOptions
  from modelstock_jax.merging.periodic import merge_every
  from modelstock_jax.merging.soups import ema
  from modelstock_jax.merging.soups import swa
  from modelstock_jax.merging.soups import uniform_soup
  from modelstock_jax.merging.soups import wise_ft
  from modelstock_jax.merging.stock import Merged
  from modelstock_jax.merging.stock import describe
  from modelstock_jax.merging.stock import displacement_cosine
  from modelstock_jax.merging.stock import model_stock
  from modelstock_jax.merging.stock import not_finite
  from modelstock_jax.merging.trees import by_path as by_path
  from modelstock_jax.merging.trees import stack
  from modelstock_jax.merging.trees import unstack

__all__ = [
  'Greedy',
  'Layer',
  'Merged',
  'Mono',
  'Scaled',
  'StockOptions',
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

# Of use to the packages above, not to users.
_SHARED = ('Layers', 'by_path', 'path_name')

# In which the names are found, the first that has one.
_MODULES = (
  'options',
  'stock',
  'periodic',
  'layers',
  'geometry',
  'soups',
  'greedy',
  'trees',
  'leaves',
  'contrib.lines',
  'contrib.mono',
  'contrib.yoyo',
)


def __getattr__(name: str) -> Any:
  # On first use, so that `modelstock merge` does not wait for jax.
  if name in __all__ or name in _SHARED:
    for module in _MODULES:
      loaded = importlib.import_module(f'{__name__}.{module}')
      if hasattr(loaded, name):
        return globals().setdefault(name, getattr(loaded, name))
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
