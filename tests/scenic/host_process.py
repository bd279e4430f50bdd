"""One process of a run of several: trains a tiny ViT, prints what came out.

python host_process.py INDEX COUNT PORT WORKDIR
"""

import json
import sys

import jax
import ml_collections
import numpy as np
from scenic.dataset_lib import dataset_utils

from modelstock_jax.scenic import models
from modelstock_jax.scenic import trainer

BATCH = 16
META = dict(
  num_classes=3,
  input_shape=(-1, 8, 8, 3),
  num_train_examples=64,
  num_eval_examples=64,
  input_dtype=np.float32,
  target_is_onehot=False,
)
CONFIG = dict(
  model=dict(
    patches={'size': (4, 4)},
    hidden_size=16,
    num_heads=2,
    num_layers=1,
    mlp_dim=32,
    representation_size=None,
    classifier='gap',
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
  ),
  optimizer='momentum',
  optimizer_configs={'momentum': 0.9},
  lr_configs=dict(
    learning_rate_schedule='compound',
    factors='constant',
    base_learning_rate=1e-2,
  ),
  batch_size=BATCH,
  num_training_epochs=2,
  checkpoint=True,
  xprof=False,
  count_flops=False,
)


class Writer:
  """Scenic's writers are of one process; this one writes nothing."""

  def write_scalars(self, step, scalars):
    pass

  def flush(self):
    pass


def dataset(index, count):
  """The same batches for any number of processes, each with its rows."""
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal((64, 8, 8, 3)).astype(np.float32)
  label = rng.integers(3, size=64).astype(np.int32)
  inputs += np.eye(3, dtype=np.float32)[label][:, None, None]

  def batches():
    while True:
      for start in range(0, 64, BATCH):
        rows = np.arange(start, start + BATCH).reshape(count, -1)[index]
        yield dataset_utils.shard(
          {
            'inputs': inputs[rows],
            'label': label[rows],
            'batch_mask': np.ones(len(rows), np.float32),
          }
        )

  return dataset_utils.Dataset(
    train_iter=batches(), valid_iter=batches(), meta_data=META
  )


def main(index, count, port, workdir):
  if count > 1:
    jax.distributed.initialize(f'localhost:{port}', count, index)
  state, _, summary = trainer.train(
    rng=jax.random.PRNGKey(0),
    config=ml_collections.ConfigDict(CONFIG),
    model_cls=models.ViTClassificationModel,
    dataset=dataset(index, count),
    workdir=workdir,
    writer=Writer(),
  )
  actual = dict(
    devices=jax.device_count(),
    summary={k: float(v) for k, v in summary.items()},
    params=[
      float(np.abs(np.asarray(leaf.addressable_data(0))).sum())
      for leaf in jax.tree.leaves(state.params)
    ],
  )
  print(json.dumps(actual))


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
