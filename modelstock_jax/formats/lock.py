"""Locks between processes: one of them at a time writes a workdir or a file."""

from collections.abc import Iterator
import contextlib
import datetime
import errno
import fcntl
import logging
import os
import pathlib
import socket
import time
from typing import TextIO

from modelstock_jax.formats import text

_log = logging.getLogger(__name__)

# Time to wait for a lock, which small files hold for milliseconds.
_SECONDS = 1.0
# Errors of a file system that has no locks.
_UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def hold(path: text.PathLike, target: text.PathLike) -> Iterator[None]:
  """Hold a lock, which the kernel releases if this process is killed.

  Where the file system has no locks, a warning says so and nothing is locked.

  Args:
    path: file that is locked, in a folder that exists; removed in the end.
    target: what the lock protects, for messages.

  Raises:
    BlockingIOError: another process holds it; names the process, its host and
      the time since when.
    OSError: the file cannot be created.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with hold(f'{folder}/.lock', folder):
  ...     print(os.listdir(folder))
  ...   print(os.listdir(folder))
  ['.lock']
  []
  """
  path = pathlib.Path(path)
  deadline = time.monotonic() + _SECONDS
  while True:
    with path.open('a+', encoding='utf-8', errors='replace') as file:
      if _take(file, path, target):
        try:
          yield
        finally:
          if _is_at(file, path):
            path.unlink()
        return
      if time.monotonic() > deadline:
        file.seek(0)
        holder = text.plain(file.read()) or 'another process'
        raise BlockingIOError(
          f'{target}: in use by {holder}. Wait until it ends, or stop it.'
        )
    time.sleep(0.02)


def _take(file: TextIO, path: pathlib.Path, target: text.PathLike) -> bool:
  """Lock a file and write the holder into it; return False if it is locked."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    _log.warning('%s: no locks on this disk: run no other command.', target)
    return True
  # The last holder may have removed it after this process opened it.
  if not _is_at(file, path):
    return False
  now = f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC'
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()} since {now}')
  file.flush()
  return True


def _is_at(file: TextIO, path: pathlib.Path) -> bool:
  """Return True if an open file is the one at a path."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
  except FileNotFoundError:
    return False
