"""The difference between what is damaged and what cannot be read now.

What is damaged may be set aside; what a disk, a network or a permission keeps
back must stay where it is. An error alone tells little: reading over a network
that breaks off may look like a truncated file. Hence the rule: a folder is
damaged if it cannot be read twice, both times because of what is in it, and
each time all bytes of all its files could be read.
"""

from collections.abc import Callable
import errno
import json
import os
import pathlib
import re
from typing import TypeVar

_T = TypeVar('_T')

# Of TensorStore, for what is in a file: its message begins with one of these.
_STATUS = (
  'DATA_LOSS:',
  'FAILED_PRECONDITION:',
  'INVALID_ARGUMENT:',
  'NOT_FOUND:',
  'OUT_OF_RANGE:',
)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_OF_READING = (OSError, ValueError, LookupError, TypeError, AttributeError)
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
      if not isinstance(cause, _OF_READING):
        raise  # out of memory, or a mistake of ours
    if not _is_of_content(cause):
      trouble = trouble or cause
    trouble = trouble or _trouble_with_bytes(folder)
  if trouble is None:
    raise DamagedError(line(cause)) from cause
  raise OSError(
    f'{folder}: cannot be read ({line(trouble)}). It may well be whole, so '
    'nothing was moved. See to the disk, or to whose files these are, and run '
    'the same command again; or move this folder away, to go on from the '
    'checkpoint before.'
  ) from trouble


def line(error: BaseException) -> str:
  r"""Return an error in one line that is not too long.

  >>> line(ValueError('NOT_FOUND: no such array\nSource: ...'))
  'ValueError: NOT_FOUND: no such array'
  """
  text = str(error).strip().split('\n')[0]
  text = re.sub(r" \[tensorstore_spec='.*?'\]", '', text)  # a page of JSON
  if len(text) > 400:  # what was tried comes first, the reason last
    text = f'{text[:150]} ... {text[-240:]}'
  return f'{type(error).__name__}: {text}' if text else type(error).__name__


def _is_of_content(error: BaseException) -> bool:
  """Return True if an error is surely about what is in files.

  A KeyError, say, may as well come of another version of Orbax.
  """
  if isinstance(error, OSError):
    return error.errno in _MISSING or type(error) is FileNotFoundError
  if isinstance(error, (json.JSONDecodeError, UnicodeError)):
    return True
  code = re.search(r"os_error_code='(\d+)'", str(error))
  missing = code is None or int(code[1]) in _MISSING
  return (
    missing and isinstance(error, ValueError) and str(error).startswith(_STATUS)
  )


def _trouble_with_bytes(folder: pathlib.Path) -> OSError | None:
  """Return what keeps the bytes of a folder from being read, or None."""
  try:
    for parent, _, names in os.walk(folder, onerror=_raise):
      for name in names:
        with open(os.path.join(parent, name), 'rb') as file:
          while file.read(_CHUNK):
            pass
  except OSError as error:
    return None if error.errno in _MISSING else error
  return None


def _raise(error: OSError) -> None:
  raise error
