import pathlib
import types

import jax
import numpy as np
import pytest

from modelstock_jax.training import sharding


@pytest.mark.parametrize(
  ('stock', 'shape'), [(1, (1, 8)), (2, (2, 4)), (4, (4, 2))]
)
def test_mesh_takes_all_devices(stock, shape):
  placement = sharding.place(stock=stock, batch_size=8)
  assert placement.mesh.axis_names == ('stock', 'data')
  assert placement.mesh.devices.shape == shape
  assert set(placement.mesh.devices.flat) == set(jax.devices())


def test_each_model_has_devices():
  placement = sharding.place(stock=2, batch_size=8)
  models = np.arange(2)[:, None, None] * np.ones((2, 8, 3))
  batch = jax.device_put(models, placement.batch)
  for shard in batch.addressable_shards:
    row = int(np.argwhere(placement.mesh.devices == shard.device)[0, 0])
    assert shard.data.shape == (1, 2, 3)
    np.testing.assert_array_equal(shard.data, row)


def test_examples_are_spread_over_all_devices():
  placement = sharding.place(stock=2, batch_size=8)
  examples = jax.device_put(np.arange(16), placement.examples)
  parts = [shard.data.tolist() for shard in examples.addressable_shards]
  assert sorted(map(len, parts)) == [2] * 8
  assert sorted(np.concatenate(parts).tolist()) == list(range(16))


def test_number_of_models_that_does_not_divide_the_devices():
  with pytest.raises(
    ValueError, match=r'mesh.stock: 3 .*8 devices.*mesh.stock=1'
  ):
    sharding.place(stock=3, batch_size=8)


@pytest.mark.parametrize(
  ('stock', 'batch_size', 'accumulate', 'near'),
  [
    (1, 50, 1, 'a multiple of 8'),
    (1, 3, 1, 'a multiple of 8'),
    (2, 50, 1, 'a multiple of 4'),
    (2, 40, 4, '4 devices in train.accumulate=4 parts; .*a multiple of 16'),
  ],
)
def test_batch_that_does_not_divide_names_what_does(
  stock, batch_size, accumulate, near
):
  with pytest.raises(
    ValueError, match=f'train.batch_size: {batch_size} .*{near}'
  ):
    sharding.place(
      stock=stock,
      batch_size=batch_size,
      accumulate=accumulate,
    )


@pytest.mark.parametrize(
  ('shape', 'axis'),
  [
    ((8, 16), 1),  # the largest
    ((16, 8), 0),
    ((8, 8), 0),  # the first of the largest
    ((8, 17), 0),  # the largest that 4 devices divide
    ((7, 17), None),  # none that they do
    ((100,), 0),
    ((63,), None),  # too small
    ((2, 4, 8), 2),
    ((), None),
  ],
)
def test_large_leaves_are_split_along_one_axis(shape, axis):
  placement = sharding.place(stock=2, batch_size=8, fsdp_min_size=64)
  leaf = jax.ShapeDtypeStruct(shape, np.float32)
  stack = jax.ShapeDtypeStruct((2, *shape), np.float32)
  part, individual = list(shape), [1, *shape]
  if axis is not None:
    part[axis] //= 4
    individual[axis + 1] //= 4
  assert placement.params(leaf).shard_shape(shape) == tuple(part)
  assert placement.stacked(stack).shard_shape((2, *shape)) == tuple(individual)


def test_nothing_is_split_unless_asked():
  placement = sharding.place(stock=2, batch_size=8)
  leaf = jax.ShapeDtypeStruct((1024, 1024), np.float32)
  assert placement.params(leaf).is_fully_replicated


def test_a_mesh_of_another_axis_splits_nothing():
  grid = np.asarray(jax.devices()).reshape(2, 4)
  mesh = jax.sharding.Mesh(grid, (sharding.STOCK, 'batch'))  # as Scenic's
  placement = sharding.Placement(mesh)
  spec = placement.stacked(np.zeros((2, 8, 8))).spec
  assert spec == jax.sharding.PartitionSpec(sharding.STOCK)


class _Device:
  """As `jax.devices()` of a pod tells of them."""

  def __init__(self, number, process, slice_):
    self.id = number
    self.process_index = process
    self.slice_index = slice_

  def __repr__(self):
    return f'{self.slice_index}/{self.process_index}/{self.id}'


