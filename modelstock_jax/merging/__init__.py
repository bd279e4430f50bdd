"""Merging models: pure functions on trees of arrays, jax only."""

from modelstock_jax.merging.depth import lines
from modelstock_jax.merging.geometry import interpolation_ratio
from modelstock_jax.merging.greedy import Greedy
from modelstock_jax.merging.greedy import greedy_soup
from modelstock_jax.merging.layers import Layer
from modelstock_jax.merging.layers import Layers
from modelstock_jax.merging.layers import displacement_gram
from modelstock_jax.merging.mono import Mono
from modelstock_jax.merging.mono import mono_soup
from modelstock_jax.merging.periodic import merge_every
from modelstock_jax.merging.soups import uniform_soup
from modelstock_jax.merging.soups import wise_ft
from modelstock_jax.merging.stock import Merged
from modelstock_jax.merging.stock import describe
from modelstock_jax.merging.stock import displacement_cosine
from modelstock_jax.merging.stock import model_stock
from modelstock_jax.merging.stock import not_finite
from modelstock_jax.merging.trajectory import ema
from modelstock_jax.merging.trajectory import swa
from modelstock_jax.merging.trees import by_path
from modelstock_jax.merging.trees import path_name
from modelstock_jax.merging.trees import stack
from modelstock_jax.merging.trees import unstack
from modelstock_jax.merging.yoyo import Scaled
from modelstock_jax.merging.yoyo import yoyo_scale

__all__ = [
  'Greedy',
  'Layer',
  'Layers',
  'Merged',
  'Mono',
  'Scaled',
  'by_path',
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
  'path_name',
  'stack',
  'swa',
  'uniform_soup',
  'unstack',
  'wise_ft',
  'yoyo_scale',
]
