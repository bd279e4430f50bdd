"""The real TPU compiler, for TPUs that are not there."""

import functools
import json
import math
import os
import pathlib

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from modelstock_jax.cli import main
from modelstock_jax.clip import model as model_lib
from modelstock_jax.planning import collectives
from modelstock_jax.planning import plan as plan_lib
from modelstock_jax.training import auto
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding

pytestmark = pytest.mark.oracle

pytest.importorskip('libtpu')

ROOT = pathlib.Path(__file__).parents[2]
# Two blocks of a narrow B/32 on small images: it compiles in seconds.
SMALL = [
  '--config.model.embed_dim=128',
  '--config.model.image.image_size=128',
  '--config.model.image.width=192',
  '--config.model.image.depth=2',
  '--config.model.image.heads=3',
  '--config.train.batch_size=64',
  '--config.evaluate.batch_size=64',
]
SPLIT = 4096
APART = [f'--config.mesh.fsdp_min_size={SPLIT}']  # mesh.stock is 'auto'
SIZE = 64 * 128 * 4  # bytes of a device's part of what the small programs get


def _config(name, *flags):
  return config_lib.load(ROOT / 'configs' / name, flags)


def _place(topology, slices=1):
  config = _config('clip_vit_b32.py', '--config.mesh.stock=2')
  return setup_lib.place(config, plan_lib.devices(topology, slices))


