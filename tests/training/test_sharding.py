import jax
import numpy as np
import pytest

from modelstock_jax.training import sharding


@pytest.mark.parametrize(
  ('stock', 'num_models', 'shape'),
  [(1, 2, (1, 8)), (2, 2, (2, 4)), (1, 3, (1, 8)), (4, 4, (4, 2))],
)
def test_mesh_takes_all_devices(stock, num_models, shape):
  placement = sharding.place(stock=stock, num_models=num_models, batch_size=8)
  assert placement.mesh.axis_names == ('stock', 'data')
  assert placement.mesh.devices.shape == shape
  assert set(placement.mesh.devices.flat) == set(jax.devices())


def test_each_model_has_devices_of_its_own():
  placement = sharding.place(stock=2, num_models=2, batch_size=8)
  models = np.arange(2)[:, None, None] * np.ones((2, 8, 3))
  batch = jax.device_put(models, placement.batch)
  for shard in batch.addressable_shards:
    row = int(np.argwhere(placement.mesh.devices == shard.device)[0, 0])
    assert shard.data.shape == (1, 2, 3)
    np.testing.assert_array_equal(shard.data, row)


def test_examples_are_spread_over_all_devices():
  placement = sharding.place(stock=2, num_models=2, batch_size=8)
  examples = jax.device_put(np.arange(16), placement.examples)
  parts = [shard.data.tolist() for shard in examples.addressable_shards]
  assert sorted(map(len, parts)) == [2] * 8
  assert sorted(np.concatenate(parts).tolist()) == list(range(16))


def test_number_of_models_that_does_not_divide_the_devices():
  with pytest.raises(
    ValueError, match=r'mesh.stock: 3 .*8 devices.*mesh.stock=1'
  ):
    sharding.place(stock=3, num_models=3, batch_size=8)


@pytest.mark.parametrize('stock', [0, 3, 8, -1])
def test_stock_is_one_or_the_number_of_models(stock):
  with pytest.raises(
    ValueError, match=rf'mesh.stock: must be 1 or .*\(2\), got {stock}'
  ):
    sharding.place(stock=stock, num_models=2, batch_size=8)


@pytest.mark.parametrize(
  ('stock', 'batch_size', 'near'),
  [(1, 50, r'\[48, 56\]'), (1, 3, r'\[8\]'), (2, 50, r'\[48, 52\]')],
)
def test_batch_that_does_not_divide_names_the_nearest(stock, batch_size, near):
  with pytest.raises(
    ValueError, match=f'train.batch_size: {batch_size} .*{near}'
  ):
    sharding.place(stock=stock, num_models=2, batch_size=batch_size)
