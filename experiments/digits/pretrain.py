"""Contrastive pretraining of the demo's CLIP on captioned glyphs.

  python -m experiments.digits.pretrain PATH [--config.pretrain.seed=1]

writes the weights that `modelstock demo --config.anchor.weights=PATH` takes;
those in the package are of seed 0.
"""

import argparse
from collections.abc import Sequence
import contextlib
import functools
import json
import pathlib
import sys

import jax
from jax import numpy as jnp
import numpy as np
import optax

from experiments.digits import glyphs
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.cli import interrupts
from modelstock_jax.clip import heads
from modelstock_jax.data import captions
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import metrics
from modelstock_jax.training import optimizer
from modelstock_jax.training import validation


class Settings(config_keys.Section):
  """The section `pretrain` of a config.

  Attributes:
    steps: of training
    batch_size: examples in a step
    learning_rate: peak of the warm-up and the cosine
    warmup_steps: steps of the linear warm-up
    weight_decay: of AdamW
    seed: of the initialisation, the order and the captions
  """

  steps: config_keys.Positive
  batch_size: config_keys.Positive
  learning_rate: config_keys.NotNegativeFloat
  warmup_steps: config_keys.NotNegative
  weight_decay: config_keys.NotNegativeFloat
  seed: config_keys.NotNegative


CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'


def check(config: config_lib.ConfigDict) -> Settings:
  """Return the section `pretrain`; raise ValueError if it is not valid."""
  return validation.parse(Settings, config.pretrain, 'pretrain.')


def pretrain(
  config: config_lib.ConfigDict,
  path: str | pathlib.Path,
) -> list[float]:
  """Train both towers from scratch and write them to a safetensors file.

  Args:
    config: the run's; `model`, `data` and `pretrain` matter.
    path: the file to write, atomically.

  Returns:
    The loss of each step, in nats.
  """
  settings = check(config)
  model = clip.create(config.model.network())
  schedule = optimizer.warmup_cosine(
    settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    total_steps=settings.steps,
  )
  adamw = optimizer.from_optax(
    optimizer.adamw(weight_decay=settings.weight_decay, clip_norm=1.0)
  )
  normalize = config.data.normalizer()

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
    params, opt_state = adamw.step(
      params, grads, opt_state, schedule(index), None, {}
    )
    return params, opt_state, value

  params = model.init(jax.random.key(settings.seed))
  opt_state = jax.jit(adamw.init)(params)
  names = [captions.describe(name) for name in data.class_names('glyphs')]
  rng = np.random.default_rng((settings.seed, 1))
  drawn = glyphs.glyph_batches(
    batch_size=settings.batch_size, seed=settings.seed
  )
  losses = []
  with (
    contextlib.closing(drawn) as batches,
    metrics.progress(settings.steps, start=0, title='pretrain') as bar,
  ):
    for index, batch in zip(range(settings.steps), batches, strict=False):
      labels = batch['label']
      tokens = caption_tokens(names, labels, rng)
      params, opt_state, value = step(
        params, opt_state, jnp.int32(index), batch['image'], tokens, labels
      )
      losses.append(float(value))
      bar.update()
      bar.set_postfix_str(f'loss {losses[-1]:.3f}')
  made_by = {
    'model': config.model.to_json(),
    'pretrain': config.pretrain.to_json(),
    'pixels': json.dumps(
      dict(zip(('mean', 'std'), config.data.pixels, strict=True))
    ),
  }
  clip.save_safetensors(params, path, metadata=made_by)
  return losses


def caption_tokens(
  names: Sequence[str], labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Caption every example with its class in a random template.

  Args:
    names: K class names, such as `['digit 0', 'digit 1']`.
    labels: `int[B]`, indices into `names`.
    rng: draws the templates.

  Returns:
    `int32[B, captions.CONTEXT_LENGTH]`.

  >>> rng = np.random.default_rng(0)
  >>> caption_tokens(['digit 0', 'digit 1'], np.array([1, 0, 1]), rng).shape
  (3, 9)
  """
  turns = rng.integers(len(captions.TEMPLATES), size=len(labels))
  return captions.tokenize(
    [
      captions.TEMPLATES[turn].format(names[label])
      for turn, label in zip(turns, labels, strict=True)
    ]
  )


def contrastive_loss(
  images: jax.Array, texts: jax.Array, labels: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """Return CLIP's symmetric loss, with all pairs of equal label as positives.

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


def main() -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.digits.pretrain',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('path', type=pathlib.Path)
  args, overrides = parser.parse_known_args()
  pretrain(config_lib.load(CONFIG, overrides), args.path)


if __name__ == '__main__':
  sys.exit(interrupts.run('python -m experiments.digits.pretrain', main))
