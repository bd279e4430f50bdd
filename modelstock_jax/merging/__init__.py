"""Merging models: pure functions on trees of arrays, jax only."""

from modelstock_jax.merging.geometry import interpolation_ratio
from modelstock_jax.merging.soups import uniform_soup
from modelstock_jax.merging.soups import wise_ft
from modelstock_jax.merging.stock import Layer
from modelstock_jax.merging.stock import Layers
from modelstock_jax.merging.stock import Merged
from modelstock_jax.merging.stock import describe
from modelstock_jax.merging.stock import displacement_cosine
from modelstock_jax.merging.stock import model_stock
from modelstock_jax.merging.stock import not_finite
from modelstock_jax.merging.trees import by_path
from modelstock_jax.merging.trees import path_name
from modelstock_jax.merging.trees import stack
from modelstock_jax.merging.trees import unstack

__all__ = [
  'Layer',
  'Layers',
  'Merged',
  'by_path',
  'describe',
  'displacement_cosine',
  'interpolation_ratio',
  'model_stock',
  'not_finite',
  'path_name',
  'stack',
  'uniform_soup',
  'unstack',
  'wise_ft',
]
