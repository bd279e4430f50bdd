import json
import logging
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile

import jax
from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import modelstock_jax as ms
from modelstock_jax import files
from modelstock_jax import merging
from modelstock_jax.formats import hashes
from modelstock_jax.formats import runs
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib

N = 2
PROCESS = pathlib.Path(__file__).parent / 'checkpoint_process.py'


@pytest.fixture(scope='module')
def placement():
  return sharding.place(stock=N, batch_size=8)


@pytest.fixture(scope='module')
def make(placement):
  """A checkpoint of small arrays, nearly all of which hold `value`."""

  def make(value, *, anchor=False):
    # Arrays of 1 KiB and more get files of their own, if they do not shrink.
    noise = np.random.default_rng(value).normal(size=(N, 20, 50))
    complete = {'w': np.full((2, 3), value, np.float32)}
    stack = {
      'w': np.full((N, 2, 3), value, np.float32),
      'noise': noise.astype(np.float32),
    }
    scalar = {'w': np.float32(value)}
    state = state_lib.State(
      step=jax.device_put(np.int32(value), placement.replicated),
      params=jax.device_put(stack, placement.stack),
      variables={},
      opt_state=jax.device_put(
        {'count': np.full(N, value, np.int32), 'mu': stack}, placement.stack
      ),
      key=jax.device_put(
        jax.random.split(jax.random.key(value), N), placement.stack
      ),
    )
    merged = merging.Merged(complete, scalar, scalar)
    return checkpoints_lib.Checkpoint(
      state,
      jax.device_put(merged, placement.replicated),
      jax.device_put(complete, placement.replicated) if anchor else None,
    )

  return make


@pytest.fixture(scope='module')
def like(make):
  return _abstract(make(0))


def _abstract(checkpoint):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    checkpoint,
  )


def _assert_equal(actual, saved):
  assert jax.tree.structure(actual) == jax.tree.structure(saved)
  for new, old in zip(
    jax.tree.leaves(actual), jax.tree.leaves(saved), strict=True
  ):
    assert new.dtype == old.dtype
    # Equal shardings, or the training step would be compiled anew.
    assert new.sharding == old.sharding
    if jax.dtypes.issubdtype(new.dtype, jax.dtypes.prng_key):
      new, old = jax.random.key_data(new), jax.random.key_data(old)
    np.testing.assert_array_equal(new, old)


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
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, saved)
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    actual = checkpoints.restore(_abstract(saved))
  _assert_equal(actual, saved)


def test_a_checkpoint_may_be_restored_on_another_mesh(two, make):
  other = sharding.place(stock=1, batch_size=8)
  saved = make(7)
  like = checkpoints_lib.Checkpoint(
    state=state_lib.abstract(saved.state, other.state(saved.state)),
    merged=state_lib.abstract(saved.merged, other.replicated),
    anchor=None,
  )
  with checkpoints_lib.Checkpoints(two) as checkpoints:
    actual = checkpoints.restore(like).state.params['w']
  assert actual.sharding == other.stack != saved.state.params['w'].sharding
  np.testing.assert_array_equal(actual, saved.state.params['w'])


def test_the_latest_two_and_the_best_are_kept(tmp_path, make):
  accuracies = {'step_1': 0.5, 'step_2': 0.9, 'step_3': 0.7}
  assert _fill(tmp_path, make, range(1, 7), **accuracies) == [2, 5, 6]


def test_the_best_is_known_after_a_restart(tmp_path, make):
  assert _fill(tmp_path, make, [1, 2], step_1=0.9, step_2=0.1) == [1, 2]
  assert _fill(tmp_path, make, [3, 4], step_3=0.2) == [1, 3, 4]
  assert _fill(tmp_path, make, [5, 6], step_5=0.95) == [5, 6]


def test_without_accuracy_the_latest_two_are_kept(tmp_path, make):
  assert _fill(tmp_path, make, [1, 2, 3, 4])[-2:] == [3, 4]


