import json
import logging
import shutil

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import merging
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib

N = 2

# TensorStore goes on reading after the first error, and finds that Orbax has
# closed the event loop: a race between foreign threads.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(scope='module')
def placement():
  return sharding.place(stock=N, num_models=N, batch_size=8)


@pytest.fixture(scope='module')
def make(placement):
  """A checkpoint of small arrays, all of which hold `value`."""

  def make(value, *, anchor=False):
    whole = {'w': np.full((2, 3), value, np.float32)}
    stack = {'w': np.full((N, 2, 3), value, np.float32)}
    scalar = {'w': np.float32(value)}
    state = state_lib.StockState(
      step=jax.device_put(np.int32(value), placement.replicated),
      params=jax.device_put(stack, placement.stack),
      opt_state=jax.device_put(
        {'count': np.full(N, value, np.int32), 'mu': stack}, placement.stack
      ),
      key=jax.device_put(
        jax.random.split(jax.random.key(value), N), placement.stack
      ),
    )
    merged = merging.Merged(whole, scalar, scalar)
    return checkpoints_lib.Checkpoint(
      state,
      jax.device_put(merged, placement.replicated),
      jax.device_put(whole, placement.replicated) if anchor else None,
    )

  return make


@pytest.fixture(scope='module')
def like(make):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make(0),
  )


def _fill(folder, make, steps, **accuracies):
  with checkpoints_lib.Checkpoints(folder) as checkpoints:
    for step in steps:
      checkpoints.save(
        step, make(step), accuracy=accuracies.get(f'step_{step}')
      )
    checkpoints.wait()
    return checkpoints.steps()


@pytest.fixture(scope='module')
def two(make, tmp_path_factory):
  """A folder with checkpoints 3 and 7, to copy."""
  folder = tmp_path_factory.mktemp('two') / 'checkpoints'
  assert _fill(folder, make, [3, 7], step_7=0.5) == [3, 7]
  return folder


@pytest.fixture
def copy(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'checkpoints')


def test_an_empty_folder_holds_none(tmp_path, like):
  with checkpoints_lib.Checkpoints(tmp_path / 'a' / 'b') as checkpoints:
    assert checkpoints.steps() == []
    assert checkpoints.restore(like) is None


@pytest.mark.parametrize('anchor', [False, True])
def test_what_is_restored_is_what_was_saved(tmp_path, make, anchor):
  saved = make(5, anchor=anchor)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    saved,
  )
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, saved)
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    found = checkpoints.restore(abstract)
  assert found is not None
  assert jax.tree.structure(found) == jax.tree.structure(saved)
  for new, old in zip(
    jax.tree.leaves(found), jax.tree.leaves(saved), strict=True
  ):
    assert new.dtype == old.dtype
    # Equal shardings, or the training step would be compiled anew.
    assert new.sharding == old.sharding
    if jax.dtypes.issubdtype(new.dtype, jax.dtypes.prng_key):
      new, old = jax.random.key_data(new), jax.random.key_data(old)
    np.testing.assert_array_equal(new, old)


def test_a_checkpoint_may_be_restored_on_another_mesh(two, make):
  other = sharding.place(stock=1, num_models=N, batch_size=8)
  saved = make(7)
  like = checkpoints_lib.Checkpoint(
    state=checkpoints_lib.abstract(saved.state, other.state(saved.state)),
    merged=checkpoints_lib.abstract(saved.merged, other.merged(saved.merged)),
    anchor=None,
  )
  with checkpoints_lib.Checkpoints(two) as checkpoints:
    found = checkpoints.restore(like).state.params['w']
  assert found.sharding == other.stack != saved.state.params['w'].sharding
  np.testing.assert_array_equal(found, saved.state.params['w'])


def test_the_latest_two_and_the_best_are_kept(tmp_path, make):
  accuracies = {'step_1': 0.5, 'step_2': 0.9, 'step_3': 0.7}
  assert _fill(tmp_path, make, range(1, 7), **accuracies) == [2, 5, 6]


def test_the_best_is_known_after_a_restart(tmp_path, make):
  assert _fill(tmp_path, make, [1, 2], step_1=0.9, step_2=0.1) == [1, 2]
  assert _fill(tmp_path, make, [3, 4], step_3=0.2) == [1, 3, 4]
  assert _fill(tmp_path, make, [5, 6], step_5=0.95) == [5, 6]


def test_without_accuracy_the_latest_two_are_kept(tmp_path, make):
  assert _fill(tmp_path, make, [1, 2, 3, 4])[-2:] == [3, 4]


def test_saving_goes_on_in_the_background(tmp_path, make):
  """`save` returns first, and its arrays may be donated at once."""
  donate = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  big = {'w': jnp.arange(2**23, dtype=jnp.float32)}
  expected = np.array(big['w'])
  whole = make(1)
  checkpoint = whole._replace(merged=merging.Merged(big, None, None))
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, checkpoint)
    before = (tmp_path / '1').exists()
    overwritten = jax.block_until_ready(donate(big))
    checkpoints.wait()
    assert (tmp_path / '1').exists()
    assert not before
    found = checkpoints.restore(
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        checkpoint._replace(merged=merging.Merged(overwritten, None, None)),
      )
    )
  np.testing.assert_array_equal(found.merged.params['w'], expected)


