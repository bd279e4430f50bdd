"""Detection of damaged folders, as opposed to those that cannot be read now.

A damaged folder may be moved away; one that a disk, a network or a permission
keeps from being read must stay where it is. The error alone does not decide: a
connection that breaks may look like a truncated file. A folder counts as
damaged if two attempts to read it fail because of its content, while all bytes
of all its files can be read.
"""

from collections.abc import Callable
import json
import os
import pathlib
import re
from typing import TypeVar

from modelstock_jax.formats import hashes
from modelstock_jax.formats import text

_T = TypeVar('_T')

# The start of TensorStore's messages about the content of a file.
_STATUS = re.compile(
  'DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|NOT_FOUND|OUT_OF_RANGE'
)
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_CONTENT = (json.JSONDecodeError, UnicodeError, hashes.DamagedFileError)
_READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError)
_CHUNK = 2**24  # bytes


class DamagedError(Exception):
  """A folder whose content is missing, truncated or no longer makes sense."""


def read(folder: pathlib.Path, attempt: Callable[[], _T]) -> _T:
  """Return what an attempt to read a folder returns, the first or the second.

  Args:
    folder: with everything that the attempt reads.
    attempt: reads it, and may be called twice.

  Returns:
    What it returned.

  Raises:
    DamagedError: the folder is damaged.
    OSError: it cannot be read, for another reason or for one unknown.
  """
  trouble = None
  for _ in range(2):
    try:
      return attempt()
    except Exception as error:
      cause: BaseException = error
      while cause.__cause__ is not None:  # Orbax wraps what it meets
        cause = cause.__cause__
      if not isinstance(cause, _READ_ERRORS):
        raise  # out of memory, or a defect of this library
    if not _is_of_content(cause):
      trouble = trouble or cause
    trouble = trouble or _find_unreadable(folder)
  if trouble is None:
    raise DamagedError(text.line(cause)) from cause
  raise OSError(
    f'{folder}: cannot be read ({text.line(trouble)}). It may be intact, so '
    'nothing was moved. Check the disk and the permissions of its files, and '
    'rerun the same command; or move this folder away to resume from the '
    'checkpoint before it.'
  ) from trouble


def _is_of_content(error: BaseException) -> bool:
  """Return True if an error is certainly about the content of files.

  A KeyError, for instance, may be that of another version of Orbax.
  """
  if isinstance(error, (*_MISSING, *_CONTENT)):
    return True
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code and not isinstance(OSError(int(code[1]), ''), _MISSING):
    return False
  return isinstance(error, ValueError) and bool(_STATUS.match(str(error)))


def _find_unreadable(folder: pathlib.Path) -> OSError | None:
  """Read all bytes of a folder; return the error that prevents it, if any."""
  try:
    for parent, _, names in os.walk(folder, onerror=_raise):
      for name in names:
        with open(os.path.join(parent, name), 'rb') as file:
          while file.read(_CHUNK):
            pass
  except _MISSING:
    return None
  except OSError as error:
    return error
  return None


def _raise(error: OSError) -> None:
  raise error
