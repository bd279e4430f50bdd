import importlib.util
import json
import os
import pathlib

import jax
import pytest

from modelstock_jax.cli import main
from modelstock_jax.cli import plan as plan_cli
from modelstock_jax.planning import plan as plan_lib
from modelstock_jax.planning.collectives import Collective

DIGITS = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'
TINY = [
  f'--config={DIGITS}',
  '--config.model.embed_dim=8',
  '--config.model.image.width=8',
  '--config.model.image.depth=1',
  '--config.model.image.heads=2',
  '--config.train.batch_size=8',
  '--config.mesh.stock=2',
]
GIB = 2**30


@pytest.fixture
def programs():
  """Return the plan of an invented run, so that every figure is known."""
  step = dict(
    argument_bytes=2 * GIB,
    temporary_bytes=3 * GIB,
    peak_bytes=4 * GIB,
    code_bytes=GIB,
    resident_bytes=5 * GIB,
    flops=7e9,
    collectives=[
      Collective('a', 'all-gather', ('data',), False, 100, 3, True, 8, True),
      Collective('b', 'all-gather', ('data',), False, 50, 1, True, 8, False),
      Collective('c', 'all-reduce', ('data',), True, 1000, 2, False, 8, False),
    ],
    compile_seconds=1.26,
    failure='',
    least_bytes=5000,
  )
  merge = step | {
    'code_bytes': 0,
    'collectives': [
      Collective(
        *('d', 'collective-permute', ('stock',), True, 7000, 1, True),
        *(2, False),
      )
    ],
  }
  return {'step': step, 'merge': merge}


@pytest.fixture
def plan(programs):
  return {
    'topology': 'v5e:2x4',
    'slices': 2,
    'devices': 16,
    'mesh': {'stock': 2, 'data': 8},
    'settings': {'mesh.stock': 2, 'train.remat': 'block'},
    'estimated_bytes': 9 * GIB,
    'num_models': 2,
    'batch_size': 512,
    'parameters': 1_500_000,
    'flops_per_step': 4 * 10**9,
    'hbm_bytes': 16 * GIB,
    'peak_flops': 200e12,
    'seconds_per_step_at_peak': 20e-6,
    'images_per_second_at_peak': 1024 / 20e-6,
    'reader_cores_per_host_at_peak': 69.12,
    'suggestions': [],
    **plan_lib.summarize(programs, 16 * GIB),
  }


@pytest.fixture
def too_large(plan, programs):
  """The same where the step does not compile."""
  failed = {'failure': 'Used 18.5G of 16.0G hbm.'}
  summary = plan_lib.summarize({**programs, 'step': failed}, 16 * GIB)
  flags = ['--config.train.remat=block', '--topology=v5e:4x4']
  return {**plan, **summary, 'suggestions': flags}


def test_json(plan):
  actual = json.loads(json.dumps(plan))
  assert actual['fits'] is True
  assert actual['peak_bytes'] == 10 * GIB  # of the step: 4 + 5 + 1 of code
  step, merge = actual['step'], actual['merge']
  assert (step['cross_stock_bytes'], step['cross_slice_bytes']) == (0, 2000)
  assert (merge['cross_stock_bytes'], merge['cross_slice_bytes']) == (7000,) * 2
  assert step['exact'] is False
  gathers = step['collectives'][1]
  assert gathers['kind'] == 'all-gather'
  assert (gathers['count'], gathers['bytes']) == (4, 350)
  assert (gathers['async_count'], gathers['sent_bytes']) == (3, 7 * 350)
  assert step['sent_bytes'] == 7 * 350 + 2 * 7 * 2000 // 8


def test_text(plan):
  text = plan_cli.to_text(plan)
  assert '2 x v5e:2x4: 16 devices as stock 2 x data 8' in text
  settings = 'mesh.stock=2 train.remat=block (estimate: 9.0 GiB).'
  assert f'Placement: {settings}' in text
  assert '4.0 GFLOP' in text
  assert 'at least 0.02 ms' in text
  assert 'takes 69.1 cores of each host' in text
  assert 'The step moves at least 0 bytes between models and 2,000' in text
  ratio = '5,950 bytes; the least is 5,000 (ratio 1.19).'
  assert f'It sends at least {ratio}' in text
  assert 'The merge moves 7,000 bytes between models and 7,000' in text
  assert 'It fits: 10.0 GiB of 16.0 GiB.' in text
  assert all(len(line) <= 100 for line in text.splitlines())


def test_what_does_not_fit(too_large):
  assert too_large['fits'] is False
  assert too_large['peak_bytes'] == int(18.5 * GIB)
  assert too_large['step']['failure'] == 'Used 18.5G of 16.0G hbm.'
  assert too_large['step']['cross_stock_bytes'] is None
  assert too_large['merge']['cross_stock_bytes'] == 7000
  text = plan_cli.to_text(too_large)
  assert 'It does not fit: at least 18.5 GiB of 16.0 GiB.' in text
  assert all(flag in text for flag in too_large['suggestions'])
  assert len(text.splitlines()) < 25


def test_the_command_prints_json_and_nothing_else(monkeypatch, capsys):
  monkeypatch.setattr(plan_lib, 'devices', lambda *_: jax.devices())
  monkeypatch.setenv('JAX_PLATFORMS', os.environ['JAX_PLATFORMS'])
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_enable_async_all_reduce=false')
  flags = ['--topology=v5e:2x4', '--json', '--xla=recommended']
  assert main.main(['plan', *TINY, *flags]) == 0
  own, *added = os.environ['LIBTPU_INIT_ARGS'].split()
  assert own == '--xla_enable_async_all_reduce=false'
  assert added
  assert not any(flag.startswith(own.partition('=')[0]) for flag in added)
  assert 'latency_hiding_scheduler=true' in os.environ['XLA_FLAGS']
  printed = capsys.readouterr()
  actual = json.loads(printed.out)
  assert actual['devices'] == 8
  assert actual['step']['cross_stock_bytes'] == 0
  assert actual['merge']['cross_stock_bytes'] > 0
  for name in ('step', 'merge', 'restart', 'evaluation'):
    assert actual[name]['argument_bytes'] > 0
    assert f'Compiling the {name} for 8 devices.' in printed.err


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v9:2x2'], '--topology=v9:2x2: is not known. These are:'),
    (['--topology=v5e:2x4', '--slices=0'], '--slices=0: must be at least 1'),
    (['--topology=v5e:2x4', '--num_classes=0'], '--num_classes=0: must be'),
    (['--topology=v5e:2x4', '--config.train.remta=a'], '--config.train.remat'),
    (['--topology=v5e:2x4'], "pip install 'modelstock_jax[tpu]'"),
  ],
)
def test_one_clear_error(flags, message, monkeypatch, capsys):
  monkeypatch.setenv('JAX_PLATFORMS', os.environ['JAX_PLATFORMS'])
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: None if name == 'libtpu' else find(name, *rest),
  )
  assert main.main(['plan', *TINY, *flags]) == 1
  error = capsys.readouterr().err
  assert error.startswith('modelstock plan: ')
  assert message in error
  assert 'Traceback' not in error
