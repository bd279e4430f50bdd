import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax.clip import heads


def test_zero_shot_head_is_the_formula():
  embeddings = np.random.default_rng(0).normal(size=(5, 3, 8)) * 7
  unit = embeddings / np.sqrt((embeddings**2).sum(-1, keepdims=True))
  mean = unit.sum(1) / 3
  expected = 100 * mean / np.sqrt((mean**2).sum(-1, keepdims=True))
  head = clip.zero_shot_head(jnp.asarray(embeddings, jnp.float32))
  assert head['kernel'].dtype == head['bias'].dtype == jnp.float32
  np.testing.assert_allclose(head['kernel'], expected.T, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(head['bias'], np.zeros(5))


def test_logits_are_a_hundred_cosines():
  # One template a class, so each column is that class's direction.
  classes = np.array([[[3.0, 4.0]], [[0.0, -2.0]]], np.float32)
  head = clip.zero_shot_head(jnp.asarray(classes))
  logits = heads.classify(head, jnp.asarray([[30.0, 40.0], [1.0, 0.0]]))
  np.testing.assert_allclose(logits, [[100, -80], [60, 0]], atol=1e-4)


def test_templates_weigh_the_same_whatever_their_length():
  pair = jnp.asarray([[[1000.0, 0.0], [0.0, 0.001]]])
  head = clip.zero_shot_head(pair, scale=1.0)
  np.testing.assert_allclose(head['kernel'], [[0.5**0.5]] * 2, rtol=1e-6)


def test_bfloat16_embeddings_give_a_float32_head():
  head = clip.zero_shot_head(jnp.ones((2, 3, 4), jnp.bfloat16))
  assert head['kernel'].dtype == jnp.float32
  np.testing.assert_allclose(head['kernel'], np.full((4, 2), 50), rtol=1e-6)


@pytest.mark.parametrize('shape', [(3, 4), (3, 0, 4), (0, 3, 4)])
def test_wrong_shape_is_named(shape):
  with pytest.raises(ValueError, match='classes, templates, features'):
    clip.zero_shot_head(jnp.zeros(shape))
