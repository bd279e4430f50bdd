"""A merged checkpoint on its way to disk: whole, or not under its name.

It grows in a hidden folder beside its place, `.NAME.partial`, and is renamed
when all is there. A journal in that folder says which tensors are done, so
that the same command goes on where it was killed.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import shutil
import threading
import time
from typing import Any
from typing import NamedTuple

import numpy as np

_log = logging.getLogger(__name__)

_JOURNAL = 'journal.jsonl'
# Seconds of work that a power cut may cost.
_SYNC_SECONDS = 5.0


class Plan(NamedTuple):
  """A file of the output.

  Attributes:
    name: of the file.
    begin: its first bytes, or a file that it begins as a copy of.
    size: bytes of the whole file.
    offsets: where each tensor begins, by name.
  """

  name: str
  begin: bytes | pathlib.Path
  size: int
  offsets: Mapping[str, int]


class Output:
  """The output while it is written; `write` and `done` from any thread."""

  def __init__(self, folder: pathlib.Path, plans: Sequence[Plan], journal: Any):
    """See `open_output`, which makes it."""
    self.folder = folder
    self.records: list[dict[str, Any]] = []
    self._journal = journal
    self._waiting: list[dict[str, Any]] = []
    self._synced = time.monotonic()
    self._lock = threading.Lock()
    self._files = {
      plan.name: os.open(folder / plan.name, os.O_RDWR | os.O_CREAT, 0o644)
      for plan in plans
    }
    self._places = {
      name: (self._files[plan.name], offset)
      for plan in plans
      for name, offset in plan.offsets.items()
    }

  def write(self, name: str, start: int, elements: np.ndarray) -> None:
    """Puts elements of a tensor where they belong, after `start` of them."""
    file, offset = self._places[name]
    data = np.ascontiguousarray(elements).view(np.uint8).data
    offset += start * elements.itemsize
    while data:
      written = os.pwrite(file, data, offset)
      data, offset = data[written:], offset + written

  def done(self, record: dict[str, Any]) -> None:
    """Notes that all tensors of a record are written."""
    with self._lock:
      self.records.append(record)
      self._waiting.append(record)
      if time.monotonic() - self._synced > _SYNC_SECONDS:
        self._sync()

  def sync(self) -> None:
    """Brings all to disk, and says so in the journal."""
    with self._lock:
      self._sync()

  def _sync(self) -> None:
    # First the tensors, then the word that they are there: not if a sync fails,
    # as the next one of the same file would not say so again.
    waiting, self._waiting = self._waiting, []
    for file in self._files.values():
      os.fsync(file)
    self._journal.writelines(json.dumps(record) + '\n' for record in waiting)
    self._journal.flush()
    os.fsync(self._journal.fileno())
    self._synced = time.monotonic()

  def close(self) -> None:
    """Closes the files."""
    for file in self._files.values():
      os.close(file)


@contextlib.contextmanager
def open_output(
  target: pathlib.Path, plans: Sequence[Plan], identity: Mapping[str, Any]
) -> Iterator[Output]:
  """The output of a merge, new or as far as the same merge had come.

  What was written stays for the next try if it is interrupted; it is removed
  if there is no room for it, or the models turn out to be wrong (ValueError).

  Args:
    target: the folder that will be there in the end, or the one file.
    plans: its files; for one file, one.
    identity: of the merge, as JSON: its inputs and options.

  Raises:
    BlockingIOError: another process is writing it.
    OSError: the disk has no room.
  """
  folder = partial(target)
  folder.parent.mkdir(parents=True, exist_ok=True)
  folder.mkdir(exist_ok=True)
  with (folder / _JOURNAL).open('a+', encoding='utf-8') as journal:
    try:
      fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BlockingIOError(
        f'{target}: another process is merging to it. Wait, or end it.'
      ) from error
    try:
      records = _begun(journal, identity, folder, plans)
      output = Output(folder, plans, journal)
      output.records += records
      try:
        yield output
      finally:
        with contextlib.suppress(OSError):  # which a write has met before
          output.sync()
        output.close()
    except ValueError:
      shutil.rmtree(folder)
      raise
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        shutil.rmtree(folder)
      raise


def partial(target: pathlib.Path) -> pathlib.Path:
  """The folder in which `target` grows."""
  return target.with_name(f'.{target.name}.partial')


def check_free(target: pathlib.Path) -> None:
  """Raises FileExistsError if there is something at `target`."""
  if target.exists() or target.is_symlink():
    raise FileExistsError(
      f'{target} is there already. Remove it, or give another --output.'
    )


def _begun(
  journal: Any,
  identity: Mapping[str, Any],
  folder: pathlib.Path,
  plans: Sequence[Plan],
) -> list[dict[str, Any]]:
  """What is done already; begins anew where it is of another merge."""
  journal.seek(0)
  lines = []
  for line in journal:
    try:
      lines.append(json.loads(line))
    except ValueError:  # cut off when the process was killed
      break
  whole = all(
    (folder / plan.name).is_file()
    and (folder / plan.name).stat().st_size == plan.size
    for plan in plans
  )
  if lines and lines[0] == identity and whole:
    _log.info('%s: going on, %d layers are done.', folder, len(lines) - 1)
    journal.truncate(0)
    journal.writelines(json.dumps(line) + '\n' for line in lines)
    journal.flush()
    return lines[1:]
  if lines:
    _log.info('%s is of another merge, or was cut off: beginning anew.', folder)
  for path in folder.iterdir():
    if path.name != _JOURNAL:
      path.unlink()
  journal.truncate(0)
  _allocate(folder, plans)
  journal.write(json.dumps(identity) + '\n')
  journal.flush()
  return []


def _allocate(folder: pathlib.Path, plans: Sequence[Plan]) -> None:
  needed = sum(plan.size for plan in plans)
  free = shutil.disk_usage(folder).free
  message = (
    f'{folder.parent}: no room for the merged checkpoint, which takes '
    f'{needed / 1e9:.3g} GB; {free / 1e9:.3g} GB are free.'
  )
  if free < needed:
    raise OSError(errno.ENOSPC, message)
  for plan in plans:
    path = folder / plan.name
    if isinstance(plan.begin, pathlib.Path):
      shutil.copyfile(plan.begin, path)
      continue
    with path.open('wb') as file:
      file.write(plan.begin)
      file.flush()
      if not hasattr(os, 'posix_fallocate'):  # macOS
        file.truncate(plan.size)
        continue
      try:
        os.posix_fallocate(file.fileno(), 0, max(plan.size, 1))
      except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
          raise OSError(errno.ENOSPC, message) from error
        if error.errno == errno.EFBIG:
          raise OSError(
            errno.EFBIG,
            f'{path} would have {plan.size / 1e9:.3g} GB, more than a file may '
            'have here (`ulimit -f`, or the file system).',
          ) from error
        file.truncate(plan.size)  # a file system that cannot reserve


def publish(target: pathlib.Path, beside: Mapping[str, bytes]) -> None:
  """Gives what lies in the partial folder its name: its tensors are synced.

  Args:
    target: the folder, or the one file, `*.safetensors`.
    beside: what to write beside the tensors: names, contents.
  """
  folder = partial(target)
  (folder / _JOURNAL).unlink()
  for name, data in beside.items():
    _write(folder / name, data)
  check_free(target)
  if target.suffix != '.safetensors':
    folder.rename(target)
  else:
    for name in (*beside, target.name):  # the tensors last
      (folder / name).replace(target.with_name(name))
    folder.rmdir()
  directory = os.open(target.parent, os.O_RDONLY)
  os.fsync(directory)
  os.close(directory)


def _write(path: pathlib.Path, data: bytes) -> None:
  with path.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
