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

from modelstock_jax.formats import write as write_lib

_log = logging.getLogger(__name__)

_MANIFESTS = 'sha256.process_*.txt'
# Orbax reads the metrics of all checkpoints; a run resumes without them.
_NOT_HASHED = 'metrics'


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
  path = step / _MANIFESTS.replace('*', str(process))
  write_lib.write_text(path, ''.join(lines))


def verify(
  step: pathlib.Path, *prefixes: str, share: tuple[int, int] = (0, 1)
) -> None:
  """Compare files with their hashes.

  A file without a hash passes, with one warning for each checkpoint: an older
  version wrote it, or the run was killed before it wrote the hashes.

  Args:
    step: the folder of a checkpoint.
    *prefixes: of the names of the files, such as 'merged/'; none takes all.
    share: i and n, to read every n-th file from the i-th on.

  Raises:
    DamagedFileError: a file is missing, or its hash differs.
    OSError: a file cannot be read.
  """
  hashes = _read(step)
  if any(name not in hashes for name in _names(step)):
    _warn(step)
  wanted = sorted(name for name in hashes if name.startswith(prefixes or ''))
  names = wanted[share[0] :: share[1]]
  with futures.ThreadPoolExecutor() as pool:
    digests = pool.map(digest, [step / name for name in names])
    for name, value in zip(names, digests, strict=True):
      if value != hashes[name]:
        raise DamagedFileError(
          f'{step / name} is damaged: its SHA-256 is not the one that it was '
          'saved with'
        )


def _read(step: pathlib.Path) -> dict[str, str]:
  """Read the hashes of all processes, by the names of the files."""
  hashes = {}
  for path in step.glob(_MANIFESTS):
    for line in path.read_bytes().decode(errors='replace').splitlines():
      value, _, name = line.partition('  ')
      if not re.fullmatch('[0-9a-f]{64}', value) or not name.isprintable():
        raise DamagedFileError(f'{path} is damaged: a line is no SHA-256')
      hashes[name] = value
  return hashes


def _names(step: pathlib.Path) -> list[str]:
  """Return the names of all files that hashes are for: 'state/_METADATA'."""
  names = (path.relative_to(step) for path in step.glob('*/**/*'))
  return sorted(
    name.as_posix()
    for name in names
    if name.parts[0] != _NOT_HASHED and (step / name).is_file()
  )


def digest(path: pathlib.Path) -> str:
  """Return the SHA-256 of a file.

  Raises:
    DamagedFileError: there is no such file.
  """
  if not path.is_file():
    raise DamagedFileError(f'{path} is missing')
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@functools.cache
def _warn(step: pathlib.Path) -> None:
  _log.warning(
    '%s: not all of its files are verified, as they have no hash: an older '
    'version wrote them, or the run was killed right after saving.',
    step,
  )
