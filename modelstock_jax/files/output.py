"""A merged checkpoint on its way to disk: complete, or not under its name.

Its files are written in a hidden folder, `.NAME.partial`, next to its place,
and renamed when all are complete. What a killed process left there is removed
by the next merge to the same place.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from typing import NamedTuple
from typing import TextIO

import numpy as np

from modelstock_jax.formats import write as write_lib


class Plan(NamedTuple):
  """A file of the output.

  Attributes:
    name: file name.
    begin: first bytes of the file, or a file that it begins as a copy of.
    offsets: first byte of each tensor, by name.
    size: size of the complete file, bytes.
  """

  name: str
  begin: bytes | pathlib.Path
  offsets: Mapping[str, int]
  size: int


class Output:
  """The files of the output while they are written; `write` from any thread."""

  def __init__(
    self, target: pathlib.Path, folder: pathlib.Path, plans: Sequence[Plan]
  ):
    """Create the files in `folder`; see `open_output`, which calls this."""
    self._target = target
    self._folder = folder
    _allocate(folder, plans)
    self._files = [os.open(folder / plan.name, os.O_RDWR) for plan in plans]
    self._places = {
      name: (file, offset)
      for file, plan in zip(self._files, plans, strict=True)
      for name, offset in plan.offsets.items()
    }

  def write(self, name: str, start: int, elements: np.ndarray) -> None:
    """Write elements of a tensor, the first of which has index `start`."""
    file, offset = self._places[name]
    data = np.ascontiguousarray(elements).view(np.uint8).data
    offset += start * elements.itemsize
    while data:
      written = os.pwrite(file, data, offset)
      data, offset = data[written:], offset + written

  def publish(self, companions: Mapping[str, bytes]) -> None:
    """Sync the files and give them their name.

    Args:
      companions: contents of further files, by name.
    """
    for file in self._files:
      os.fsync(file)
    for name, data in companions.items():
      (self._folder / name).write_bytes(data)
      write_lib.sync(self._folder / name)
    check_free(self._target)
    if self._target.suffix != '.safetensors':
      self._folder.rename(self._target)
    else:
      for name in (*companions, self._target.name):  # the tensors last
        (self._folder / name).replace(self._target.with_name(name))
    write_lib.sync(self._target.parent)

  def close(self) -> None:
    """Close the files."""
    for file in self._files:
      os.close(file)


@contextlib.contextmanager
def open_output(
  target: pathlib.Path, plans: Sequence[Plan]
) -> Iterator[Output]:
  """Open the output of a merge; what is not published is removed.

  Args:
    target: the folder, or the one `.safetensors` file, to be written.
    plans: its files; for one file, one.

  Raises:
    BlockingIOError: another process is writing it.
    FileExistsError: there is something at `target`.
    OSError: the disk has no room.
  """
  partial = target.with_name(f'.{target.name}.partial')
  partial.mkdir(parents=True, exist_ok=True)
  with (partial / 'lock').open('w') as lock:
    _take(lock, target)
    try:
      check_free(target)
      folder = partial / 'files'
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir()
      with contextlib.closing(Output(target, folder, plans)) as output:
        yield output
    finally:
      shutil.rmtree(partial, ignore_errors=True)


def check_free(target: pathlib.Path) -> None:
  """Raise FileExistsError if there is something at `target`."""
  if target.exists() or target.is_symlink():
    raise FileExistsError(
      f'{target} already exists. Remove it, or choose another --output.'
    )


def _take(lock: TextIO, target: pathlib.Path) -> None:
  """Lock a file, which a process that ended may have removed meanwhile."""
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
      return
  except (BlockingIOError, FileNotFoundError):
    pass
  raise BlockingIOError(
    f'{target}: another process is merging to it. Wait until it ends, or stop '
    'it.'
  )


def _allocate(folder: pathlib.Path, plans: Sequence[Plan]) -> None:
  needed = sum(plan.size for plan in plans)
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise OSError(
      errno.ENOSPC,
      f'{folder.parents[1]}: no room for the merged checkpoint, which takes '
      f'{needed / 1e9:.3g} GB; {free / 1e9:.3g} GB are free.',
    )
  for plan in plans:
    path = folder / plan.name
    if isinstance(plan.begin, pathlib.Path):
      shutil.copyfile(plan.begin, path)
    else:
      path.write_bytes(plan.begin)
      os.truncate(path, plan.size)
