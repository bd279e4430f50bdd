"""One of several processes that read a batch together: INDEX COUNT PORT.

Each reads the models and rows of its own four devices, and compares what it
holds of the global batch with the same part of the whole.
"""

import sys

import jax
import numpy as np

from modelstock_jax import data
from modelstock_jax.training import sharding


def main(index, count, port):
  jax.distributed.initialize(f'localhost:{port}', int(count), int(index))
  source = data.open_source('digits', 'train[:200]')
  options = {
    'num_models': 2,
    'batch_size': 32,
    'seed': 0,
    'start': 5,
    'read': data.image_reader(data.Augment(8, 1, crop_scale=(0.5, 1.0))),
  }
  batches = data.train_batches(source, **options)
  full = next(batches)
  batches.close()
  for stock in (1, 2):
    placement = sharding.place(stock=stock, batch_size=32)
    models, rows = sharding.local_block(placement.batch, (2, 32))
    assert len(models) * len(rows) == 64 // int(count)
    rows = slice(rows.start, rows.stop)
    batches = data.train_batches(source, models=models, rows=rows, **options)
    batch = sharding.to_global(next(batches), placement.batch)
    batches.close()
    _check(batch, full)

  placement = sharding.place(stock=1, batch_size=32)
  digits = data.open_source('digits', 'test')
  options = {'batch_size': 320, 'read': data.image_reader()}
  (rows,) = sharding.local_block(placement.examples, (320,))
  rows = slice(rows.start, rows.stop)
  for local, everything in zip(
    data.eval_batches(digits, rows=rows, **options),
    data.eval_batches(digits, **options),
    strict=True,
  ):
    _check(sharding.to_global(local, placement.examples), everything)
  print('all agree', flush=True)


def _check(batch, full):
  assert batch.keys() == full.keys()
  for name, array in batch.items():
    assert array.shape == full[name].shape
    assert array.dtype == full[name].dtype
    assert len(array.addressable_shards) == 4
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, full[name][shard.index])


if __name__ == '__main__':
  main(*sys.argv[1:])