def _read(placement, function, dtype=jnp.float32):
  """Collectives of a function of each device's part of [2, n, 64, 128]."""
  mesh, spec = placement.mesh, P('stock', 'data')
  shape = (*mesh.devices.shape, 64, 128)
  where = NamedSharding(mesh, spec)
  x = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  function = jax.shard_map(
    function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  text = jax.jit(function).lower(x).compile().as_text()
  return collectives.read(text, mesh)


def _swap(x):
  return lax.ppermute(x, 'stock', [(0, 1), (1, 0)])


def _sum_in_turn(x):
  return lax.fori_loop(0, 3, lambda i, x: lax.psum(x * i, 'data'), x)


@pytest.mark.parametrize(
  ('function', 'kind', 'axes', 'count'),
  [
    (lambda x: lax.psum(x, 'data'), 'all-reduce', ('data',), 1),
    (lambda x: lax.psum(x, 'stock'), 'all-reduce', ('stock',), 1),
    (_swap, 'collective-permute', ('stock',), 1),
    (
      lambda x: lax.all_gather(x, 'data', axis=1, tiled=True),
      'all-gather',
      ('data',),
      1,
    ),
    (
      lambda x: lax.all_to_all(x, 'data', 3, 3, tiled=True),
      'all-to-all',
      ('data',),
      1,
    ),
    (_sum_in_turn, 'all-reduce', ('data',), 3),
  ],
)
def test_known_programs(function, kind, axes, count):
  actual = _read(_place('v5e:2x4'), function)
  assert {(c.kind, c.axes, c.exact) for c in actual} == {(kind, axes, True)}
  assert sum(c.count for c in actual) == count
  assert sum(c.count * c.bytes for c in actual) == count * SIZE
  assert collectives.crossing_slices(actual) == 0


@pytest.mark.parametrize(
  ('function', 'stock', 'between'),
  [
    (lambda x: lax.psum(x, 'data'), 0, 0),
    (lambda x: lax.psum(x, 'stock'), SIZE, SIZE),
    (_swap, SIZE, SIZE),
    # First within a slice, then a quarter each between slices.
    (lambda x: lax.psum(x, ('stock', 'data')), SIZE // 4, SIZE // 4),
  ],
)
def test_known_programs_on_two_slices(function, stock, between):
  actual = _read(_place('v5e:2x2', slices=2), function)
  assert collectives.crossing(actual, 'stock') == stock
  assert collectives.crossing_slices(actual) == between


def _part(shape, devices):
  size = math.prod(shape)
  split = size >= SPLIT and any(n % devices == 0 for n in shape)
  return 4 * size // (devices if split else 1)


@pytest.mark.parametrize('slices', [1, 2])
def test_models_meet_in_the_merge_alone(slices, capfd, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', os.environ['JAX_PLATFORMS'])
  config = _config('clip_vit_b32.py', *SMALL, *APART)
  path = ROOT / 'configs' / 'clip_vit_b32.py'
  flags = [f'--config={path}', '--topology=v5e:2x4', f'--slices={slices}']
  assert main.main(['plan', *flags, *SMALL, *APART, '--json']) == 0
  printed = capfd.readouterr()
  plan = json.loads(printed.out)
  step, merge = plan['step'], plan['merge']
  assert plan['devices'] == 8 * slices
  assert plan['fits']
  assert plan['peak_bytes'] < plan['hbm_bytes'] == int(15.75 * 2**30)
  assert step['cross_stock_bytes'] == step['cross_slice_bytes'] == 0
  # A device sends its own part of the weights, once, and nothing is gathered.
  network = config.model.network()
  shapes = jax.eval_shape(
    model_lib.classifier(network, 1000).init, jax.random.key(0)
  )
  part = sum(_part(x.shape, 4 * slices) for x in jax.tree.leaves(shapes))
  assert merge['cross_stock_bytes'] == part
  assert merge['cross_slice_bytes'] == (part if slices == 2 else 0)
  kinds = {c['kind'] for c in merge['collectives']}
  assert kinds <= {'collective-permute', 'all-reduce'}
  assert step['exact']
  assert merge['exact']
  # XLA counts what is done element by element as well.
  assert 1 < step['flops'] / plan['flops_per_step'] < 1.2
  assert 'hostname' not in printed.err  # libtpu is quiet


@pytest.mark.parametrize('slices', [1, 2])
def test_a_step_in_which_models_meet_is_told(slices):
  # One norm of the gradients of both models, in place of one for each.
  placement = _place('v5e:2x2', slices)
  shape = (2, 512, 512)
  stack = jax.ShapeDtypeStruct(shape, jnp.float32)
  where = placement._replace(fsdp_min_size=SPLIT).stacked(stack)

  def step(params, axes):
    norm = jnp.sqrt(jnp.sum(params * params, axis=axes, keepdims=True))
    return params / jnp.maximum(norm, 1.0)

  def moved(axes):
    program = jax.jit(
      step, static_argnums=1, in_shardings=where, out_shardings=where
    )
    text = program.lower(stack, axes).compile().as_text()
    return collectives.read(text, placement.mesh)

  apart, together = moved((1, 2)), moved((0, 1, 2))
  assert collectives.crossing(apart, 'data') > 0
  assert collectives.crossing(apart, sharding.STOCK) == 0
  assert collectives.crossing(together, sharding.STOCK) > 0
  assert collectives.crossing_slices(apart) == 0
  assert (collectives.crossing_slices(together) > 0) == (slices == 2)


def test_gradients_are_summed_straight_into_parts():
  """Not whole, of which each device then takes its part: that sends twice."""
  placement = _place('v5e:2x4')._replace(fsdp_min_size=SPLIT)
  where = NamedSharding(placement.mesh, P('stock', 'data'))
  sizes = [(768, 3072), (3072, 768), (768, 768), (768, 768)]
  stack = [
    jax.ShapeDtypeStruct((2, 4, *size), jnp.float32, sharding=where)
    for size in sizes
  ]
  scatter = jax.vmap(
    functools.partial(sharding.sum_over_data, placement),
    spmd_axis_name='stock',
  )
  program = jax.jit(lambda stack: scatter([2 * x for x in stack]))
  text = program.lower(stack).compile().as_text()
  actual = collectives.read(text, placement.mesh)
  assert {c.kind for c in actual} == {'reduce-scatter'}
  assert sum(c.sent for c in actual) == sum(
    4 * math.prod(size) * 3 // 4 for size in sizes
  )


@pytest.mark.parametrize('name', plan_lib.CHIPS)
def test_chips(name):
  """Sizes are those that libtpu knows, memory is what it says there is."""
  chip = plan_lib.CHIPS[name]
  for size in chip.sizes:
    devices = plan_lib.devices(f'{name}:{size}')
    # A megacore counts as one device.
    assert len(devices) == math.prod(map(int, size.split('x')))
  [device, *_] = plan_lib.devices(f'{name}:{chip.sizes[1]}')
  where = jax.sharding.SingleDeviceSharding(device)
  large = jax.ShapeDtypeStruct((40_000, 1024, 1024), jnp.float32)
  program = jax.jit(jnp.negative, in_shardings=where, out_shardings=where)
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    program.lower(large).compile()
  assert f'({chip.hbm_bytes / 2**30:.2f}G)' in str(error.value)


def test_out_of_memory_is_an_answer(capsys, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', os.environ['JAX_PLATFORMS'])
  path = ROOT / 'configs' / 'clip_vit_b32.py'
  flags = [f'--config={path}', '--topology=v5e:2x2', *SMALL]
  flags += ['--config.train.batch_size=1048576', '--config.train.remat=none']
  assert main.main(['plan', *flags]) == 0
  text = capsys.readouterr().out
  assert 'The step does not compile: Ran out of memory' in text
  assert 'It does not fit: at least ' in text
  assert '--config.train.remat=block' in text
  assert len(text.splitlines()) < 30


def test_l14_fits_eight_chips_of_v5e():
  """Two models of 512 images each, without flags: 6.1 of 15.75 GiB."""
  chips = plan_lib.devices('v5e:2x4')
  config = _config('clip_vit_l14.py')
  config = auto.choose(config, chips, plan_lib.CHIPS['v5e'].hbm_bytes)
  assert (config.merge.num_models, config.train.batch_size) == (2, 512)
  placement = setup_lib.place(config, chips)
  task = clip_task.task(config, 1000)
  calls, parameters = plan_lib._calls(
    task, clip_task.optimizer(config), placement, config
  )
  assert parameters == 304_735_208
  step = plan_lib._compile(*calls['step'], placement.mesh)
  held = sum(step[k] for k in ('peak_bytes', 'code_bytes', 'resident_bytes'))
  print(f'{held / 2**30:.2f} GiB, compiled in {step["compile_seconds"]:.0f} s')
  assert not step['failure']
  assert held < 7 * 2**30 < plan_lib.CHIPS['v5e'].hbm_bytes / 2
  assert collectives.crossing(step['collectives'], 'stock') == 0
  assert collectives.crossing_slices(step['collectives']) == 0
