"""CAR-FT as a `Task`: what a tower says of the context of images is to stay.

Commands: `modelstock train --config=experiments/baselines/car_ft.py
--workdir=...` on handwritten digits; on ImageNet with CLIP ViT-B/16 `modelstock
train --config=experiments/baselines/car_ft.py:clip_vit_b16 --workdir=...
--config.data.data_dir=...`. Then `modelstock evaluate --workdir=...`, with the
same `--config`.

Cross-entropy and the divergence, over the templates of the prompts, between
what the pretrained and the fine-tuned tower say (Mao et al. Context-aware
robust fine-tuning. arXiv:2211.16175). Built from its abstract and a third
party's program, not from the paper's text. The program has the same direction
and mean over classes, but takes the softmax of bare cosines, which a head of
`clip.zero_shot_head` scales by 100. The weight of 1 is that of the program,
not checked against the paper; none was tried beside it. Everything else is that
of `configs/clip_vit_b16.py`, or of `configs/digits.py`, its two models and
their merge included: CAR-FT itself is one of them,
`--config.merge.num_models=1`.

Expected on ImageNet are the paper's numbers: top-1 accuracy in per cent on
ImageNet (IN), on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  CAR-FT         83.2     59.4     73.0   71.3   43.7    49.5

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made. ImageNet: not yet run.
"""

from typing import Any

import flyp
import jax
from jax import numpy as jnp
import numpy as np
import recipes

from modelstock_jax import clip
from modelstock_jax.clip import heads
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import losses
from modelstock_jax.training import sharding
from modelstock_jax.training import task as task_lib


def get_config(name: str = 'digits') -> config_lib.ConfigDict:
  """Return the config of one run, on the data of a recipe."""
  config = recipes.get_config(name)
  with config.unlocked():
    config.car_ft = config_lib.section(weight=1.0)
  return config


def get_task(config: config_lib.ConfigDict) -> task_lib.Task:
  """Return classification with the divergence of contexts in its loss.

  Args:
    config: of the run; `car_ft.weight` is the factor on the divergence.
  """
  weight = config.car_ft.weight
  sizes = config.model.network()
  num_classes = clip_task.count_classes(config.data)
  preprocess = config.data.normalizer()
  model = clip.classifier(
    sizes, num_classes, config.model.dtype, remat=config.train.remat
  )

  def loss(params, variables, batch, key, anchor, consts):
    del key
    image = clip_task.images(preprocess, batch)
    embeddings = model.embed(params, image)
    frozen = model.embed(anchor, image)
    logits = heads.classify(params['head'], embeddings)
    divergence = context_divergence(consts, frozen, embeddings)
    value = clip_task.mixed_cross_entropy(
      config.train.label_smoothing, logits, batch
    )
    metrics = {'accuracy': losses.accuracy(logits, batch['label'])}
    return value + weight * divergence, (metrics, variables)

  templates = flyp.num_templates(config)
  kernel = jax.ShapeDtypeStruct((sizes.embed_dim, templates), jnp.float32)
  bias = jax.ShapeDtypeStruct((templates,), jnp.float32)
  plain: Any = clip_task.task(config, num_classes)

  def load(placement):
    params, variables, _ = plain.load(placement)
    return params, variables, context_head(config, placement)

  return plain._replace(
    loss=loss,
    consts={'kernel': kernel, 'bias': bias},
    load=load,
    flops=0,  # not counted
  )


def context_head(
  config: config_lib.ConfigDict, placement: sharding.Placement
) -> dict[str, jax.Array]:
  """Return the head whose classes are the T templates of the prompts.

  It says of an image embedding which context it is of; a context is described
  by the mean normalised text embedding of all classes in its template.

  Args:
    config: of the run; `model`, `anchor` and `data` matter.
    placement: where the work is done.

  Returns:
    {'kernel': float32[D, T], 'bias': float32[T]}, replicated over the mesh.

  Raises:
    FileNotFoundError: as `flyp.class_tokens`.
    ValueError: likewise; or there is a single template, or no text tower.
  """
  tokens = flyp.class_tokens(config)
  if tokens.shape[1] < 2:
    raise ValueError(
      f'car_ft.weight: anchor.prompts={config.anchor.prompts!r} has '
      f'{tokens.shape[1]} template, so every image is of the same context. '
      'Give two or more, or train without CAR-FT.'
    )
  model, params = flyp.read(config, placement)
  turned = np.ascontiguousarray(tokens.swapaxes(0, 1))
  head = anchor_lib.zero_shot_head(model, params, turned, placement)
  return jax.device_put(head, placement.replicated)


def context_divergence(
  contexts: dict[str, jax.Array], frozen: jax.Array, embeddings: jax.Array
) -> jax.Array:
  """Return how far a tower has moved in what it says of the context of images.

  mean_i KL(p(frozen_i) || p(embeddings_i)), p = softmax over contexts

  A context is a template of the prompts, 'a sketch of a {}.' for instance; its
  description is the normalised mean over classes of its text embeddings.

  Args:
    contexts: {'kernel': float32[D, T], 'bias': float32[T]}: a head whose
      classes are contexts, which `clip.zero_shot_head` makes of text embeddings
      [T, K, D].
    frozen: float32[B, D], of the pretrained tower; no gradient goes there.
    embeddings: float32[B, D], of the tower in training.

  Returns:
    float32[], nats.

  >>> contexts = {'kernel': jnp.eye(2), 'bias': jnp.zeros(2)}
  >>> same = jnp.array([[3.0, 4.0]])
  >>> float(context_divergence(contexts, same, 2 * same))
  0.0
  """
  target = jax.nn.log_softmax(
    heads.classify(contexts, jax.lax.stop_gradient(frozen))
  )
  moved = jax.nn.log_softmax(heads.classify(contexts, embeddings))
  return jnp.mean(jnp.sum(jnp.exp(target) * (target - moved), axis=-1))
