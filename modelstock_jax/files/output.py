"""A merged checkpoint on its way to disk: complete, or not under its name.

Its files are written in a folder in a hidden one, `.NAME.partial`, next to its
place, and renamed when all are complete; see `write.partial`.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import errno
import os
import pathlib
import secrets
import shutil
from typing import NamedTuple

import numpy as np

from modelstock_jax.formats import write as write_lib


class Plan(NamedTuple):
  """A file of the output.

  Attributes:
    name: file name, in a folder or not.
    begin: first bytes of the file, or a file that it begins as a copy of.
    offsets: first byte of each tensor, by name.
    size: size of the complete file, bytes.
  """

  name: str
  begin: bytes | pathlib.Path
  offsets: Mapping[str, int]
  size: int

  def inside(self, folder: str) -> 'Plan':
    """Return the plan in a folder, 'folder/', which its names begin with."""
    offsets = {f'{folder}{name}': at for name, at in self.offsets.items()}
    return self._replace(name=f'{folder}{self.name}', offsets=offsets)


class Output:
  """The files of the output while they are written; `write` from any thread."""

  def __init__(
    self, target: pathlib.Path, folder: pathlib.Path, plans: Sequence[Plan]
  ):
    """Take the files in `folder`, which `open_output` creates."""
    self._target = target
    self.folder = folder
    self._places = {
      name: (folder / plan.name, offset)
      for plan in plans
      for name, offset in plan.offsets.items()
    }

  def write(self, name: str, start: int, elements: np.ndarray) -> None:
    """Write elements of a tensor, the first of which has index `start`."""
    path, offset = self._places[name]
    offset += start * elements.itemsize
    data = np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data
    with path.open('r+b', buffering=0) as file:
      while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written

  def publish(self, companions: Mapping[str, bytes]) -> None:
    """Sync the files and give them their name.

    Args:
      companions: contents of further files, by name.
    """
    for name, data in companions.items():
      (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
      (self.folder / name).write_bytes(data)
    for path in sorted(self.folder.rglob('*'), reverse=True):
      write_lib.sync(path)  # files before their folder
    check_free(self._target)
    if self._target.suffix != '.safetensors':
      self.folder.rename(self._target)
    else:
      for name in (*companions, self._target.name):  # the tensors last
        (self.folder / name).replace(self._target.with_name(name))
    write_lib.sync(self._target.parent)


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
  target.parent.mkdir(parents=True, exist_ok=True)
  with write_lib.partial(target) as partial:
    check_free(target)
    # Of a new name: processes of a run that was killed do not write in it.
    folder = partial / secrets.token_hex(8)
    folder.mkdir()
    _allocate(folder, plans)
    yield Output(target, folder, plans)


def check_free(target: pathlib.Path) -> None:
  """Raise FileExistsError if there is something at `target`."""
  if target.exists() or target.is_symlink():
    raise FileExistsError(
      f'{target} already exists. Remove it, or choose another --output.'
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
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(plan.begin, pathlib.Path):
      shutil.copyfile(plan.begin, path)
    else:
      path.write_bytes(plan.begin)
      os.truncate(path, plan.size)