def test_each_model_has_slices_and_hosts():
  # Two slices of two hosts with two devices, told of in any order.
  devices = [_Device(i, i // 2, i // 4) for i in (5, 2, 7, 0, 1, 6, 3, 4)]
  devices.sort(key=sharding._position)
  assert list(map(str, devices)) == [
    '0/0/0',
    '0/0/1',
    '0/1/2',
    '0/1/3',
    '1/2/4',
    '1/2/5',
    '1/3/6',
    '1/3/7',
  ]


@pytest.mark.parametrize(
  ('stock', 'fsdp_min_size'), [(1, 0), (2, 0), (4, 0), (2, 16), (4, 16)]
)
def test_exchange_brings_all_models_to_all_devices(stock, fsdp_min_size):
  models = stock if stock > 1 else 3
  placement = sharding.place(
    stock=stock, batch_size=8, fsdp_min_size=fsdp_min_size
  )
  stack = {
    'w': np.arange(models * 32, dtype=np.float32).reshape(models, 4, 8),
    'b': np.arange(models, dtype=np.float32)[:, None],
  }
  placed = jax.device_put(stack, placement.stacked(stack))
  actual = jax.jit(lambda x: sharding.exchange(placement, x))(placed)
  assert len(actual) == models
  for index, model in enumerate(actual):
    for name, leaf in model.items():
      where = placement.params(leaf)
      assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
      for shard in leaf.addressable_shards:
        expected = stack[name][index][shard.index]
        np.testing.assert_array_equal(shard.data, expected)


def _processes(placement, count):
  """Stands in for `count` processes with the same number of devices each."""
  devices = list(placement.mesh.devices.flat)
  size = len(devices) // count
  return [devices[k : k + size] for k in range(0, len(devices), size)]


def _held_by(devices, where):
  """A sharding of which these devices are those of this process."""
  indices = {device: where[device] for device in devices}
  return types.SimpleNamespace(
    addressable_devices_indices_map=lambda shape: indices
  )


@pytest.mark.parametrize('count', [1, 2, 4, 8])
@pytest.mark.parametrize('stock', [1, 2])
def test_blocks_of_processes_make_up_the_batch(stock, count):
  placement = sharding.place(stock=stock, batch_size=16)
  where = placement.batch.devices_indices_map((2, 16))
  seen = np.zeros((2, 16), int)
  for devices in _processes(placement, count):
    models, rows = sharding.local_block(_held_by(devices, where), (2, 16))
    for device in devices:
      held = np.zeros((2, 16), bool)
      held[where[device]] = True
      assert not held[:, [r for r in range(16) if r not in rows]].any()
      assert not held[[m for m in range(2) if m not in models]].any()
    seen[models.start : models.stop, rows.start : rows.stop] += 1
  np.testing.assert_array_equal(seen, 1)


def test_block_that_is_none():
  # Six devices of the eight: all of one model's, half of the other's.
  placement = sharding.place(stock=2, batch_size=16)
  where = placement.batch.devices_indices_map((2, 16))
  devices = list(placement.mesh.devices.flat)[:6]
  with pytest.raises(ValueError, match=r'mesh.stock: .*use mesh.stock=1'):
    sharding.local_block(_held_by(devices, where), (2, 16))


@pytest.mark.parametrize('stock', [1, 2])
def test_one_process_reads_everything(stock):
  placement = sharding.place(stock=stock, batch_size=16)
  block = sharding.local_block(placement.batch, (2, 16))
  assert block == (range(2), range(16))
  assert sharding.local_block(placement.examples, (24,)) == (range(24),)


@pytest.mark.parametrize('stock', [1, 2])
def test_to_global_is_device_put_of_all(stock):
  placement = sharding.place(stock=stock, batch_size=8)
  rng = np.random.default_rng(0)
  train = {
    'image': rng.integers(0, 256, (2, 8, 3, 3, 1), np.uint8),
    'label': rng.integers(0, 10, (2, 8), np.int32),
  }
  examples = {'label': np.arange(16), 'mask': np.arange(16) < 13}
  for batch, where in (
    (train, placement.batch),
    (examples, placement.examples),
  ):
    result = sharding.to_global(batch, where)
    expected = jax.device_put(batch, where)
    for name, array in result.items():
      assert array.dtype == expected[name].dtype
      assert array.sharding == expected[name].sharding
      for one, other in zip(
        array.addressable_shards,
        expected[name].addressable_shards,
        strict=True,
      ):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)
      np.testing.assert_array_equal(array, batch[name])


@pytest.mark.hosts
def test_real_processes_read_their_parts(run_processes):
  script = pathlib.Path(__file__).with_name('reader.py')
  for printed in run_processes(script, 2, devices=4):
    assert 'all agree' in printed
