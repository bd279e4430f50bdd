"""Leaves of which each process has a part, merged: INDEX COUNT PORT."""

import sys

import jax
import numpy as np
import pytest

import modelstock_jax as ms

P = jax.P


def main(index, count, port):
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', int(count), int(index))
  mesh = jax.make_mesh((4,), ('data',), (jax.sharding.AxisType.Auto,))
  cut = jax.NamedSharding(mesh, P('data'))

  def put(array):
    return jax.make_array_from_callback(array.shape, cut, lambda i: array[i])

  def tree(kernel, ids):
    return {'kernel': put(kernel), 'ids': put(ids)}

  # Of each row, orthogonal displacements where it is even, else equal ones.
  steps = np.zeros((2, 4, 2), np.float32)
  steps[0, :, 0] = steps[1, 1::2, 0] = steps[1, ::2, 1] = 1
  ids = np.arange(4, dtype=np.int32)
  anchor = tree(np.zeros((4, 2), np.float32), ids)
  models = [tree(step, ids) for step in steps]

  def rows(path, leaf):
    return ms.Layer(axes=(0,))

  merged = ms.model_stock(anchor, models, layers=rows)
  assert merged.cosine['kernel'].shape == (4,)
  assert ms.describe(merged).splitlines()[-1] == 'kernel   0.500  0.500'
  assert ms.model_stock(anchor, models).ratio['kernel'] == 2 / 3
  average = ms.ema(anchor, models[0], 0.5)
  for shard in average['ids'].addressable_shards:
    np.testing.assert_array_equal(shard.data, ids[shard.index])
  ms.merge_every(1, 1, anchor, ms.stack(models))
  with pytest.raises(ValueError, match='ids: int32 is not averaged, and the'):
    ms.model_stock(anchor, [models[0], tree(steps[1], ids // 3)])
  print('all agree')


if __name__ == '__main__':
  main(*sys.argv[1:])
