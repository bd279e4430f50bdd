"""CLIP models and classifiers as named tuples of pure functions."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import heads
from modelstock_jax.clip import network

Params = dict[str, Any]


class Model(NamedTuple):
  """A classifier: what training, merging and evaluation know of a network.

  Attributes:
    init: key[] -> params, nested dicts of float32.
    apply: params, images float[B, Y, X, C] -> logits float32[B, K].
    embed: params, images -> embeddings float32[B, D], not normalised.
  """

  init: Callable[[jax.Array], Params]
  apply: Callable[[Params, jax.Array], jax.Array]
  embed: Callable[[Params, jax.Array], jax.Array]


class CLIP(NamedTuple):
  """Both towers. Embeddings are not normalised.

  Attributes:
    config: the sizes.
    init: key[] -> params `{'image': ..., 'text': ..., 'logit_scale': ...}`,
      nested dicts of float32; 'logit_scale' is the logarithm of the scale.
    encode_image: params, images float[B, Y, X, C] -> float32[B, embed_dim].
    encode_text: params, tokens int[B, T] -> float32[B, embed_dim]. An error
      where there is no text tower.
  """

  config: clip_config.CLIPConfig
  init: Callable[[jax.Array], Params]
  encode_image: Callable[[Params, jax.Array], jax.Array]
  encode_text: Callable[[Params, jax.Array], jax.Array]


def create(
  config: clip_config.CLIPConfig,
  dtype: jax.typing.DTypeLike = jnp.float32,
  *,
  remat: str = 'none',
) -> CLIP:
  """Create the functions of a CLIP.

  Args:
    config: the sizes; `SIZES` holds OpenAI's.
    dtype: dtype of the products. Parameters are float32 whatever it is.
    remat: what the backward pass of the image tower computes again to save
      memory: 'none'; all of each 'block' but its input; or all but the
      products with weights ('dots').

  Returns:
    `init(key)` gives `{'image': ..., 'text': ..., 'logit_scale': float32[]}`,
    initialised as OpenAI's text tower is (biases at zero; the image tower by
    the same rule), without 'text' and 'logit_scale' where `config.text` is
    None. `encode_image` and `encode_text` read their own tower only.

  Raises:
    ValueError: `remat` is not known.

  >>> from modelstock_jax import clip
  >>> model = clip.create(clip.SIZES['ViT-B/32'])
  >>> params = jax.eval_shape(model.init, jax.random.key(0))
  >>> sum(leaf.size for leaf in jax.tree.leaves(params))
  151277313
  """
  if remat not in network.REMAT:
    raise ValueError(f'remat={remat!r} must be one of {[*network.REMAT]}.')
  vision: Any = network.VisionTower(config, dtype, remat)
  text: Any = network.TextTower(config, dtype) if config.text else None

  @jax.jit
  def init(key: jax.Array) -> Params:
    key_image, key_text = jax.random.split(key)
    size, channels = config.vision.image_size, config.vision.channels
    images = jnp.zeros((1, size, size, channels), jnp.float32)
    params = {'image': vision.init(key_image, images)['params']}
    if text:
      tokens = jnp.zeros((1, 1), jnp.int32)
      params['text'] = text.init(key_text, tokens)['params']
      params['logit_scale'] = jnp.asarray(math.log(1 / 0.07), jnp.float32)
    return params

  def encode_image(params: Params, images: jax.Array) -> jax.Array:
    return vision.apply({'params': params['image']}, images)

  def encode_text(params: Params, tokens: jax.Array) -> jax.Array:
    if not text:
      raise ValueError(
        'This CLIP has no text tower (config.text is None): its checkpoint '
        'holds an image tower only. Load one that holds both.'
      )
    return text.apply({'params': params['text']}, tokens)

  return CLIP(config, init, encode_image, encode_text)


def classifier(
  config: clip_config.CLIPConfig,
  num_classes: int,
  dtype: jax.typing.DTypeLike = jnp.float32,
  *,
  remat: str = 'none',
) -> Model:
  """Create the functions of an image tower with a classification head.

  logits = (f / |f|) @ kernel + bias, where f is the image embedding.

  Args:
    config: the sizes; the text tower is not used.
    num_classes: number K of classes.
    dtype: dtype of the tower's products. Parameters and logits are float32.
    remat: see `create`.

  Returns:
    `init(key)` gives `{'image': ..., 'head': {'kernel': [D, K], 'bias': [K]}}`.
    'image' has the structure of CLIP's, so that a pretrained tower drops in,
    and `zero_shot_head` makes a 'head'.

  Raises:
    ValueError: `num_classes` is not a positive integer, `remat` not known.

  >>> from modelstock_jax import clip
  >>> model = clip.classifier(clip.SIZES['ViT-B/32'], num_classes=1000)
  >>> params = jax.eval_shape(model.init, jax.random.key(0))
  >>> images = jnp.zeros((2, 224, 224, 3))
  >>> jax.eval_shape(model.apply, params, images).shape
  (2, 1000)
  """
  if type(num_classes) is not int or num_classes < 1:
    raise ValueError(f'num_classes={num_classes!r} must be a positive integer.')
  tower = create(dataclasses.replace(config, text=None), dtype, remat=remat)

  @jax.jit
  def init(key: jax.Array) -> Params:
    _, key_head = jax.random.split(key)
    shape = (config.embed_dim, num_classes)
    kernel = jax.random.normal(key_head, shape, jnp.float32)
    head = {
      'kernel': kernel * config.embed_dim**-0.5,
      'bias': jnp.zeros(num_classes, jnp.float32),
    }
    return {**tower.init(key), 'head': head}

  def apply(params: Params, images: jax.Array) -> jax.Array:
    return heads.classify(params['head'], tower.encode_image(params, images))

  return Model(init, apply, tower.encode_image)
