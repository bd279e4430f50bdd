"""Trains, merges and evaluates CLIP ViT-B/32, on JAX_NUM_CPU_DEVICES devices.

Prints as JSON the last evaluation of our trainer, that of Scenic's own
`eval_step` on the checkpoint, and what was written at the merges.
"""

import functools
import json
import pathlib
import resource
import sys

from flax import jax_utils
import jax
import ml_collections
import numpy as np
from scenic.dataset_lib import dataset_utils
from scenic.train_lib import classification_trainer
from scenic.train_lib import train_utils

from modelstock_jax.scenic import models
from modelstock_jax.scenic import trainer

META = dict(
  num_classes=3,
  input_shape=(-1, 224, 224, 3),
  num_train_examples=8,
  num_eval_examples=8,
  input_dtype=np.float32,
  target_is_onehot=False,
)


class Writer:
  """Keeps the scalars that a trainer writes."""

  def __init__(self):
    self.scalars = []

  def write_scalars(self, step, scalars):
    self.scalars.append((step, scalars))

  def flush(self):
    pass


def dataset():
  """Eight images, four a batch, always the same."""
  rng = np.random.default_rng(7)
  inputs = rng.standard_normal((8, 224, 224, 3)).astype(np.float32)
  label = rng.integers(3, size=8).astype(np.int32)

  def batches():
    while True:
      for rows in (slice(0, 4), slice(4, 8)):
        yield dataset_utils.shard(
          {
            'inputs': inputs[rows],
            'label': label[rows],
            'batch_mask': np.ones(4, np.float32),
          }
        )

  return dataset_utils.Dataset(
    train_iter=batches(), valid_iter=batches(), meta_data=META
  )


def config(folder):
  return ml_collections.ConfigDict(
    dict(
      model=dict(variant='vit_b32'),
      optimizer='sgd',
      lr_configs=dict(
        learning_rate_schedule='compound',
        factors='constant',
        base_learning_rate=1e-3,
      ),
      batch_size=4,
      num_training_epochs=2,
      log_eval_steps=100,
      checkpoint=True,
      xprof=False,
      count_flops=False,
      model_stock=dict(
        layers='qkv', mesh_stock=2, anchor=dict(path=str(folder / 'w0'))
      ),
    )
  )


def main(folder):
  settings = config(folder)
  model = models.CLIPClassificationModel(settings, META)
  variables = jax.jit(functools.partial(model.flax_model.init, train=False))(
    jax.random.PRNGKey(3), np.zeros((1, 224, 224, 3), np.float32)
  )
  params = jax.device_get(variables['params'])
  size = sum(x.size for x in jax.tree.leaves(params['visual']))
  # A head that is not zero, or no gradient reaches the tower.
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal(params['head']['kernel'].shape)
  params['head'] = {**params['head'], 'kernel': np.float32(kernel)}
  state = train_utils.TrainState(global_step=0, params=params)
  train_utils.save_checkpoint(str(folder / 'w0'), state)
  del params, variables

  writer = Writer()
  state, _, ours = trainer.train(
    rng=jax.random.PRNGKey(0),
    config=settings,
    model_cls=models.CLIPClassificationModel,
    dataset=dataset(),
    workdir=str(folder / 'run'),
    writer=writer,
  )
  # The structure of a state of Scenic's, to restore the checkpoint into.
  like = jax_utils.unreplicate(state)
  like = like.replace(
    params=jax.tree.map(np.zeros_like, like.params),
    metadata={'chrono': train_utils.Chrono().save()},
  )
  del state
  restored, step = train_utils.restore_checkpoint(str(folder / 'run'), like)
  eval_step = jax.pmap(
    functools.partial(
      classification_trainer.eval_step,
      flax_model=model.flax_model,
      metrics_fn=model.get_metrics_fn('validation'),
    ),
    axis_name='batch',
  )
  restored = jax_utils.replicate(restored.replace(metadata={}))
  data = dataset().valid_iter
  metrics = [
    train_utils.unreplicate_and_get(eval_step(restored, next(data))[0])
    for _ in range(2)
  ]
  theirs = train_utils.log_eval_summary(
    step=step, eval_metrics=metrics, writer=Writer()
  )
  merges = [s for _, s in writer.scalars if 'merge_ratio' in s]
  actual = dict(
    devices=jax.device_count(),
    visual=int(size),
    step=step,
    ours={k: float(v) for k, v in ours.items()},
    theirs={k: float(v) for k, v in theirs.items()},
    merges=[{k: float(v) for k, v in merge.items()} for merge in merges],
    peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
  )
  print(json.dumps(actual))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
