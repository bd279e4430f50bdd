import errno
import json

import pytest

from modelstock_jax.training import damage

# As TensorStore words them.
TRUNCATED = ValueError('OUT_OF_RANGE: Requested byte range [0, 9) is not valid')
BROKEN = ValueError('DATA_LOSS: Error reading "p/.zarray": CRC-32C mismatch')
FORBIDDEN = ValueError(
  'PERMISSION_DENIED: Error reading "p": Failed to open [os_error_code=\'13\']'
)
BUSY = ValueError("FAILED_PRECONDITION: Failed to open [os_error_code='16']")
TIMED_OUT = OSError(errno.ETIMEDOUT, 'Connection timed out')
STALE = OSError(errno.ESTALE, 'Stale file handle')
MISSING = FileNotFoundError(errno.ENOENT, 'No such file or directory')


def _wrapped(cause):
  """As Orbax hands on what it meets while it reads an array."""
  error = Exception('Encountered error while reading array index: ()')
  error.__cause__ = cause
  return error


def _attempt(*outcomes):
  """Raises, or returns, one after the other; the last again and again."""
  left = list(outcomes)

  def attempt():
    outcome = left.pop(0) if len(left) > 1 else left[0]
    if isinstance(outcome, Exception):
      raise outcome
    return outcome

  return attempt


def _json_error():
  try:
    json.loads('{"a')
  except ValueError as error:
    return error


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'state').mkdir()
  (tmp_path / 'state' / 'arrays').write_bytes(b'x' * 100)
  return tmp_path


def test_what_can_be_read_is_read_once(folder):
  assert damage.read(folder, _attempt(3, BROKEN)) == 3


@pytest.mark.parametrize(
  'error', [TRUNCATED, BROKEN, FORBIDDEN, TIMED_OUT, _wrapped(STALE)]
)
def test_a_second_attempt_may_succeed(folder, error):
  assert damage.read(folder, _attempt(error, 'all of it')) == 'all of it'


@pytest.mark.parametrize(
  'error',
  [
    TRUNCATED,
    BROKEN,
    MISSING,
    _json_error(),
    UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid start byte'),
    _wrapped(TRUNCATED),
    _wrapped(MISSING),
  ],
)
def test_what_is_in_the_files_is_damage(folder, error):
  with pytest.raises(damage.DamagedError):
    damage.read(folder, _attempt(error))


@pytest.mark.parametrize(
  'errors',
  [
    [TIMED_OUT],
    [OSError(errno.EIO, 'Input/output error')],
    [OSError(errno.EMFILE, 'Too many open files')],
    [STALE],
    [FORBIDDEN],
    [BUSY],
    [_wrapped(FORBIDDEN)],
    # Trouble may look like damage a moment later, or before.
    [TIMED_OUT, TRUNCATED],
    [TRUNCATED, TIMED_OUT],
    # As another version of Orbax may have it.
    [KeyError('key_type')],
    [ValueError('User-provided restore item and on-disk value mismatch')],
    [TypeError('unexpected keyword argument')],
  ],
)
def test_anything_else_is_trouble(folder, errors):
  with pytest.raises(OSError, match=f'{folder}: cannot be read') as error:
    damage.read(folder, _attempt(*errors))
  assert 'nothing was moved' in str(error.value)


@pytest.mark.parametrize('name', ['state/arrays', 'state/other'])
def test_bytes_that_cannot_be_read_are_trouble(folder, name):
  """A truncated file may be one that the disk does not give back."""
  path = folder / name
  path.unlink(missing_ok=True)
  path.symlink_to('/proc/self/mem')  # EIO, from its first byte on
  with pytest.raises(OSError, match='Input/output error'):
    damage.read(folder, _attempt(TRUNCATED))


def test_a_link_to_nowhere_is_damage(folder):
  (folder / 'state' / 'arrays').unlink()
  (folder / 'state' / 'arrays').symlink_to('nowhere')
  with pytest.raises(damage.DamagedError, match='OUT_OF_RANGE'):
    damage.read(folder, _attempt(TRUNCATED))


@pytest.mark.parametrize(
  'error', [MemoryError(), RuntimeError('RESOURCE_EXHAUSTED: out of memory')]
)
def test_what_is_not_of_the_disk_is_raised_as_it_is(folder, error):
  with pytest.raises(type(error)):
    damage.read(folder, _attempt(error))
