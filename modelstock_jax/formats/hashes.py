"""Hashes of the files of a checkpoint, which tell damage when it is read.

Orbax and TensorStore do not verify what they read. Each process of a run
writes `sha256.process_N.txt` for the files that it has written, when the
checkpoint is complete; `sha256sum --check` reads it too.
"""

from concurrent import futures
import functools
import hashlib
import logging
import pathlib
import re

from modelstock_jax.formats import text
from modelstock_jax.formats import write as write_lib

_log = logging.getLogger(__name__)

_MANIFESTS = 'sha256.process_*.txt'


class DamagedFileError(ValueError):
  """A file of a checkpoint is missing, or is not as it was written."""


def write(step: pathlib.Path, process: int) -> None:
  """Write the hashes of the files that one process has written.

  Args:
    step: the folder of a complete checkpoint.
    process: index of the process; 0 has also written what all share.
  """
  lines = [
    f'{digest(step / name)}  {name}\n'
    for name in _names(step)
    if int((re.findall(r'/ocdbt\.process_(\d+)/', name) or '0')[0]) == process
  ]
  name = _MANIFESTS.replace('*', str(process))
  write_lib.write_text(step / name, ''.join(lines))


def verify(
  step: pathlib.Path,
  prefixes: str | tuple[str, ...] = '',
  share: slice = slice(None),
) -> None:
  """Compare files with their hashes.

  A file without a hash passes, with one warning for each checkpoint: an older
  version wrote it, or the run was killed before it wrote the hashes.

  Args:
    step: the folder of a checkpoint.
    prefixes: of the names of the files, such as 'merged/'.
    share: of the files, in alphabetical order: the part to read.

  Raises:
    DamagedFileError: a file is missing, or its hash differs.
    OSError: a file cannot be read.
  """
  hashes = {
    name: value
    for path in step.glob(_MANIFESTS)
    for line in filter(None, path.read_text(errors='replace').split('\n'))
    for value, _, name in [line.partition('  ')]
  }
  if not hashes.keys() >= {*_names(step)}:
    _warn(step)
  names = sorted(name for name in hashes if name.startswith(prefixes))[share]
  with futures.ThreadPoolExecutor() as pool:
    digests = pool.map(digest, [step / name for name in names])
    for name, value in zip(names, digests, strict=True):
      if value != hashes[name]:
        raise DamagedFileError(f'{step / name} is damaged: its hash differs')


def digest(path: pathlib.Path) -> str:
  """Return the SHA-256 of a file.

  Raises:
    DamagedFileError: there is no such file.
  """
  if not path.is_file():
    raise DamagedFileError(f'{text.plain(str(path))} is missing')
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _names(step: pathlib.Path) -> list[str]:
  """Return the names of all files that hashes are for: 'state/_METADATA'."""
  paths = (path for path in step.glob('*/**/*') if path.is_file())
  names = (path.relative_to(step).as_posix() for path in paths)
  # A hidden folder is that of a manifest which another process is writing.
  return sorted(n for n in names if not n.startswith(('metrics/', '.')))


@functools.cache
def _warn(step: pathlib.Path) -> None:
  message = '%s: not verified, as it has no hashes of all of its files.'
  _log.warning(message, step)
