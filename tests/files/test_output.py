"""An output is complete or absent, whatever interrupts the merge."""

import errno
import os
import re
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from modelstock_jax import files
from modelstock_jax.files import blocks
from modelstock_jax.files import layout


class Stop(BaseException):
  """As Ctrl-C, wherever it comes."""


def _bytes(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_it_leaves_nothing(family, save, tmp_path, monkeypatch):
  anchor, models = save(family())
  calls, blend = [], blocks.blend

  def stop(*args):
    calls.append(1)
    if len(calls) > 3:
      raise Stop
    return blend(*args)

  monkeypatch.setattr(blocks, 'blend', stop)
  with pytest.raises(Stop):
    files.merge(anchor, models, tmp_path / 'out', threads=1)
  assert not list(tmp_path.glob('*out*'))


KILLED = """
import os, sys
from modelstock_jax import files

def progress(done, total):
  if done * 2 > total:
    os.kill(os.getpid(), 9)

files.merge(sys.argv[1], sys.argv[2:4], sys.argv[4], threads=1,
  progress=progress)
"""


@pytest.mark.parametrize('target', ['out', 'out.safetensors'])
def test_killed_it_starts_again(family, save, tmp_path, monkeypatch, target):
  monkeypatch.setattr(layout, 'SHARD_SIZE', 800)
  trees = family()
  anchor, models = save(trees)
  command = [sys.executable, '-c', KILLED, anchor, *models, tmp_path / target]
  killed = subprocess.run(command, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert not (tmp_path / target).exists()
  partial = tmp_path / f'.{target}.partial'
  assert partial.exists()
  files.merge(anchor, models, tmp_path / target)
  assert not partial.exists()
  (tmp_path / 'kept').mkdir()
  files.merge(anchor, models, tmp_path / 'kept' / target)
  if target == 'out':
    assert _bytes(tmp_path / 'out') == _bytes(tmp_path / 'kept' / 'out')
  else:
    left, right = tmp_path / target, tmp_path / 'kept' / target
    assert left.read_bytes() == right.read_bytes()


RACE = """
import os, sys
from modelstock_jax import files

for target in sys.argv[4:]:
  for _ in range(4):
    if not os.fork():
      try:
        files.merge(sys.argv[1], sys.argv[2:4], target, threads=1)
        line = f'{target}: complete'
      except OSError as error:
        line = str(error)
      os.write(1, f'{line}\\n'.encode())
      os._exit(0)
  for _ in range(4):
    os.wait()
"""


def test_of_four_processes_one_writes(family, save, tmp_path):
  anchor, models = save(family())
  files.merge(anchor, models, tmp_path / 'alone')
  targets = [tmp_path / f'out{number}' for number in range(5)]
  lines = subprocess.run(
    [sys.executable, '-c', RACE, anchor, *models, *targets],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  ).stdout.splitlines()
  for target in targets:
    count = {
      text: sum(bool(re.match(f'{target}({text})', line)) for line in lines)
      for text in (': complete', ' already exists|: in use by process')
    }
    assert list(count.values()) == [1, 3], '\n'.join(lines)
    assert _bytes(target).keys() == _bytes(tmp_path / 'alone').keys()
  assert not list(tmp_path.glob('.out*'))


def test_what_is_there_stays(family, save, tmp_path):
  anchor, models = save(family())
  (tmp_path / 'out').mkdir()
  with pytest.raises(FileExistsError, match=r'out already exists\. Remove'):
    files.merge(anchor, models, tmp_path / 'out')
  assert list((tmp_path / 'out').iterdir()) == []
  (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
  with pytest.raises(FileExistsError, match='dangling already exists'):
    files.merge(anchor, models, tmp_path / 'dangling')


def test_no_room(family, save, tmp_path, monkeypatch):
  anchor, models = save(family())
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(OSError, match=r'no room .* takes \S+ GB; 1e-06 GB are'):
    files.merge(anchor, models, tmp_path / 'out')
  assert not list(tmp_path.glob('*out*'))


def _of_tensors(file):
  return os.readlink(f'/proc/self/fd/{file}').endswith('.safetensors')


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc')
@pytest.mark.parametrize('target', ['out', 'out.safetensors'])
def test_tensors_are_on_disk_before_they_get_their_name(
  family, save, tmp_path, monkeypatch, target
):
  anchor, models = save(family())
  fsync = os.fsync

  def fail_once(file):
    if _of_tensors(file):
      monkeypatch.setattr(os, 'fsync', fsync)  # the next one would be silent
      raise OSError(errno.EIO, 'Input/output error')
    fsync(file)

  monkeypatch.setattr(os, 'fsync', fail_once)
  with pytest.raises(OSError, match='Input/output error'):
    files.merge(anchor, models, tmp_path / target)
  assert not list(tmp_path.glob('*out*'))
  files.merge(anchor, models, tmp_path / target)
  assert (tmp_path / target).exists()


@pytest.mark.parametrize('name', ['truncate', 'pwrite', 'fsync'])
def test_the_disk_is_full(family, save, tmp_path, monkeypatch, name):
  """Fill a disk where the file system did not tell beforehand."""
  anchor, models = save(family())

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, name, full)
    with pytest.raises(OSError, match=r'no room|No space left'):
      files.merge(anchor, models, tmp_path / 'out')
  assert not list(tmp_path.glob('*out*'))
  files.merge(anchor, models, tmp_path / 'out')


def test_a_disk_that_fails(family, save, tmp_path, monkeypatch):
  anchor, models = save(family())
  pwrite, calls = os.pwrite, []

  def fail(*args):
    calls.append(1)
    if len(calls) == 4:
      raise OSError(errno.EIO, 'Input/output error')
    return pwrite(*args)

  monkeypatch.setattr(os, 'pwrite', fail)
  with pytest.raises(OSError, match='Input/output error'):
    files.merge(anchor, models, tmp_path / 'out', threads=1)
  assert not list(tmp_path.glob('*out*'))


def test_a_write_may_be_cut_short(family, save, load, tmp_path, monkeypatch):
  anchor, models = save(family())
  files.merge(anchor, models, tmp_path / 'whole')
  pwrite = os.pwrite
  monkeypatch.setattr(
    os, 'pwrite', lambda file, data, at: pwrite(file, data[:7], at)
  )
  files.merge(anchor, models, tmp_path / 'out')
  assert _bytes(tmp_path / 'out') == _bytes(tmp_path / 'whole')


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[5]),) * 2)
from modelstock_jax import files
files.merge(sys.argv[1], sys.argv[2:4], sys.argv[4], threads=2)
peak = [l for l in open('/proc/self/status') if l.startswith('VmHWM')]
print(int(peak[0].split()[1]) // 1024)
"""


@pytest.mark.skipif(
  sys.platform != 'linux', reason='limits of memory, and holes'
)
def test_larger_than_memory(tmp_path):
  """Checkpoints of 0.8 GB, most of which is a hole, in 0.7 GB in all."""
  paths = []
  rng = np.random.default_rng(0)
  for name in 'abc':
    path = tmp_path / f'{name}.safetensors'
    head, size = _header({'w': (1000,), 'large': (200_000_000,)})
    with path.open('wb') as file:
      file.write(head)
      file.write(rng.normal(size=1000).astype(np.float32).tobytes())
      file.truncate(size)
    paths.append(path)
  limit = 700 * 2**20
  assert limit < size
  ran = subprocess.run(
    [
      *(sys.executable, '-c', LIMITED, *paths, tmp_path / 'out.safetensors'),
      str(limit),
    ],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  # The header is filled up to a multiple of eight bytes.
  assert 0 <= (tmp_path / 'out.safetensors').stat().st_size - size < 8
  # Far less than the 200 MB beside the largest tensor that would be allowed.
  assert int(ran.stdout) < 200


def _header(shapes):
  text, end = [], 0
  for name, shape in shapes.items():
    begin, end = end, end + 4 * int(np.prod(shape))
    text.append(
      f'"{name}":{{"dtype":"F32","shape":{list(shape)},'
      f'"data_offsets":[{begin},{end}]}}'
    )
  data = ('{' + ','.join(text) + '}').encode()
  head = struct.pack('<Q', len(data)) + data
  return head, len(head) + end
