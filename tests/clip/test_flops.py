import math

import jax
from jax import numpy as jnp
import pytest

from modelstock_jax import clip
from modelstock_jax.clip import flops

TINY = clip.CLIPConfig(
  embed_dim=5,
  vision=clip.VisionConfig(8, 2, width=12, depth=3, heads=2, channels=1),
  text=None,
)
CLASSES = 7


def test_of_a_small_tower_by_hand():
  # 16 patches of 4 pixels and the class token: 17 tokens of 12 features.
  patches = 16 * 4 * 12
  query_key_value_out = 4 * 17 * 12 * 12
  scores_and_values = 2 * (17 * 17) * 12  # over both heads of 6 features
  mlp = 17 * 12 * 48 + 17 * 48 * 12
  block = query_key_value_out + scores_and_values + mlp
  projection, head = 12 * 5, 5 * 7
  products = patches + 3 * block + projection + head
  assert flops.forward(TINY, CLASSES) == 2 * products
  assert flops.train(TINY, CLASSES) == 3 * 2 * products - 2 * patches


@pytest.mark.parametrize(
  ('width', 'depth', 'patch_size', 'billions'),
  [(768, 12, 32, 4.41), (768, 12, 16, 17.56), (1024, 24, 16, 61.55)],
)
def test_of_published_towers(width, depth, patch_size, billions):
  # Of torchvision's vit_b_32, vit_b_16 and vit_l_16, as its table of models has
  # them: multiply-adds, for all that the column says GFLOPS. Their heads, of
  # 1000 classes, are on the features themselves.
  vision = clip.VisionConfig(224, patch_size, width, depth, width // 64)
  config = clip.CLIPConfig(width, vision, text=None)
  ours = flops.forward(config, 1000) - 2 * width**2
  assert ours / 2e9 == pytest.approx(billions, abs=0.01)


def _programs(config, batch):
  """The classifier's forward pass and gradient, and shapes to call them by."""
  model = clip.classifier(config, CLASSES)
  params = jax.eval_shape(model.init, jax.random.key(0))
  size, channels = config.vision.image_size, config.vision.channels
  images = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)

  def loss(params, images):
    return jnp.sum(model.apply(params, images))

  return (
    {flops.forward: model.apply, flops.train: jax.grad(loss)},
    params,
    images,
  )


@pytest.mark.parametrize('count', [flops.forward, flops.train])
def test_equals_the_products_of_the_program(count):
  batch = 3
  programs, params, images = _programs(TINY, batch)
  jaxpr = jax.make_jaxpr(programs[count])(params, images)
  assert _products(jaxpr.jaxpr) == batch * count(TINY, CLASSES)


@pytest.mark.parametrize('count', [flops.forward, flops.train])
def test_is_most_of_what_xla_counts(count):
  # XLA also counts what is done element by element: below 1 % at this width.
  batch = 2
  programs, params, images = _programs(clip.SIZES['ViT-B/32'], batch)
  lowered = jax.jit(programs[count]).lower(params, images)
  actual = lowered.compile().cost_analysis()['flops']
  expected = batch * count(clip.SIZES['ViT-B/32'], CLASSES)
  assert expected < actual < 1.01 * expected


def _products(jaxpr):
  """2 x M x N x K of every dot in a jaxpr and those within it."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      result = equation.outvars[0].aval.shape
      total += 2 * math.prod(result) * math.prod(left[i] for i in contracted)
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += _products(inner)
  return total