def _files(step):
  return sorted(
    (path for path in step.rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damage(step, kind):
  match kind:
    case 'empty folder':
      shutil.rmtree(step)
      step.mkdir()
    case 'no state':
      shutil.rmtree(step / 'state')
    case 'no merged':
      shutil.rmtree(step / 'merged')
    case 'no arrays':
      for folder in (step / 'state').rglob('d'):
        shutil.rmtree(folder)
    case 'an array file missing':
      _files(step / 'state' / 'd')[-1].unlink()
    case 'truncated arrays':
      for path in _files(step / 'state'):
        if path.parent.name == 'd':
          _truncate(path)
    case 'truncated tree':
      _truncate(step / 'state' / '_METADATA')
    case 'truncated manifest':
      _truncate(step / 'state' / 'manifest.ocdbt')
    case 'all files empty':
      for path in _files(step):
        path.write_bytes(b'')


KINDS = [
  'empty folder',
  'no state',
  'no merged',
  'no arrays',
  'an array file missing',
  'truncated arrays',
  'truncated tree',
  'truncated manifest',
  'all files empty',
]


@pytest.mark.parametrize('kind', KINDS)
def test_a_damaged_checkpoint_is_passed_over(copy, like, make, caplog, kind):
  _damage(copy / '7', kind)
  with (
    caplog.at_level(logging.WARNING, 'modelstock_jax'),
    checkpoints_lib.Checkpoints(copy) as checkpoints,
  ):
    found = checkpoints.restore(like)
    assert found is not None
    assert int(found.state.step) == 3
    assert checkpoints.steps() == [3]
    # The step can be saved again, and is then the latest.
    checkpoints.save(7, make(8))
    checkpoints.wait()
    assert int(checkpoints.restore(like).state.step) == 8
  [message] = [
    record.getMessage()
    for record in caplog.records
    if 'Checkpoint 7 cannot be read' in record.getMessage()
  ]
  damaged = copy.parent / 'damaged' / '7'
  assert damaged.is_dir()
  assert str(damaged) in message


def test_an_old_checkpoint_that_was_half_deleted_does_no_harm(copy, like, make):
  # Killed while the manager was deleting what is no longer kept.
  _damage(copy / '3', 'no state')
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    assert int(checkpoints.restore(like).state.step) == 7
    checkpoints.save(8, make(8))
    checkpoints.save(9, make(9))
    checkpoints.wait()
    assert int(checkpoints.restore(like).state.step) == 9


def test_what_a_killed_save_left_is_not_a_checkpoint(copy, like, make):
  # A folder gets its name when it is whole; until then it has another one.
  shutil.copytree(copy / '7', copy / '9.orbax-checkpoint-tmp')
  shutil.rmtree(copy / '9.orbax-checkpoint-tmp' / 'state' / 'd')
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    assert checkpoints.steps() == [3, 7]
    assert int(checkpoints.restore(like).state.step) == 7
    checkpoints.save(9, make(9))
    checkpoints.wait()
    assert int(checkpoints.restore(like).state.step) == 9


def test_all_damaged(copy, like, caplog):
  _damage(copy / '3', 'truncated arrays')
  _damage(copy / '7', 'no state')
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    with pytest.raises(OSError, match=r'none of .*3, 7.* can be read') as error:
      checkpoints.restore(like)
    assert str(copy) in str(error.value)
    # As the message says, the next attempt begins from the anchor.
    assert checkpoints.restore(like) is None
  assert sorted(p.name for p in (copy.parent / 'damaged').iterdir()) == [
    '3',
    '7',
  ]


def test_damaged_twice_keeps_both(copy, like, make):
  for _ in range(2):
    _damage(copy / '7', 'no state')
    with checkpoints_lib.Checkpoints(copy) as checkpoints:
      assert int(checkpoints.restore(like).state.step) == 3
      checkpoints.save(7, make(7))
  names = sorted(path.name for path in (copy.parent / 'damaged').iterdir())
  assert names == ['7', '7.1']


@pytest.mark.parametrize('kept', [0, 5])
def test_broken_metrics_cost_no_checkpoint(copy, like, caplog, kept):
  path = copy / '7' / 'metrics' / 'metrics'
  path.write_text(path.read_text()[:kept])
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    assert int(checkpoints.restore(like).state.step) == 7
  assert f'{path}: removed' in caplog.text


def test_what_is_no_checkpoint_is_left_alone(copy, like):
  (copy / 'notes').mkdir()
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    assert checkpoints.steps() == [3, 7]
  assert (copy / 'notes').is_dir()


def test_accuracy_is_on_disk(two):
  assert json.loads((two / '7' / 'metrics' / 'metrics').read_text()) == {
    'accuracy': 0.5
  }


def test_config_and_position_are_kept_with_every_checkpoint(tmp_path, make):
  config = {'train': {'epochs': 3}}
  with checkpoints_lib.Checkpoints(tmp_path, config=config) as checkpoints:
    checkpoints.save(5, make(5))
  meta = json.loads((tmp_path / '5' / 'meta' / 'metadata').read_text())
  assert meta == {'step': 5, 'next_batch': 5, 'config': config}
