"""Two processes train as one does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.oracle

PROCESS = pathlib.Path(__file__).with_name('host_process.py')
DEVICES = 4


def run(count, workdir):
  """Return what each of `count` processes prints."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  path = [os.environ.get('MODELSTOCK_SCENIC'), os.environ.get('PYTHONPATH')]
  running = [
    subprocess.Popen(
      [sys.executable, PROCESS, str(i), str(count), str(port), workdir],
      env={
        **os.environ,
        'JAX_NUM_CPU_DEVICES': str(DEVICES // count),
        'PYTHONPATH': os.pathsep.join(filter(None, path)),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  try:
    ended = [process.communicate(timeout=240) for process in running]
  finally:
    for process in running:
      process.kill()
  for process, (_, errors) in zip(running, ended, strict=True):
    assert process.returncode == 0, errors[-3000:]
  return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_two_processes(scenic, tmp_path):
  del scenic  # is there
  [alone] = run(1, tmp_path / 'one')
  both = run(2, tmp_path / 'two')
  assert [actual['devices'] for actual in (alone, *both)] == [DEVICES] * 3
  for actual in both:
    assert actual['summary'] == pytest.approx(alone['summary'], rel=1e-5)
    # 1e-6: the gradient of a key's bias is rounding and nothing else.
    params = pytest.approx(alone['params'], rel=1e-5, abs=1e-6)
    assert actual['params'] == params
  names = [
    sorted(path.name for path in folder.iterdir())
    for folder in (tmp_path / 'one', tmp_path / 'two')
  ]
  assert names[0] == names[1] == ['checkpoint_5', 'checkpoint_8', 'models']
