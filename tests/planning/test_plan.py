import importlib.util
import math
import pathlib

import jax
import pytest

from modelstock_jax import clip
from modelstock_jax.clip import flops
from modelstock_jax.planning import least
from modelstock_jax.planning import plan as plan_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib

ROOT = pathlib.Path(__file__).parents[2]
TOPOLOGY = 'v5e:2x4'
CLASSES = 10
SPLIT = 64  # elements from which on a leaf is split
# All models on all devices, nothing split, nothing computed again.
TOGETHER = {
  'mesh__stock': 1,
  'mesh__fsdp_min_size': 0,
  'train__remat': 'none',
}
PROGRAMS = ('step', 'merge', 'restart', 'evaluation')


@pytest.fixture(scope='module', autouse=True)
def on_cpu():
  """Eight CPUs in place of the eight chips: compiled by XLA all the same."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan_lib, 'devices', lambda *_: jax.devices())
    yield


@pytest.fixture(scope='module')
def configured(tiny_flags):
  def make(**changes):
    changes = {k.replace('__', '.'): v for k, v in changes.items()}
    return config_lib.load(ROOT / 'configs' / 'digits.py', tiny_flags(changes))

  return make


@pytest.fixture(scope='module')
def apart(configured):
  """Two models on four devices each, their weights split over these."""
  return configured(mesh__fsdp_min_size=SPLIT)  # mesh.stock is 'auto'


@pytest.fixture(scope='module')
def plan(apart):
  return plan_lib.plan(apart, TOPOLOGY)


def _shapes(config):
  model = clip.classifier(config.model.network(), CLASSES)
  params = jax.eval_shape(model.init, jax.random.key(0))
  return [leaf.shape for leaf in jax.tree.leaves(params)]


def _part(shape, devices=4):
  """Bytes of a float32 leaf on one of the devices that it is split over."""
  size = math.prod(shape)
  split = size >= SPLIT and any(n % devices == 0 for n in shape)
  return 4 * size // (devices if split else 1)


def test_devices_and_work(apart, plan):
  assert (plan['devices'], plan['num_models']) == (8, 2)
  assert plan['mesh'] == {'stock': 2, 'data': 4}
  settings = {'mesh.stock': 2, 'mesh.fsdp_min_size': SPLIT}
  assert plan['settings'] == {**settings, 'train.remat': 'none'}
  assert plan['parameters'] == sum(map(math.prod, _shapes(apart)))
  network = apart.model.network()
  images = 2 * apart.train.batch_size
  assert plan['flops_per_step'] * 8 == images * flops.train(network, CLASSES)
  peak = plan_lib.CHIPS['v5e'].peak_flops
  assert plan['seconds_per_step_at_peak'] == plan['flops_per_step'] / peak
  assert plan['images_per_second_at_peak'] == pytest.approx(
    images * 8 * peak / (images * flops.train(network, CLASSES))
  )
  # 2.7 ms of a core each, as experiments/README.md has it, on one host here.
  assert plan['reader_cores_per_host_at_peak'] == pytest.approx(
    2.7e-3 * plan['images_per_second_at_peak']
  )


def test_nothing_crosses_models_in_a_step(plan):
  step = plan['step']
  assert {axis for c in step['collectives'] for axis in c['axes']} == {'data'}
  assert sum(c['bytes'] for c in step['collectives']) > 0
  assert step['cross_stock_bytes'] == step['cross_slice_bytes'] == 0


def test_a_merge_sends_the_part_of_a_device_once(apart, plan):
  merge = plan['merge']
  kinds = {c['kind'] for c in merge['collectives']}
  assert kinds <= {'collective-permute', 'all-reduce'}
  part = sum(map(_part, _shapes(apart)))
  assert merge['cross_stock_bytes'] == merge['least_bytes'] == part


@pytest.mark.parametrize(
  ('changes', 'hbm_bytes', 'expected'),
  [
    # Gradients are sent once to be summed and once to be given out, 4 bytes
    # each; of n devices, n - 1 of n parts are. Models can be apart on 4 of 8.
    (TOGETHER, 2**34, lambda whole, split: 8 * (whole + split) * 3 // 4),
    (TOGETHER, 0, lambda whole, split: 2 * 8 * (whole + split) * 7 // 8),
    # FSDP gathers weights twice and scatters gradients once.
    ({}, 0, lambda whole, split: (8 * whole + 12 * split) * 3 // 4),
    (
      {'model__dtype': 'bfloat16'},
      0,
      lambda whole, split: (8 * whole + (2 * 2 + 4) * split) * 3 // 4,
    ),
  ],
)
def test_the_least_of_a_step(configured, changes, hbm_bytes, expected):
  config = configured(
    **{**TOGETHER, 'mesh__stock': 2, 'mesh__fsdp_min_size': SPLIT, **changes}
  )
  placement = setup_lib.place(config, jax.devices())
  shapes = [jax.ShapeDtypeStruct(s, 'float32') for s in _shapes(config)]
  whole = sum(map(math.prod, _shapes(config)))
  split = sum(
    math.prod(s.shape)
    for s in shapes
    if _part(s.shape) < 4 * math.prod(s.shape)
  )
  actual = least.step_bytes(config, placement, hbm_bytes, shapes)
  assert actual == expected(whole - split, split)


def test_a_step_that_mixes_models_is_told(apart, monkeypatch):
  build = setup_lib.compile_programs

  def mixed(*args, **kwargs):
    programs = build(*args, **kwargs)

    def train(state, *arguments):
      state, metrics = programs.train(state, *arguments)
      together = jax.tree.map(lambda x: 0 * x + x.mean(0)[None], state.params)
      return state._replace(params=together), metrics

    return programs._replace(train=jax.jit(train))

  monkeypatch.setattr(setup_lib, 'compile_programs', mixed)
  actual = plan_lib.plan(apart, TOPOLOGY)
  assert actual['step']['cross_stock_bytes'] > 0


def test_memory(apart, plan):
  part = sum(map(_part, _shapes(apart)))
  images = apart.train.batch_size // 4
  batch = images * (8 * 8 * 1 + 4)  # uint8 pixels, int32 label
  step, merge = plan['step'], plan['merge']
  # Weights and two moments; 100 bytes of counters and keys.
  assert 0 <= step['argument_bytes'] - (3 * part + batch) <= 100
  assert merge['argument_bytes'] == 2 * part
  # The anchor, the last merge, the next batch; the moments and their counter.
  assert step['resident_bytes'] == 2 * part + batch
  assert 0 <= merge['resident_bytes'] - (part + 2 * part + batch) <= 100
  programs = [plan[name] for name in PROGRAMS]
  code = sum(program['code_bytes'] for program in programs)
  for program in programs:
    total = program['peak_bytes'] - program['resident_bytes'] - code
    assert total >= program['argument_bytes'] > 0
  assert plan['peak_bytes'] == max(x['peak_bytes'] for x in programs)
  assert plan['fits']
  assert plan['suggestions'] == []


@pytest.mark.parametrize(
  ('flag', 'turns'),
  [('--config.train.accumulate=4', 4), ('--config.train.models=map', 2)],
)
def test_what_is_done_in_turn_counts_in_every_turn(configured, flag, turns):
  config = configured(train__batch_size=32)
  program = _step(config)
  looped = _step(config_lib.override(config, [flag]))
  assert {c.count for c in program['collectives']} == {1}
  # Gradients are summed over devices in each turn; numbers to report may wait.
  sums = [c for c in looped['collectives'] if c.count == turns]
  largest = max(c.bytes for c in looped['collectives'])
  assert all(c.exact for c in looped['collectives'])
  assert largest in {c.bytes for c in sums}
  assert {c.count for c in looped['collectives']} <= {1, turns}
  assert looped['temporary_bytes'] < program['temporary_bytes']


def test_gradients_of_parts_are_summed_once(configured):
  cut = {'train__batch_size': 32, 'train__accumulate': 4}
  config = configured(**cut, train__sum_gradients='once', **TOGETHER)
  program = _step(config)
  # Outside of the loop over parts, with loss, accuracy and norms.
  assert {c.count for c in program['collectives']} == {1}
  number = 2 * sum(map(math.prod, _shapes(config)))
  sent = sum(c.bytes for c in program['collectives'])
  assert 4 * number <= sent < 4 * number + 100


def _step(config):
  placement = setup_lib.place(config, jax.devices())
  task = clip_task.task(config, CLASSES)
  optimizer = clip_task.optimizer(config)
  calls, _ = plan_lib._calls(task, optimizer, placement, config)
  return plan_lib._compile(*calls['step'], placement.mesh)


def test_what_does_not_fit_gets_suggestions(configured, monkeypatch):
  config = configured(train__batch_size=32, **TOGETHER)
  small = plan_lib.CHIPS['v5e']._replace(hbm_bytes=1000)
  monkeypatch.setitem(plan_lib.CHIPS, 'v5e', small)
  actual = plan_lib.plan(config, TOPOLOGY)
  assert not actual['fits']
  *flags, larger = actual['suggestions']
  assert larger == '--topology=v5e:4x4'
  assert len(flags) == 5
  for flag in flags:  # each is valid
    changed = config_lib.override(config, [flag])
    setup_lib.place(changed, jax.devices())


def test_out_of_memory_at_compile(apart, monkeypatch):
  build = setup_lib.compile_programs
  text = 'RESOURCE_EXHAUSTED: Ran out of memory. Used 18.5G of 15.75G hbm.'

  class TooLarge:
    def lower(self, *_):
      raise jax.errors.JaxRuntimeError(text + '\n\nTotal:\n' + 'a page\n' * 99)

  def large(*args, **kwargs):
    programs = build(*args, **kwargs)
    return programs._replace(train=TooLarge())

  monkeypatch.setattr(setup_lib, 'compile_programs', large)
  actual = plan_lib.plan(apart, TOPOLOGY)
  assert not actual['fits']
  assert actual['peak_bytes'] == int(18.5 * 2**30)
  assert (
    actual['step']['failure'] == 'Ran out of memory. Used 18.5G of 15.75G hbm.'
  )
  assert actual['merge']['peak_bytes'] > 0


def test_other_errors_of_the_compiler_are_not_hidden(apart, monkeypatch):
  class Broken:
    def lower(self, *_):
      raise jax.errors.JaxRuntimeError('INTERNAL: a defect')

  build = setup_lib.compile_programs

  def broken(*args, **kwargs):
    programs = build(*args, **kwargs)
    return programs._replace(train=Broken())

  monkeypatch.setattr(setup_lib, 'compile_programs', broken)
  with pytest.raises(jax.errors.JaxRuntimeError, match='a defect'):
    plan_lib.plan(apart, TOPOLOGY)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'mesh__stock': 2, 'merge__num_models': 3}, 'mesh.stock'),
    (
      {'train__batch_size': 12, 'mesh__stock': 1},
      'train.batch_size: 12 .*multiple of 8',
    ),
  ],
)
def test_what_does_not_divide(configured, changes, message):
  with pytest.raises(ValueError, match=message):
    plan_lib.plan(configured(**changes), TOPOLOGY)


def test_number_of_classes(configured, tmp_path):
  elsewhere = {'data__data_dir': str(tmp_path)}
  count = clip_task.count_classes
  assert count(configured().data) == CLASSES
  imagenet = configured(data__dataset='imagenet2012', **elsewhere)
  assert count(imagenet.data) == 1000
  with pytest.raises(ValueError, match=r'cars. is not prepared.*num_classes=K'):
    count(configured(data__dataset='cars', **elsewhere).data)


# Of the devices themselves; `devices` is what `on_cpu` has replaced.
_devices = plan_lib.devices


@pytest.mark.parametrize(
  'topology', ['v5e', 'v5e:3x3', 'v4:4x4', 'v9:2x2', 'v5e-8', '']
)
def test_unknown_topologies_list_the_known(topology):
  with pytest.raises(ValueError, match=f'--topology={topology}: ') as error:
    _devices(topology)
  text = str(error.value)
  assert all(f'{chip}:' in text for chip in ('v4', 'v5e', 'v5p', 'v6e'))
  assert all(size in text for size in ('2x4', '16x16', '4x8x8'))


def test_number_of_slices():
  with pytest.raises(ValueError, match='--slices=0: must be at least 1'):
    _devices('v5e:2x4', 0)


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r"pip install 'modelstock_jax\[tpu\]'"):
    _devices('v5e:2x4')


def test_sizes_are_of_the_numbers_of_chips_they_say():
  for chip in plan_lib.CHIPS.values():
    counts = [math.prod(map(int, s.split('x'))) for s in chip.sizes]
    assert counts == sorted(counts)
    assert max(counts) >= 256
