"""Whatever interrupts a run, it ends bit for bit where it would have ended.

See `tests/kills` for real processes.
"""

import logging
import os
import shutil
import signal

import numpy as np
import pytest

from modelstock_jax.training import auto
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop


@pytest.fixture(scope='module')
def undisturbed(tiny_config, setup, read_run, tmp_path_factory):
  """Return what an undisturbed run leaves, by the changes to its config."""
  known = {}

  def run(changes):
    key = tuple(changes.items())
    if key not in known:
      config = tiny_config(changes)
      workdir = tmp_path_factory.mktemp('undisturbed')
      loop.train(config, workdir, setup=setup)
      known[key] = read_run(config, workdir, setup)
    return known[key]

  return run


def _on_call(setup, number, act):
  """A setup that acts before the n-th step of this attempt."""
  calls = []

  def train(*arguments):
    calls.append(1)
    if len(calls) == number:
      act()
    return setup.programs.train(*arguments)

  return setup._replace(programs=setup.programs._replace(train=train))


def _send(*numbers):
  def act():
    for number in numbers:
      os.kill(os.getpid(), number)

  return act


def _fail():
  raise RuntimeError('a power cut')


EPOCH = {}
OFTEN = {'checkpoint.every_steps': 1}
THREE = {
  'checkpoint.every_steps': 3,
  'merge.every': 2,
  'merge.anchor': 'last_merge',
}
MOVING = {'merge.anchor': 'last_merge', 'log.every_steps': 5}
END = {'merge.every': 'end', 'checkpoint.every_steps': 2}


@pytest.mark.parametrize(
  ('how', 'changes', 'calls'),
  [
    ('sigterm', EPOCH, [1, 1, 3]),  # before the first save; twice at one step
    *(
      pytest.param(*case, marks=pytest.mark.kills)
      for case in (
        ('exception', EPOCH, [5, 4]),  # right after merges
        ('exception', OFTEN, [2, 6]),
        ('sigterm', THREE, [7, 2]),
        ('sigterm', MOVING, [6, 1, 3]),  # after the first merge and the second
        ('exception', MOVING, [10]),
        ('sigterm', END, [5, 4]),
      )
    ),
  ],
)
def test_interrupted_in_process(
  tiny_config,
  setup,
  read_run,
  undisturbed,
  assert_identical,
  tmp_path,
  changes,
  calls,
  how,
):
  config = tiny_config(changes)
  for number in calls:
    if how == 'sigterm':
      interrupted = _on_call(setup, number, _send(signal.SIGTERM))
      with pytest.raises(loop.Interrupted) as error:
        loop.train(config, tmp_path, setup=interrupted)
      assert error.value.signal == signal.SIGTERM
      assert str(tmp_path) in str(error.value)
    else:
      interrupted = _on_call(setup, number, _fail)
      with pytest.raises(RuntimeError, match='a power cut'):
        loop.train(config, tmp_path, setup=interrupted)
  loop.train(config, tmp_path, setup=setup)
  assert_identical(read_run(config, tmp_path, setup), undisturbed(changes))


def test_a_signal_saves_the_step_that_it_came_in(
  tiny_config, setup, restore_run, tmp_path
):
  config = tiny_config()
  interrupted = _on_call(setup, 3, _send(signal.SIGINT))
  with pytest.raises(loop.Interrupted, match='SIGINT at step 3'):
    loop.train(config, tmp_path, setup=interrupted)
  assert int(restore_run(config, tmp_path, setup).state.step) == 3


def test_a_signal_in_the_last_step_is_not_lost(tiny_config, setup, tmp_path):
  """A program of several runs is to stop, not to begin with the next one."""
  config = tiny_config()
  interrupted = _on_call(setup, 12, _send(signal.SIGTERM))
  with pytest.raises(loop.Interrupted, match='SIGTERM at step 12'):
    loop.train(config, tmp_path, setup=interrupted)
  assert loop.train(config, tmp_path, setup=setup).step == 12


def test_a_second_ctrl_c_does_not_wait(
  tiny_config,
  setup,
  read_run,
  undisturbed,
  assert_identical,
  tmp_path,
):
  config = tiny_config()
  interrupted = _on_call(setup, 6, _send(signal.SIGINT, signal.SIGINT))
  with pytest.raises(KeyboardInterrupt):
    loop.train(config, tmp_path, setup=interrupted)
  loop.train(config, tmp_path, setup=setup)
  assert_identical(read_run(config, tmp_path, setup), undisturbed(EPOCH))


def test_signals_are_handled_as_before_after_a_run(
  tiny_config, setup, tmp_path
):
  before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  interrupted = _on_call(setup, 1, _send(signal.SIGTERM))
  with pytest.raises(loop.Interrupted):
    loop.train(tiny_config(), tmp_path, setup=interrupted)
  after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  assert before == after


