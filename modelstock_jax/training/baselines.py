"""What a config's way of fine-tuning takes: network, optimizer, reference.

Plain fine-tuning and linear probes (Kumar et al., arXiv:2202.10054), FLYP
(Goyal et al., arXiv:2212.00638), CAR-FT (Mao et al., arXiv:2211.16175) and FTP
(Tian et al., arXiv:2310.19182) are keys of the one trainer; here is what they
need beside it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
import optax

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import flops
from modelstock_jax.clip import model as model_lib
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import projection
from modelstock_jax.training import sharding
from modelstock_jax.training import step as step_lib

Params = Any

# Of CLIP's prompts for ImageNet.
TEMPLATES = 80


def network(config: config_lib.ConfigDict, num_classes: int) -> model_lib.Model:
  """The functions of what is trained.

  `apply` takes what `as_classifier` makes of the params, where it makes
  anything of them.
  """
  sizes = anchor_lib.network_config(config)
  dtype, remat = config.model.dtype, config.train.remat
  model = clip.classifier(sizes, num_classes, dtype, remat=remat)
  if config.train.loss == 'contrastive':
    both = clip.create(sizes, dtype, remat=remat)
    return model_lib.Model(
      both.init, model.apply, both.encode_image, both.encode_text
    )
  if config.train.trainable == 'head':

    def apply(params: Params, images: jax.Array) -> jax.Array:
      tower = jax.lax.stop_gradient(params['image'])
      return model.apply({**params, 'image': tower}, images)

    return model._replace(apply=apply)
  return model


def optimizer(config: config_lib.ConfigDict) -> optax.GradientTransformation:
  """AdamW, on what is trained, with a place for what is learnt beside."""
  train = config.train
  tx = optimizer_lib.adamw(
    weight_decay=train.weight_decay, clip_norm=train.clip_norm
  )
  if train.trainable == 'head':
    tx = optimizer_lib.only('head', tx)
  if train.projection == 'ftp':
    tx = projection.remember(tx, train.projection_exclude)
  return tx


def reference(
  config: config_lib.ConfigDict,
  placement: sharding.Placement,
  anchor: Params,
) -> step_lib.Reference | None:
  """What every step compares with, on the devices; None if nothing.

  Args:
    config: of the run.
    placement: where everything lives.
    anchor: the pretrained weights, as `placement.params`.

  Raises:
    FileNotFoundError: as `anchor.load`.
    ValueError: likewise.
  """
  train = config.train
  found = step_lib.Reference()
  if train.loss == 'contrastive':
    tokens = anchor_lib.class_tokens(config)
    found = found._replace(tokens=jax.device_put(tokens, placement.replicated))
  if train.context_weight:
    contexts = anchor_lib.context_head(config, placement)
    found = found._replace(anchor=anchor, contexts=contexts)
  if train.projection == 'ftp':
    found = found._replace(anchor=anchor)
  return found if jax.tree.leaves(found) else None


def reference_shapes(
  config: config_lib.ConfigDict,
  placement: sharding.Placement,
  anchor: Params,
  num_classes: int,
) -> step_lib.Reference | None:
  """Shapes of `reference`, with their places, without weights and data.

  Args:
    config: of the run.
    placement: where everything would live.
    anchor: shapes of the pretrained weights, with their places.
    num_classes: of the data.
  """
  train, whole = config.train, placement.replicated

  def shape(sizes, dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

  templates = _templates(config)
  found = step_lib.Reference()
  if train.loss == 'contrastive':
    sizes = (num_classes, templates, config.model.text.context_length)
    found = found._replace(tokens=shape(sizes, jnp.int32))
  if train.context_weight:
    kernel = shape((config.model.embed_dim, templates), jnp.float32)
    contexts = {'kernel': kernel, 'bias': shape((templates,), jnp.float32)}
    found = found._replace(anchor=anchor, contexts=contexts)
  if train.projection == 'ftp':
    found = found._replace(anchor=anchor)
  return found if jax.tree.leaves(found) else None


def flops_per_image(config: config_lib.ConfigDict, num_classes: int) -> int:
  """FLOPs of a step on one image, its caption included; see `clip.flops`.

  >>> from modelstock_jax.training import config
  >>> flops_per_image(config.defaults(), 1000) / 1e9
  26.224730112
  """
  train, sizes = config.train, anchor_lib.network_config(config)
  width = sizes.embed_dim
  head = 2 * width * num_classes
  if train.trainable == 'head':  # no gradient but that of its kernel
    return flops.forward(sizes, num_classes) + head
  total = flops.train(sizes, num_classes)
  if train.context_weight:  # two towers, each with its contexts
    contexts = 2 * width * _templates(config)
    total += flops.forward(sizes, num_classes) - head + 3 * contexts
  if train.loss == 'contrastive':
    text = sizes.text
    assert text is not None  # as every config has it
    tokens, wide = text.context_length, text.width
    block = 24 * tokens * wide**2 + 4 * tokens**2 * wide
    caption = text.depth * block + 2 * wide * width
    pairs = 2 * width * train.batch_size
    total += 3 * (caption + pairs - head)
  return total


def _templates(config: config_lib.ConfigDict) -> int:
  """How many there are; of a file of one's own, as many as CLIP's."""
  characters = config.anchor.prompts == 'characters'
  return len(data.TEMPLATES) if characters else TEMPLATES


def as_classifier(
  config: config_lib.ConfigDict, placement: sharding.Placement
) -> Callable[[Params], Params] | None:
  """Makes an image tower with a head of a model's params; None if they are one.

  With `train.loss='contrastive'` the head is the zero-shot one of the model's
  own text tower.

  Args:
    config: of the run.
    placement: where models are.
  """
  if config.train.loss != 'contrastive':
    return None
  both = clip.create(anchor_lib.network_config(config), config.model.dtype)

  def convert(params: Params) -> Params:
    tokens = anchor_lib.class_tokens(config)
    head = anchor_lib.zero_shot_head(both, params, tokens, placement)
    return {
      'image': params['image'],
      'head': jax.device_put(head, placement.replicated),
    }

  return convert
