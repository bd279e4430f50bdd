import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.training import anchor as anchor_lib


def test_missing_weights_are_named_with_those_that_ship(tiny_config):
  config = tiny_config({'anchor.weights': '/nowhere/w.safetensors'})
  with pytest.raises(
    FileNotFoundError, match=r"anchor.weights: '/nowhere/w.*mini_clip"
  ):
    anchor_lib.load(config)


def test_no_weights_at_all(tiny_config):
  with pytest.raises(FileNotFoundError, match=r"anchor.weights: ''"):
    anchor_lib.load(tiny_config({'anchor.weights': ''}))


def test_missing_data_set_is_named(tiny_config):
  with pytest.raises(FileNotFoundError, match="'imagenet2012'"):
    anchor_lib.load(tiny_config({'data.dataset': 'imagenet2012'}))


def test_weights_of_another_network_are_refused(tiny_config):
  with pytest.raises(ValueError, match='image/'):
    anchor_lib.load(tiny_config({'model.image.width': 12}))


def test_a_name_is_what_ships(tiny_config):
  config = tiny_config({'anchor.weights': 'mini_clip'})
  assert anchor_lib.weights_path(config).name == 'mini_clip.safetensors'


def test_head_is_the_mean_over_templates(tiny_config):
  """In numpy, class by class, from the text tower's embeddings."""
  config = tiny_config()
  params = anchor_lib.load(config)
  model = clip.create(anchor_lib.network_config(config))
  like = jax.eval_shape(model.init, jax.random.key(0))
  weights = clip.load_safetensors(config.anchor.weights, like)
  for name in jax.tree.leaves(
    jax.tree.map(
      lambda a, b: bool(jnp.array_equal(a, b)),
      params['image'],
      weights['image'],
    )
  ):
    assert name
  names = [data.describe(n) for n in data.class_names('digits')]
  for index in (0, 9):
    tokens = data.zero_shot_tokens(names)[index]
    texts = np.asarray(model.encode_text(weights, tokens), np.float64)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    mean = texts.mean(0)
    np.testing.assert_allclose(
      params['head']['kernel'][:, index],
      100 * mean / np.linalg.norm(mean),
      rtol=1e-5,
      atol=1e-4,
    )
  assert not np.any(params['head']['bias'])