@pytest.mark.parametrize(
  'kind', ['empty', 'no arrays', 'a flipped bit', 'truncated metrics']
)
def test_a_damaged_checkpoint_costs_no_bit(
  tiny_config,
  setup,
  read_run,
  undisturbed,
  assert_identical,
  tmp_path,
  caplog,
  kind,
):
  config = tiny_config()
  interrupted = _on_call(setup, 10, _fail)
  with pytest.raises(RuntimeError):
    loop.train(config, tmp_path, setup=interrupted)
  step = tmp_path / 'checkpoints' / '8'
  match kind:
    case 'empty':
      shutil.rmtree(step)
      step.mkdir()
    case 'no arrays':
      for folder in step.rglob('d'):
        shutil.rmtree(folder)
    case 'a flipped bit':
      path = max(step.rglob('*'), key=lambda path: path.stat().st_size)
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
    case 'truncated metrics':
      (step / 'metrics' / 'metrics').write_text('{"acc')
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 9, "ki')
  with caplog.at_level(logging.INFO, 'modelstock_jax'):
    loop.train(config, tmp_path, setup=setup)
  start = 8 if kind == 'truncated metrics' else 4
  assert f'Resuming from step {start}.' in caplog.text
  assert_identical(read_run(config, tmp_path, setup), undisturbed(EPOCH))


def test_all_damaged(
  tiny_config,
  setup,
  read_run,
  undisturbed,
  assert_identical,
  tmp_path,
):
  config = tiny_config()
  with pytest.raises(RuntimeError):
    loop.train(config, tmp_path, setup=_on_call(setup, 10, _fail))
  for step in ('4', '8'):
    shutil.rmtree(tmp_path / 'checkpoints' / step / 'state')
  with pytest.raises(OSError, match=r'none of the checkpoints \[4, 8\]'):
    loop.train(config, tmp_path, setup=setup)
  loop.train(config, tmp_path, setup=setup)  # from the anchor, as it says
  assert_identical(read_run(config, tmp_path, setup), undisturbed(EPOCH))


# Of the same run: devices, and the settings that go with them.
MESHES = {
  'two': (2, {}),
  'four': (4, {'mesh.stock': 2, 'mesh.fsdp_min_size': 64}),
  'one': (1, {'train.models': 'map', 'train.accumulate': 2}),
}


@pytest.fixture(scope='module')
def meshes(prepare_on, tiny_config):
  """Config and setup of each of them, by name."""
  prepared = {}
  for name, (devices, changes) in MESHES.items():
    config = auto.resolve(tiny_config(changes))
    prepared[name] = config, prepare_on(devices, config)
  return prepared


def _weights(run):
  return np.concatenate(
    [v.ravel() for k, v in run.items() if k.startswith('.state.params')]
  )


def _distance(run, other):
  """Between the models of two runs, in parts of their size."""
  weights = _weights(other)
  return np.linalg.norm(_weights(run) - weights) / np.linalg.norm(weights)


@pytest.mark.kills
def test_a_run_moves_between_meshes(
  meshes, read_run, assert_identical, tiny_config, tmp_path, caplog
):
  """2 -> 4 -> 1 -> 2 devices, each model on its own or not, FSDP or not."""
  workdir = tmp_path / 'moved'
  runs = {}
  for name, (config, setup) in meshes.items():
    loop.train(config, tmp_path / name, setup=setup)
    runs[name] = read_run(config, tmp_path / name, setup)

  caplog.set_level(logging.INFO, 'modelstock_jax')
  for name, calls in [('two', 3), ('four', 4), ('one', 2)]:
    config, setup = meshes[name]
    interrupted = _on_call(setup, calls, _send(signal.SIGTERM))
    with pytest.raises(loop.Interrupted):
      loop.train(config, workdir, setup=interrupted)
    path = workdir / 'config.json'
    assert config_lib.from_json(path) == config  # the latest
    # Every mesh gets the same bits.
    saved = read_run(config, workdir, setup)
    for other, elsewhere in meshes.values():
      assert_identical(read_run(other, workdir, elsewhere), saved)
  config, setup = meshes['two']
  loop.train(config, workdir, setup=setup)
  assert 'mesh.stock: 1 -> 2' in caplog.text
  assert 'Resuming from step 9.' in caplog.text

  # Sums over other devices are rounded otherwise, and Adam carries that on: how
  # far depends on the CPU. Images in another order go many times as far.
  runs['moved'] = read_run(config, workdir, setup)
  other = tiny_config({'seed': 1})
  loop.train(other, tmp_path / 'other', setup=setup)
  order = _distance(read_run(other, tmp_path / 'other', setup), runs['two'])
  for name in ('four', 'one', 'moved'):
    assert 0 < _distance(runs[name], runs['two']) < order / 5, name
