"""Locks between real processes, and where there are none."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys

import pytest

from modelstock_jax.formats import lock

HOLDER = """
import sys, time
from modelstock_jax.formats import lock
with lock.hold(sys.argv[1], 'it'):
  print('held', flush=True)
  time.sleep(60)
"""


def test_the_holder_is_named_and_frees_it_when_killed(tmp_path):
  path = tmp_path / '.lock'
  command = [sys.executable, '-c', HOLDER, path]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
    assert holder.stdout.readline() == b'held\n'
    message = (
      rf'^the/target: in use by process {holder.pid} on '
      rf'{re.escape(socket.gethostname())} since [-0-9]+ [:0-9]+ UTC\. Wait'
    )
    with (
      pytest.raises(BlockingIOError, match=message),
      lock.hold(path, 'the/target'),
    ):
      pass
    holder.kill()
  assert path.exists()
  with lock.hold(path, 'the/target'):
    assert f'process {os.getpid()} ' in path.read_text()
  assert not path.exists()


def test_a_file_that_was_removed_is_not_the_lock(tmp_path, monkeypatch):
  """Between opening and locking it, its last holder may have ended."""
  path, flock = tmp_path / '.lock', fcntl.flock

  def once(file, operation):
    monkeypatch.setattr(fcntl, 'flock', flock)
    path.unlink()
    flock(file, operation)

  monkeypatch.setattr(fcntl, 'flock', once)
  with lock.hold(path, 'it'):
    assert path.exists()


def test_without_locks_it_warns(tmp_path, monkeypatch, caplog):
  def fail(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', fail)
  with lock.hold(tmp_path / '.lock', 'it'):
    pass
  assert caplog.messages == ['it: no locks on this disk: run no other command.']
  assert not list(tmp_path.iterdir())