@pytest.mark.parametrize('replicated', [False, True])
def test_saving_goes_on_in_the_background(
  tmp_path, make, placement, replicated
):
  """`save` returns first, and its arrays may be donated at once."""
  donate = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  big = {'w': jnp.arange(2**23, dtype=jnp.float32), 'b': jnp.arange(2.0**10)}
  if replicated:
    big = jax.device_put(big, placement.replicated)
  expected = jax.tree.map(np.array, big)
  checkpoint = make(1)._replace(merged=merging.Merged(big, None, None))
  like = _abstract(checkpoint)
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, checkpoint)
    before = (tmp_path / '1').exists()
    jax.block_until_ready(donate(big))
    checkpoints.wait()
    assert (tmp_path / '1').exists()
    assert not before
    actual = checkpoints.restore(like).merged.params
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_small_arrays_are_saved_without_compiling(tmp_path, make):
  """Save a small array, which eight devices hold, from one of them."""
  compiled = []

  def listen(event, *_, **__):
    compiled.append(event)

  saved = make(1)
  with checkpoints_lib.Checkpoints(tmp_path) as checkpoints:
    jax.monitoring.register_event_duration_secs_listener(listen)
    checkpoints.save(1, saved)
    checkpoints.wait()
  assert not [event for event in compiled if 'backend_compile' in event]


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
    actual = checkpoints.restore(like)
    assert actual is not None
    assert int(actual.state.step) == 3
    assert checkpoints.steps() == [3]
    # The step can be saved again, and is then the latest.
    checkpoints.save(7, make(8))
    checkpoints.wait()
    assert int(checkpoints.restore(like).state.step) == 8
  [message] = [
    record.getMessage()
    for record in caplog.records
    if 'Checkpoint 7 is damaged' in record.getMessage()
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


def _broken(path, how):
  if how == 'missing':
    path.unlink()
  elif how == 'half':
    _truncate(path)
  elif how == 'empty':
    path.write_bytes(b'')
  else:
    size = path.stat().st_size
    path.write_bytes(np.random.default_rng(0).bytes(size))


HOW = ('missing', 'half', 'empty', 'noise')


def test_any_file_may_be_broken(two, like, make, tmp_path):
  """Either it is not needed, or the checkpoint is passed over; never worse."""
  passed_over = 0
  names = [path.relative_to(two) for path in _files(two / '7')]
  for number, name in enumerate(names):
    folder = tmp_path / str(number) / 'checkpoints'
    shutil.copytree(two, folder)
    _broken(folder / name, HOW[number % len(HOW)])
    with checkpoints_lib.Checkpoints(folder) as checkpoints:
      actual = checkpoints.restore(like)
    step = int(actual.state.step)
    _assert_equal(actual, make(step))
    assert (folder.parent / 'damaged' / '7').is_dir() == (step == 3), name
    passed_over += step == 3
  assert 5 < passed_over < len(names)


def test_without_hashes_nothing_is_verified(copy, like, make, caplog):
  """An older version wrote it, or the run was killed before it hashed."""
  (copy / '7' / 'sha256.process_0.txt').unlink()
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    _assert_equal(checkpoints.restore(like), make(7))
    _assert_equal(checkpoints.restore(like), make(7))
  assert caplog.text.count(f'{copy / "7"}: not verified') == 1


def test_sha256sum_reads_the_hashes(copy):
  command = ['sha256sum', '--check', '--quiet', 'sha256.process_0.txt']
  subprocess.run(command, cwd=copy / '7', check=True)


@pytest.fixture
def public(two):
  """A copy that every user could read: pytest's own folders are private."""
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    yield shutil.copytree(two, pathlib.Path(folder) / 'checkpoints')


class _AsAnybody:
  """Without the rights of root, to whom nothing is forbidden."""

  def __enter__(self):
    self._user = os.geteuid()
    if self._user == 0:
      os.seteuid(65534)

  def __exit__(self, *_):
    os.seteuid(self._user)


def _steps(folder):
  """The steps on disk, whoever has them open."""
  return sorted(int(x.name) for x in folder.iterdir() if x.name.isdecimal())


def _tree(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


@pytest.mark.parametrize(
  'name', ['meta/metadata', 'merged/_METADATA', 'state/d', 'an array', '.']
)
def test_what_may_not_be_read_is_not_damaged(public, like, name):
  path = public / '7' / name
  if name == 'an array':
    path = _files(public / '7' / 'state')[-1]
  before = _tree(public.parent)
  mode = path.stat().st_mode
  path.chmod(0)
  with (
    checkpoints_lib.Checkpoints(public) as checkpoints,
    _AsAnybody(),
    pytest.raises(OSError, match='cannot be read') as error,
  ):
    checkpoints.restore(like)
  path.chmod(mode)
  assert re.search('(?i)permission.denied', str(error.value))
  assert str(public / '7') in str(error.value)
  assert _tree(public.parent) == before
  with checkpoints_lib.Checkpoints(public) as checkpoints:
    assert int(checkpoints.restore(like).state.step) == 7


@pytest.mark.parametrize(
  'name', ['meta/metadata', 'merged/_METADATA', 'an array']
)
def test_what_the_disk_keeps_back_is_not_damaged(copy, like, name):
  path = copy / '7' / name
  if name == 'an array':
    path = _files(copy / '7' / 'state')[-1]
  kept = path.rename(copy / 'kept')
  path.symlink_to('/proc/self/mem')  # EIO, from its first byte on
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    with pytest.raises(OSError, match=r'cannot be read .*Input/output error'):
      checkpoints.restore(like)
    assert checkpoints.steps() == [3, 7]
    kept.rename(path)
    assert int(checkpoints.restore(like).state.step) == 7
  assert not (copy.parent / 'damaged').exists()


def _edit_meta(step, **values):
  path = step / 'meta' / 'metadata'
  meta = {**json.loads(path.read_text()), **values}
  path.write_text(
    json.dumps({key: v for key, v in meta.items() if v is not None})
  )
  hashes.write(step, 0)


def test_a_newer_layout_is_not_damaged(copy, like):
  _edit_meta(copy / '7', layout=2)
  before = _tree(copy.parent)
  with (
    checkpoints_lib.Checkpoints(copy) as checkpoints,
    pytest.raises(ValueError, match=r'layout 2; .* up to 1\. Update') as error,
  ):
    checkpoints.restore(like)
  assert str(copy / '7') in str(error.value)
  assert _tree(copy.parent) == before
  (copy.parent / 'config.json').write_text('{"model": {}}')
  with pytest.raises(ValueError, match=r'layout 2; .* up to 1\. Update'):
    runs.read(copy / '7')


def test_a_damaged_merge_is_an_error_without_noise(copy):
  """In a process of its own: pytest would keep the noise for itself."""
  for folder in list((copy / '7').rglob('d')):
    shutil.rmtree(folder)
  code = (
    'import pathlib, sys\n'
    'from modelstock_jax.formats import runs\n'
    'try:\n'
    '  runs.read(pathlib.Path(sys.argv[1]))\n'
    'except ValueError as error:\n'
    '  print(error)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, copy / '7'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert re.search(f'{copy / "7"}/merged/\\S+ is missing', done.stdout)
  assert not done.stderr


def test_the_first_checkpoints_do_not_say_their_layout(copy, like):
  _edit_meta(copy / '7', layout=None)
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    assert int(checkpoints.restore(like).state.step) == 7


def test_another_model_is_refused_with_all_leaves_that_differ(copy, like, make):
  before = _tree(copy.parent)
  wrong = like._replace(
    state=like.state._replace(
      params={
        'w': jax.ShapeDtypeStruct(
          (N, 2, 4), np.float32, sharding=like.state.params['w'].sharding
        ),
        'bias': like.state.params['w'],
      }
    ),
    merged=like.merged._replace(
      ratio={
        'w': jax.ShapeDtypeStruct(
          (), np.int32, sharding=like.merged.ratio['w'].sharding
        )
      }
    ),
  )
  with checkpoints_lib.Checkpoints(copy) as checkpoints:
    with pytest.raises(ValueError, match='is of another model') as error:
      checkpoints.restore(wrong)
    assert checkpoints.steps() == [3, 7]
  assert str(copy / '7') in str(error.value)
  lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
  assert lines == [
    'merged/ratio/w: file has float32[], the model takes int32[]',
    'missing state/params/bias: float32[2, 2, 3]',
    'extra state/params/noise: float32[2, 20, 50]',
    'state/params/w: file has float32[2, 2, 3], the model takes '
    'float32[2, 2, 4]',
  ]
  assert _tree(copy.parent) == before


def test_another_config_is_refused_with_all_keys_that_differ(copy, like):
  old = {'train': {'epochs': 3, 'accumulate': 1}, 'seed': 0, 'log': {'n': 1}}
  _edit_meta(copy / '7', config=old)
  before = _tree(copy.parent)
  new = {'train': {'epochs': 5, 'accumulate': 4}, 'seed': 1, 'log': {'n': 2}}
  with (
    checkpoints_lib.Checkpoints(copy, config=new) as checkpoints,
    pytest.raises(ValueError, match='of a run with another config') as error,
  ):
    checkpoints.restore(like)
  lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
  assert lines == ['seed: 0 -> 1', 'train.epochs: 3 -> 5']
  assert _tree(copy.parent) == before


def test_a_run_may_go_on_with_other_settings_of_execution(copy, like, make):
  old = {'train': {'epochs': 3, 'accumulate': 1}, 'mesh': {'stock': 1}}
  new = {'train': {'epochs': 3, 'accumulate': 4}, 'mesh': {'stock': 2}}
  _edit_meta(copy / '7', config=old)
  with checkpoints_lib.Checkpoints(copy, config=new) as checkpoints:
    assert int(checkpoints.restore(like).state.step) == 7
    checkpoints.save(9, make(9))
  meta = json.loads((copy / '9' / 'meta' / 'metadata').read_text())
  assert meta['config'] == new  # the latest


@pytest.fixture(params=['a full disk', 'a limit on files'])
def small(request, tmp_path):
  """A folder with little room: its path, and how to make more."""
  if request.param == 'a limit on files':
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def more():
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    yield tmp_path / 'checkpoints', more
    more()
    return

  def mount(option):
    command = ['mount', '-t', 'tmpfs', '-o', option, 'none', tmp_path]
    return subprocess.run(command, capture_output=True, check=False)

  if mount('size=1m').returncode:
    pytest.skip('only root may mount a file system')
  yield tmp_path / 'checkpoints', lambda: mount('remount,size=64m')
  subprocess.run(['umount', tmp_path], check=True)


@pytest.fixture(scope='module')
def too_big(make, placement):
  """A checkpoint of 4 MiB that do not shrink."""
  noise = np.random.default_rng(0).normal(size=2**20).astype(np.float32)
  big = jax.device_put({'w': noise}, placement.replicated)
  return make(9)._replace(merged=merging.Merged(big, None, None))


def test_a_full_disk_costs_no_checkpoint(
  small, make, like, too_big, caplog, capfd
):
  folder, make_room = small
  assert _fill(folder, make, [3, 7]) == [3, 7]
  checkpoints = checkpoints_lib.Checkpoints(folder)
  checkpoints.save(9, too_big)
  with pytest.raises(OSError, match='checkpoint 9 could not be saved') as error:
    checkpoints.wait()
  checkpoints.close()
  assert not caplog.text + capfd.readouterr().err  # said once
  text = str(error.value)
  assert text.startswith(f'{folder}: ')
  needed, free = re.search(
    r'up to (\S+) MiB, (\S+) MiB are free', text
  ).groups()
  assert needed == '4.0'
  if 'File too large' not in text:
    assert 'No space left on device' in text
    assert float(free) < 4
  assert 'Checkpoints [3, 7] are kept.' in text
  assert 'rerun the same command to resume from step 7.' in text
  # The same command again, with as little room and then with more.
  assert _steps(folder) == [3, 7]
  with checkpoints_lib.Checkpoints(folder) as checkpoints:
    _assert_equal(checkpoints.restore(like), make(7))
    checkpoints.save(8, make(8))
    checkpoints.wait()
    assert _steps(folder) == [7, 8]
    make_room()
    checkpoints.save(9, too_big)
    checkpoints.wait()
    _assert_equal(checkpoints.restore(_abstract(too_big)), too_big)
  # Threads of the save that failed may write on; the next start tidies.
  with checkpoints_lib.Checkpoints(folder):
    assert sorted(path.name for path in folder.iterdir()) == ['8', '9']


def test_a_save_that_failed_is_told_at_the_next(small, make, too_big):
  folder, _ = small
  checkpoints = checkpoints_lib.Checkpoints(folder)
  checkpoints.save(9, too_big)
  with pytest.raises(OSError, match='checkpoint 9 could not be saved'):
    checkpoints.save(10, make(10))
  checkpoints.close()
  assert _steps(folder) == []


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
  assert meta == {
    'layout': 1,
    'step': 5,
    'next_batch': 5,
    'config': config,
  }


@pytest.mark.hosts
def test_processes_agree(tmp_path):
  """Reject on all processes what one cannot read; one of them moves it.

  A merge of Orbax checkpoints is restored in shards: one row by each process.
  """
  rows = np.random.default_rng(0).normal(size=(3, 2, 6)).astype(np.float32)
  for seed, w in enumerate(rows):
    with ocp.StandardCheckpointer() as writer:
      writer.save(tmp_path / f'orbax{seed}', {'w': w})
  anchor, *models = sorted(tmp_path.glob('orbax*'))
  files.merge(anchor, models, tmp_path / 'merged')
  merged = np.asarray(ms.model_stock(rows[0], [*rows[1:]]).params)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  folder = tmp_path / 'checkpoints'
  processes = [
    subprocess.Popen(
      [sys.executable, PROCESS, folder],
      env={
        **os.environ,
        'JAX_NUM_CPU_DEVICES': '1',
        'PYTHONPATH': str(PROCESS.parents[2]),
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(index),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors[-3000:]
  actual = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
  restored = [row for (_, row), *_ in sorted(actual)]
  np.testing.assert_allclose(np.concatenate(restored), merged, atol=1e-6)
  for _, complete, fallen_back, refused in actual:
    assert complete == [9, True]
    assert fallen_back == [7, True]
    assert refused.startswith(f'ValueError: {folder / "7"}: a newer version')
  assert sorted(p.name for p in (tmp_path / 'damaged').iterdir()) == ['9']
  assert _steps(folder) == [7]
