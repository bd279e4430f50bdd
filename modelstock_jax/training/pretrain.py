"""Contrastive pretraining of the demo's CLIP on captioned glyphs."""

from collections.abc import Callable
import functools
import json
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import heads
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import optimizer

Params = Any


def pretrain(
  config: config_lib.ConfigDict,
  path: str | pathlib.Path,
  *,
  report: Callable[[int, float], None] | None = None,
) -> None:
  """Trains both towers from scratch and writes them to a safetensors file.

  Args:
    config: `model`, `data` and `pretrain` matter.
    path: the file to write, atomically.
    report: called with the step and its loss, in nats.
  """
  settings = config.pretrain
  model = clip.create(anchor_lib.network_config(config))
  schedule = optimizer.warmup_cosine(
    settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    total_steps=settings.steps,
  )
  tx = optimizer.adamw(weight_decay=settings.weight_decay, clip_norm=1.0)
  normalize = functools.partial(
    data.normalize, mean=config.data.mean, std=config.data.std
  )

  def loss(params, images, tokens, labels):
    return contrastive_loss(
      model.encode_image(params, normalize(images)),
      model.encode_text(params, tokens),
      labels,
      params['logit_scale'],
    )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, index, images, tokens, labels):
    value, grads = jax.value_and_grad(loss)(params, images, tokens, labels)
    direction, opt_state = tx.update(grads, opt_state, params)
    params = optimizer.apply(params, direction, schedule(index))
    return params, opt_state, value

  params = model.init(jax.random.key(settings.seed))
  opt_state = jax.jit(tx.init)(params)
  names = [data.describe(name) for name in data.class_names('glyphs')]
  rng = np.random.default_rng((settings.seed, 1))
  batches = data.glyph_batches(
    batch_size=settings.batch_size, seed=settings.seed
  )
  try:
    for index in range(settings.steps):
      batch = next(batches)
      tokens = data.caption_tokens(names, batch['label'], rng)
      params, opt_state, value = step(
        params,
        opt_state,
        jnp.int32(index),
        batch['image'],
        tokens,
        batch['label'],
      )
      if report:
        report(index + 1, float(value))
  finally:
    batches.close()
  made_by = {
    'model': config_lib.to_json(config.model),
    'pretrain': config_lib.to_json(settings),
    'pixels': json.dumps({'mean': config.data.mean, 'std': config.data.std}),
  }
  clip.save_safetensors(params, path, metadata=made_by)


def contrastive_loss(
  images: jax.Array, texts: jax.Array, labels: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """CLIP's symmetric loss, with all pairs of equal label as positives.

  Args:
    images: float32[B, D] embeddings, of any length.
    texts: float32[B, D] embeddings of the captions.
    labels: int32[B]; a caption fits every image of its label.
    log_scale: float32[], log of the factor on cosines, at most log 100.

  Returns:
    float32[], nats: the mean over both directions of the cross-entropy
    against the uniform distribution over the positives.

  Source: Radford et al., arXiv:2103.00020, figure 3; several positives as in
  Khosla et al., arXiv:2004.11362, equation 2.
  """
  scale = jnp.exp(jnp.minimum(log_scale, jnp.log(100.0)))
  cosines = jnp.matmul(
    heads.normalize(images),
    heads.normalize(texts).T,
    precision=jax.lax.Precision.HIGHEST,
  )
  same = (labels[:, None] == labels[None, :]).astype(cosines.dtype)
  targets = same / jnp.sum(same, axis=1, keepdims=True)
  logits = scale * cosines
  by_image = optax.softmax_cross_entropy(logits, targets)
  by_text = optax.softmax_cross_entropy(logits.T, targets)
  return (jnp.mean(by_image) + jnp.mean(by_text)) / 2
