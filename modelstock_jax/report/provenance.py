"""The sessions of a run, in its workdir: command, machine, versions, time.

Known only while it runs: whoever reads the workdir later may do so elsewhere.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
import resource
import shlex
import sys
import time

import jax
import pydantic

import modelstock_jax
from modelstock_jax.formats import write

FILE = 'run.json'

_SESSIONS = pydantic.TypeAdapter(list[dict[str, str]])
_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def here() -> dict[str, str]:
  """Describe this process.

  Returns:
    Texts by name: 'Command', 'Started' (UTC), 'Hardware', 'Versions'.

  >>> sorted(here())
  ['Command', 'Hardware', 'Started', 'Versions']
  """
  now = datetime.datetime.now(datetime.UTC)
  device = jax.devices()[0]
  hardware = [
    f'{jax.device_count()} x {device.device_kind}',
    f'{os.cpu_count()} CPU cores',
  ]
  if jax.process_count() > 1:
    hardware.append(f'{jax.process_count()} processes')
  versions = [
    f'modelstock_jax {modelstock_jax.__version__}',
    f'Python {platform.python_version()}',
    *(f'{name} {metadata.version(name)}' for name in _PACKAGES),
  ]
  program = pathlib.Path(sys.argv[0]).name
  return {
    'Command': shlex.join([program, *sys.argv[1:]]),
    'Started': f'{now:%Y-%m-%d %H:%M} UTC',
    'Hardware': ', '.join(hardware),
    'Versions': ', '.join(versions),
  }


def peak_memory() -> str:
  """Return the most memory that this process has held on its host.

  >>> peak_memory().endswith(' GiB')
  True
  """
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  if sys.platform != 'darwin':  # there it is in bytes, elsewhere in KiB
    peak *= 1024
  return f'{peak / 2**30:.2f} GiB'


def add(workdir: str | os.PathLike[str], session: Mapping[str, str]) -> None:
  """Append a session to the run.json of a workdir; on process 0 only.

  Args:
    workdir: of the run.
    session: texts by name: `here()`, and what else there is to say, as time.

  Raises:
    ValueError: see `read`.
    OSError: it cannot be written.
  """
  if jax.process_index():
    return
  path = pathlib.Path(workdir) / FILE
  sessions = [*read(workdir), dict(session)]
  write.write_text(path, json.dumps(sessions, indent=2) + '\n')


@contextlib.contextmanager
def session(
  workdir: str | os.PathLike[str],
  *,
  together: tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
  """Add a session when it ends, or is interrupted: see `add`.

  Args:
    workdir: of the run; made by then.
    together: exceptions with which a session ends as it should.
  """
  start, about, stopped = time.perf_counter(), here(), None
  try:
    yield
  except together as error:
    stopped = error
  took = f'{time.perf_counter() - start:.1f} s'
  figures = {'Time': took, 'Peak memory': peak_memory()}
  add(pathlib.Path(workdir).expanduser(), {**about, **figures})
  if stopped:
    raise stopped


def read(workdir: str | os.PathLike[str]) -> list[dict[str, str]]:
  """Read the sessions of a run; one that was killed is not there.

  Args:
    workdir: of the run.

  Returns:
    What `add` was given, in order; nothing where there is no run.json.

  Raises:
    ValueError: if run.json is damaged.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as workdir:
  ...   add(workdir, {'Time': '3.2 s'})
  ...   read(workdir)
  [{'Time': '3.2 s'}]
  """
  path = pathlib.Path(workdir) / FILE
  if not path.is_file():
    return []
  try:
    return _SESSIONS.validate_json(path.read_text(encoding='utf-8'))
  except pydantic.ValidationError as error:
    raise ValueError(
      f'{path}: cannot be read: it is not a list of dicts of texts. It only '
      'says what the run was made with: move it away.'
    ) from error
