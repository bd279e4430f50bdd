"""Files and folders that appear whole or not at all."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil

from modelstock_jax.formats import lock
from modelstock_jax.formats import text


def partial_folder(path: text.PathLike) -> pathlib.Path:
  """Return the folder that `partial` makes for a path."""
  return pathlib.Path(path).with_name(f'.{pathlib.Path(path).name}.partial')


@contextlib.contextmanager
def partial(path: text.PathLike) -> Iterator[pathlib.Path]:
  """Make an empty folder for what will be `path`, which is locked meanwhile.

  Args:
    path: path of the file or folder to be written; its parent exists.

  Yields:
    The folder `.NAME.partial` next to it, which is removed in the end. What a
    killed process has left there is removed first.

  Raises:
    BlockingIOError: another process is writing it, see `lock.hold`.
  """
  path, folder = pathlib.Path(path), partial_folder(path)
  with lock.hold(path.with_name(f'.{path.name}.lock'), path):
    _remove(folder)
    folder.mkdir()
    try:
      yield folder
    finally:
      _remove(folder)


def _remove(folder: pathlib.Path) -> None:
  """Remove a folder into which other processes may be writing."""
  hidden = folder.with_suffix('.removed')  # where they do not find it
  shutil.rmtree(hidden, ignore_errors=True)
  with contextlib.suppress(OSError):
    folder.rename(hidden)
  shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: text.PathLike) -> Iterator[pathlib.Path]:
  """Write a file or a folder under another name, then rename it.

  If the body raises, what was at `path` stays and nothing else does.

  Args:
    path: path of the file or folder; its parent exists. A file is replaced; a
      folder must be empty or absent.

  Yields:
    The path, on the same disk, at which the body makes the file or folder.

  Raises:
    BlockingIOError: another process is writing it, see `lock.hold`.
    FileExistsError: a folder is not empty.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   with replacing(f'{folder}/notes.txt') as temporary:
  ...     _ = temporary.write_text('whole')
  ...   os.listdir(folder)
  ['notes.txt']
  """
  path = pathlib.Path(path)
  with partial(path) as folder:
    temporary = folder / path.name
    yield temporary
    for file in (temporary, *temporary.rglob('*')):
      sync(file)
    if temporary.is_dir():  # another process may have been first
      check_empty(path)
    os.replace(temporary, path)
  sync(path.parent)


def check_empty(folder: pathlib.Path) -> None:
  """Raise FileExistsError unless a folder is empty or does not exist."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(
      f'{folder} is not empty. Name a new folder: nothing is overwritten.'
    )


def write_text(path: text.PathLike, text: str) -> None:
  """Write a UTF-8 text file, whole or not at all; see `replacing`."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


def sync(path: text.PathLike) -> None:
  """Bring a file, or the names in a folder, to disk.

  Raises:
    OSError: the disk fails. Folders of file systems that cannot sync them are
      passed over.
  """
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:
    if not os.path.isdir(path):
      raise
  finally:
    os.close(descriptor)
