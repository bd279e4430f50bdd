"""One of several processes that evaluate together: INDEX COUNT PORT DATA_DIR.

Prints the scores that it has found: of two models, on four benchmarks.
"""

import json
import sys

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import model as model_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import evaluation
from modelstock_jax.training import sharding

SIZE = 4
NAMES = ('imagenet_r', 'imagenet_a', 'objectnet', 'imagenet_real')


def main(index, count, port, data_dir):
  if int(count) > 1:
    jax.distributed.initialize(f'localhost:{port}', int(count), int(index))
  placement = sharding.place(stock=1, batch_size=8)
  evaluate = evaluation.Evaluator(
    clip_task.classification(
      model_lib.Model(lambda key: key, _apply, _apply),
      lambda images: images.astype(jnp.float32),
      clip.VisionConfig(SIZE, SIZE, width=8, depth=1, heads=2),
    ),
    placement,
    batch_size=24,
    data_dir=data_dir,
    image_size=SIZE,
  )
  rng = np.random.default_rng(0)
  models = rng.integers(-9, 9, (2, SIZE * SIZE * 3, 1000)).astype(np.float32)
  # Answers that the second model is biased to, of which some are right.
  models[1][:, [1, 4, 57, 250]] += 9
  placed = [jax.device_put(model, placement.replicated) for model in models]
  scores = [evaluate(placed, data.BENCHMARKS[name]) for name in NAMES]
  print(json.dumps(scores), flush=True)


def _apply(params, images):
  flat = jnp.reshape(images, (images.shape[0], -1))
  return jnp.matmul(flat, params, precision=jax.lax.Precision.HIGHEST)


if __name__ == '__main__':
  main(*sys.argv[1:])
