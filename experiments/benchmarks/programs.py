"""The programs of a run on ImageNet, on images of noise.

Nothing here imports what reads images, which a borrowed machine may not have.
"""

from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax import clip
from modelstock_jax.training import losses
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import step as step_lib
from modelstock_jax.training import task as task_lib

SIZES = {
  'tiny': clip.CLIPConfig(
    32, clip.VisionConfig(32, 8, width=64, depth=2, heads=2), None
  ),
  **{name: clip.SIZES[f'ViT-{name}'] for name in ('B/32', 'B/16', 'L/14')},
  '1B': clip.CLIPConfig(
    1024, clip.VisionConfig(224, 14, width=1408, depth=40, heads=16), None
  ),
}
DTYPES = ('bfloat16', 'float32')
CLASSES = 1000
MODELS = 2
# What a run's config has by default.
LEARNING_RATE = 3e-5
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
SCHEDULE = optimizer_lib.warmup_cosine(
  LEARNING_RATE, warmup_steps=500, total_steps=25_000
)
ADAMW = optimizer_lib.from_optax(
  optimizer_lib.adamw(weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
)


class Run(NamedTuple):
  """The programs of two models on one device, and a batch for them."""

  placement: sharding.Placement
  programs: step_lib.Programs
  batch: dict[str, jax.Array]

  def start(self, anchor: Any) -> tuple[Any, ...]:
    """Return arguments of `programs.create`: both models at the anchor."""
    return anchor, {}, np.uint32(0), np.arange(MODELS, dtype=np.int32)


def prepare(
  size: str,
  dtype: str,
  batch_size: int,
  *,
  remat: str = 'none',
  models: str = 'vmap',
) -> Run:
  """Make the programs of a run.

  Args:
    size: of `SIZES`.
    dtype: of the products.
    batch_size: images of each model.
    remat: see `train.remat` of a config.
    models: 'vmap' or 'map', see `train.models` of a config.
  """
  model = clip.classifier(SIZES[size], CLASSES, dtype, remat=remat)
  placement = sharding.place(
    stock=1,
    batch_size=batch_size,
    devices=jax.devices()[:1],
  )
  task = task_lib.Task(
    init=lambda key: (model.init(key), {}),
    loss=lambda params, variables, batch, key, anchor, consts: (
      loss(model, params, batch),
      ({}, variables),
    ),
    score=lambda deployed, variables, batch: {},
    example={},
    layers=clip.clip_layers,
  )
  recipe = step_lib.Recipe(
    task, ADAMW, lambda step, hyper: SCHEDULE(step), models=models
  )
  programs = step_lib.compile_programs(recipe, placement)
  images = jax.device_put(batch(size, batch_size), placement.batch)
  return Run(placement, programs, images)


def loss(
  model: clip.Model, params: Any, batch: dict[str, jax.Array]
) -> jax.Array:
  """Return the cross-entropy of a batch of one model."""
  pixels = normalize(batch['image'].astype(jnp.float32))
  return losses.cross_entropy(model.apply(params, pixels), batch['label'])


def anchor(size: str) -> Any:
  """Return random params of the classifier, on the device."""
  return jax.jit(clip.classifier(SIZES[size], CLASSES).init)(jax.random.key(0))


def batch(size: str, batch_size: int) -> dict[str, np.ndarray]:
  """Return noise: 'image' uint8[N, B, H, W, C], 'label' int32[N, B]."""
  vision = SIZES[size].vision
  rng = np.random.default_rng(0)
  shape = (MODELS, batch_size)
  pixels = (vision.image_size, vision.image_size, vision.channels)
  return {
    'image': rng.integers(256, size=(*shape, *pixels), dtype=np.uint8),
    'label': rng.integers(CLASSES, size=shape, dtype=np.int32),
  }


def normalize(pixels: Any) -> Any:
  """Scale float pixels of 0..255, of jax or torch, to about unit variance."""
  return (pixels / 255 - 0.5) / 0.25
