"""The copy of files that the operating system keeps in memory."""

import os


def holds(nbytes: int) -> bool:
  """Return True if so many bytes leave half of the memory to other files."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return 2 * nbytes <= memory


def drop(file: int, begin: int = 0, nbytes: int = 0) -> None:
  """Remove a part of an open file from the page cache.

  Pages that were written are sent to the disk, and removed by a later call.
  Pages that are mapped stay. Systems that cannot do it do nothing.

  Args:
    file: descriptor of the file.
    begin: first byte.
    nbytes: number of bytes; 0: all up to the end.
  """
  if hasattr(os, 'posix_fadvise'):  # not on macOS
    os.posix_fadvise(file, begin, nbytes, os.POSIX_FADV_DONTNEED)
