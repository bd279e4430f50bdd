import re

import jax
import pytest

from modelstock_jax.training import config as config_lib
from modelstock_jax.training import memory
from modelstock_jax.training import sharding

# As XLA writes them: for a TPU while compiling, in two forms, and for a GPU
# while running.
COMPILING = (
  'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in '
  'memory space hbm. Used 18.22G of 15.75G hbm. Exceeded hbm capacity by '
  '2.47G.\n\nTotal hbm usage >= 18.47G:\n' + '    reserved  258.00M\n' * 50
)
TEMPORARIES = (
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for '
  'HLO temporaries (223.52G) exceeds available HBM (15.75G).'
)
RUNNING = (
  'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 '
  'bytes.'
)


@pytest.mark.parametrize(
  ('text', 'gibibytes'),
  [(COMPILING, 18.22), (TEMPORARIES, 223.52), (RUNNING, None)],
)
def test_the_compilers_total(text, gibibytes):
  failure = memory.exhausted(jax.errors.JaxRuntimeError(text))
  assert failure is not None
  actual = memory.needed_bytes(failure)
  if gibibytes is None:
    assert actual is None
  else:
    assert actual == pytest.approx(gibibytes * 2**30, rel=1e-9)


def _explained(error):
  with memory.explained(config_lib.Config()):
    raise error


def test_a_few_lines_not_a_page():
  with pytest.raises(MemoryError) as raised:
    _explained(jax.errors.JaxRuntimeError(COMPILING))
  text = str(raised.value)
  assert 'Used 18.22G of 15.75G' in text
  assert 'reserved' not in text
  assert '--config.train.remat=block' in text
  assert len(text.splitlines()) <= 8


@pytest.mark.parametrize('kind', [ValueError, jax.errors.JaxRuntimeError])
def test_other_errors_are_not_explained(kind):
  with pytest.raises(kind, match='no'):
    _explained(kind('no'))


@pytest.mark.parametrize('devices', [1, 2, 3, 6, 8, 64])
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('num_models', [2, 3])
def test_every_flag_is_valid(devices, accumulate, num_models):
  size = devices * num_models * accumulate * 2
  config = config_lib.override(
    config_lib.defaults(),
    [
      f'--config.train.accumulate={accumulate}',
      f'--config.train.batch_size={size}',
      f'--config.merge.num_models={num_models}',
      '--config.mesh.stock=1',
    ],
  )
  flags = memory.suggest(config, devices)
  # On one device nothing can be split, on two not among three models.
  assert ('mesh.stock' in str(flags)) == (devices % num_models == 0)
  assert ('fsdp' in str(flags)) == (devices > 1)
  assert 'accumulate' in str(flags)
  for flag in flags:
    changed = config_lib.override(config, [flag])
    sharding.place(
      stock=changed.mesh.stock,
      batch_size=size,
      accumulate=changed.train.accumulate,
      devices=_chips(devices),
    )


def test_nothing_is_left_to_suggest():
  config = config_lib.override(
    config_lib.defaults(),
    [
      '--config.train.batch_size=2',
      '--config.train.accumulate=2',
      '--config.train.remat=block',
      '--config.train.models=map',
    ],
  )
  flags = memory.suggest(config, devices=1)
  assert flags == []
  assert 'more devices' in memory.in_words(flags)


def test_what_is_in_use_is_not_suggested():
  config = config_lib.override(
    config_lib.defaults(),
    [
      '--config.train.remat=block',
      '--config.mesh.stock=2',
      '--config.mesh.fsdp_min_size=1',
    ],
  )
  flags = memory.suggest(config, devices=8)
  assert flags == ['--config.train.accumulate=2']
  assert not re.search('remat|stock|fsdp|turn', memory.in_words(flags))


class _Chip:
  def __init__(self, number):
    self.id = number
    self.process_index = 0


def _chips(number):
  return [_Chip(i) for i in range(number)]
