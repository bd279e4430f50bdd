"""Float32 sums over the layers of real models, against float64."""

import functools

import jax
import numpy as np
import pytest

import modelstock_jax as ms

pytestmark = pytest.mark.usefixtures('optimized')

# ViT-B kernels, a flat vector, and rows too long to be added in sequence
SHAPES = [(3072, 768), (768, 3072), (4_000_000,), (2, 1_000_000)]


@functools.cache
def _family(shape):
  rng = np.random.default_rng(0)

  def draw(scale):
    return np.float32(scale) * rng.standard_normal(shape, np.float32)

  # Fine-tuning moves weights little, and here all in part the same way, so
  # that no sum of products averages out.
  anchor = draw(0.02)
  shift = draw(1e-4) + np.float32(1e-4)
  return anchor, [anchor + shift + draw(1e-4) for _ in range(2)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('form', ['list', 'stack', 'jit', 'jit_stack'])
def test_cosines_of_large_layers(merge_layer, shape, form):
  anchor, models = _family(shape)
  _, expected, _ = merge_layer(anchor, models)
  stacked = 'stack' in form
  cosine = functools.partial(ms.displacement_cosine, stacked=stacked)
  if 'jit' in form:
    cosine = jax.jit(cosine)
  got = cosine(anchor, np.stack(models) if stacked else models)
  assert abs(float(got) - expected) < 1e-5


@pytest.mark.parametrize('shape', SHAPES[:1], ids=str)
def test_params_of_large_layers(merge_layer, shape):
  anchor, models = _family(shape)
  params, _, _ = merge_layer(anchor, models)
  merged = ms.model_stock(anchor, models).params
  assert np.max(np.abs(np.asarray(merged) - params)) < 1e-8
