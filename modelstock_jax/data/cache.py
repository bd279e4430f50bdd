"""Arrays that take long to compute, kept in files."""

import contextlib
import logging
import os
import pathlib

from etils import epath
import numpy as np

_log = logging.getLogger(__name__)


def home() -> pathlib.Path:
  """Return the folder of what is kept, $XDG_CACHE_HOME/modelstock_jax."""
  folder = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(folder).expanduser() / 'modelstock_jax'


def places(
  folder: str | os.PathLike[str] | None, name: str
) -> list[epath.Path]:
  """Return the files that may hold an array, the first choice first.

  Args:
    folder: what the array was made of; None if nothing is to be written there.
    name: of the file.

  Returns:
    A file in the folder, and one in `home()`.
  """
  return [epath.Path(f) / name for f in (folder, home()) if f is not None]


def load(files: list[epath.Path], shape: tuple[int, ...]) -> np.ndarray | None:
  """Return the array of the first file that holds such a one, else None."""
  for path in files:
    with (
      contextlib.suppress(OSError, ValueError, EOFError),  # missing or damaged
      path.open('rb') as file,
    ):
      array = np.load(file, allow_pickle=False)
      if array.shape == shape:
        return array
  return None


def save(files: list[epath.Path], array: np.ndarray) -> None:
  """Write an array to the first file that can be written."""
  for path in files:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      # A reader sees all of it or nothing, whichever process wrote it last.
      temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
      with temporary.open('wb') as file:
        np.save(file, array)
      temporary.replace(path)
      return
    except OSError as error:
      _log.warning('%s cannot be written: %s', path, error)
