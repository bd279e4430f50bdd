"""A merged checkpoint on its way to disk: whole, or not under its name.

It grows in a hidden folder, `.NAME.partial`, next to its place, and is renamed
when it is complete. A journal in that folder lists the tensors that are done,
so that the same command resumes where it was killed.
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
from typing import TextIO

import numpy as np

from modelstock_jax.formats import write as write_lib

_log = logging.getLogger(__name__)

_JOURNAL = 'journal.jsonl'
# Seconds of work that a power cut may cost.
_SYNC_SECONDS = 5.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
  """The output while it is written; `write` and `done` from any thread.

  Attributes:
    records: of the groups of tensors that are done.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    plans: Sequence[Plan],
    journal: TextIO,
    records: list[dict[str, Any]],
  ):
    """See `open_output`, which makes it."""
    self.records = records
    self._journal = journal
    self._waiting: list[dict[str, Any]] = []
    self._synced = time.monotonic()
    self._lock = threading.Lock()
    self._files = {
      plan.name: os.open(folder / plan.name, os.O_RDWR) for plan in plans
    }
    self._places = {
      name: (self._files[plan.name], offset)
      for plan in plans
      for name, offset in plan.offsets.items()
    }

  def write(self, name: str, start: int, elements: np.ndarray) -> None:
    """Put elements of a tensor where they belong, after `start` of them."""
    file, offset = self._places[name]
    data = np.ascontiguousarray(elements).view(np.uint8).data
    offset += start * elements.itemsize
    while data:
      written = os.pwrite(file, data, offset)
      data, offset = data[written:], offset + written

  def done(self, record: dict[str, Any]) -> None:
    """Note that all tensors of a record are written."""
    with self._lock:
      self.records.append(record)
      self._waiting.append(record)
      if time.monotonic() - self._synced > _SYNC_SECONDS:
        self.sync()

  def sync(self) -> None:
    """Bring all to disk, then note it in the journal."""
    # Not if a sync fails, as the next one of the same file would not fail.
    waiting, self._waiting = self._waiting, []
    for file in self._files.values():
      os.fsync(file)
    _append(self._journal, waiting)
    os.fsync(self._journal.fileno())
    self._synced = time.monotonic()

  def close(self) -> None:
    """Close the files."""
    for file in self._files.values():
      os.close(file)


@contextlib.contextmanager
def open_output(
  target: pathlib.Path, plans: Sequence[Plan], identity: Mapping[str, Any]
) -> Iterator[Output]:
  """Open the output of a merge, new or as far as the same merge had come.

  What was written stays for the next try if it is interrupted; it is removed
  if the disk has no room for it, or the models turn out to be wrong
  (ValueError).

  Args:
    target: the folder that will be there in the end, or the one file.
    plans: its files; for one file, one.
    identity: of the merge, as JSON: its inputs and options.

  Raises:
    BlockingIOError: another process is writing it.
    OSError: the disk has no room.
  """
  folder = partial(target)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / _JOURNAL).open('a+', encoding='utf-8') as journal:
    try:
      fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BlockingIOError(
        f'{target}: another process is merging to it. Wait, or end it.'
      ) from error
    try:
      records = _records(journal, identity, folder, plans)
      output = Output(folder, plans, journal, records)
      try:
        yield output
      finally:
        with contextlib.suppress(OSError):  # which a write has met before
          output.sync()
        output.close()
    except (ValueError, OSError) as error:
      if isinstance(error, ValueError) or error.errno in _FULL:
        shutil.rmtree(folder)
      raise


def partial(target: pathlib.Path) -> pathlib.Path:
  """Return the folder in which `target` grows."""
  return target.with_name(f'.{target.name}.partial')


def check_free(target: pathlib.Path) -> None:
  """Raise FileExistsError if there is something at `target`."""
  if target.exists() or target.is_symlink():
    raise FileExistsError(
      f'{target} is there already. Remove it, or give another --output.'
    )


def _records(
  journal: TextIO,
  identity: Mapping[str, Any],
  folder: pathlib.Path,
  plans: Sequence[Plan],
) -> list[dict[str, Any]]:
  """Return what is done already; start anew if it is of another merge."""
  journal.seek(0)
  lines: list[Any] = []
  with contextlib.suppress(ValueError):  # cut off when the process was killed
    lines += map(json.loads, journal)
  sizes = {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()}
  journal.truncate(0)
  if lines[:1] == [identity] and all(
    sizes.get(plan.name) == plan.size for plan in plans
  ):
    _log.info('%s: resuming, %d layers are done.', folder, len(lines) - 1)
  else:
    if lines:
      _log.info(
        '%s is of another merge, or was cut off: starting anew.', folder
      )
    for name in sizes.keys() - {_JOURNAL}:
      (folder / name).unlink()
    _allocate(folder, plans)
    lines = [identity]
  _append(journal, lines)
  return lines[1:]


def _append(journal: TextIO, records: Sequence[Mapping[str, Any]]) -> None:
  journal.writelines(json.dumps(record) + '\n' for record in records)
  journal.flush()


def _allocate(folder: pathlib.Path, plans: Sequence[Plan]) -> None:
  needed = sum(plan.size for plan in plans)
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise OSError(
      errno.ENOSPC,
      f'{folder.parent}: no room for the merged checkpoint, which takes '
      f'{needed / 1e9:.3g} GB; {free / 1e9:.3g} GB are free.',
    )
  for plan in plans:
    path = folder / plan.name
    if isinstance(plan.begin, pathlib.Path):
      shutil.copyfile(plan.begin, path)
    else:
      path.write_bytes(plan.begin)
      os.truncate(path, plan.size)


def publish(target: pathlib.Path, companions: Mapping[str, bytes]) -> None:
  """Give what lies in the partial folder its name: its tensors are synced.

  Args:
    target: the folder, or the one file, `*.safetensors`.
    companions: files to write next to the tensors: names, contents.
  """
  folder = partial(target)
  (folder / _JOURNAL).unlink()
  for name, data in companions.items():
    (folder / name).write_bytes(data)
    write_lib.sync(folder / name)
  check_free(target)
  if target.suffix != '.safetensors':
    folder.rename(target)
  else:
    for name in (*companions, target.name):  # the tensors last
      (folder / name).replace(target.with_name(name))
    folder.rmdir()
  write_lib.sync(target.parent)
