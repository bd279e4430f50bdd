"""The programs of a run without data, for the benchmarks of training.

Nothing here needs what reads images, which a borrowed machine may not have.
"""

from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax

from modelstock_jax import clip
from modelstock_jax.training import losses
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib
from modelstock_jax.training import step as step_lib
from modelstock_jax.training import task as task_lib

SIZES = {
  'tiny': clip.CLIPConfig(
    embed_dim=32,
    vision=clip.VisionConfig(32, 8, width=64, depth=2, heads=2),
    text=None,
  ),
  'B/32': clip.SIZES['ViT-B/32'],
  'B/16': clip.SIZES['ViT-B/16'],
  'L/14': clip.SIZES['ViT-L/14'],
}
CLASSES = 1000
MODELS = 2
# Of CLIP, pixels in 0..1; as the rest, what a run's config has if not told.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LEARNING_RATE = 3e-5
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
STEPS_PER_EPOCH = 1_281_167 // 512


class Classifier(NamedTuple):
  """A network, its optimizer, and the step that is made of them."""

  model: clip.Model
  optimizer: task_lib.Optimizer
  schedule: optax.Schedule
  recipe: step_lib.Recipe


def classifier(
  size: str, dtype: str, *, remat: str = 'none', models: str = 'vmap'
) -> Classifier:
  """Makes the training step of a run on ImageNet, at a size of `SIZES`.

  >>> classifier('tiny', 'bfloat16').recipe.models
  'vmap'
  """
  model = clip.classifier(SIZES[size], CLASSES, dtype, remat=remat)
  adamw = optimizer_lib.from_optax(
    optimizer_lib.adamw(weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
  )
  schedule = optimizer_lib.warmup_cosine(
    LEARNING_RATE, warmup_steps=500, total_steps=10 * STEPS_PER_EPOCH
  )
  recipe = step_lib.Recipe(
    task_of(model),
    adamw,
    lambda step, hyper: schedule(step),
    models=models,
    num_models=MODELS,
  )
  return Classifier(model, adamw, schedule, recipe)


def task_of(model: clip.Model) -> task_lib.Task:
  """Makes a task of a network: cross-entropy, without what reads images."""

  def loss(params, variables, batch, key, anchor, consts):
    del key, anchor, consts
    logits = model.apply(params, normalize(batch['image']))
    value = losses.cross_entropy(logits, batch['label'])
    metrics = {'accuracy': losses.accuracy(logits, batch['label'])}
    return value, (metrics, variables)

  return task_lib.Task(
    init=lambda key: (model.init(key), {}),
    loss=loss,
    score=lambda deployed, variables, batch: {},
    example={},
    layers=clip.clip_layers,
  )


def create(built: step_lib.Programs, anchor: Any) -> state_lib.State:
  """Makes both models at the anchor."""
  models = np.arange(MODELS, dtype=np.int32)
  return built.create(anchor, {}, np.uint32(0), models)


def place(batch_size: int) -> sharding.Placement:
  """Both models on one device."""
  return sharding.place(
    stock=1,
    num_models=MODELS,
    batch_size=batch_size,
    devices=jax.devices()[:1],
  )


def build(
  recipe: step_lib.Recipe, placement: sharding.Placement
) -> step_lib.Programs:
  """The programs of a run, not compiled yet."""
  return step_lib.compile_programs(recipe, placement)


def batch(size: str, batch_size: int) -> dict[str, np.ndarray]:
  """Noise: 'image' uint8[N, B, H, W, C], 'label' int32[N, B]."""
  vision = SIZES[size].vision
  rng = np.random.default_rng(0)
  shape = (MODELS, batch_size)
  pixels = (vision.image_size, vision.image_size, vision.channels)
  return {
    'image': rng.integers(256, size=(*shape, *pixels), dtype=np.uint8),
    'label': rng.integers(CLASSES, size=shape, dtype=np.int32),
  }


def normalize(images: jax.Array) -> jax.Array:
  """uint8[..., C] to float32, as `data.normalize` does."""
  mean, std = jnp.array(MEAN), jnp.array(STD)
  dims = tuple(range(images.ndim - 1))
  pixels = images.astype(jnp.float32) / 255
  return (pixels - jnp.expand_dims(mean, dims)) / jnp.expand_dims(std, dims)


def milliseconds(values: list[float]) -> dict[str, Any]:
  """The least of some times, and their median."""
  return {'min_ms': min(values), 'median_ms': float(np.median(values))}
