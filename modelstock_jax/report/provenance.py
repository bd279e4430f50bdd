"""The sessions of a run, in its workdir: command, machine, versions, time.

They are known only while it runs: the workdir may be read on another machine.
"""

from collections.abc import Iterator
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
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write
from modelstock_jax.training import loop

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
  hardware = (
    f'{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} '
    'CPU cores'
  )
  if jax.process_count() > 1:
    hardware += f', {jax.process_count()} processes'
  versions = [
    f'modelstock_jax {modelstock_jax.__version__}',
    f'Python {platform.python_version()}',
    *(f'{name} {metadata.version(name)}' for name in _PACKAGES),
  ]
  program = pathlib.Path(sys.argv[0]).name
  return {
    'Command': shlex.join([program, *sys.argv[1:]]),
    'Started': f'{now:%Y-%m-%d %H:%M} UTC',
    'Hardware': hardware,
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


@contextlib.contextmanager
def session(workdir: str | os.PathLike[str]) -> Iterator[dict[str, str]]:
  """Append a session to run.json when it ends or is interrupted.

  Process 0 writes it.

  Args:
    workdir: of the run; made by then.

  Yields:
    The texts by name, to which the body may add.

  Raises:
    ValueError: see `read`.
    OSError: it cannot be written.
  """
  start, texts = time.perf_counter(), here()
  stopped = None
  try:
    yield texts
  except loop.Interrupted as error:
    stopped = error
  texts['Time'] = f'{time.perf_counter() - start:.1f} s'
  texts['Peak memory'] = peak_memory()
  if jax.process_index() == 0:
    path = pathlib.Path(workdir).expanduser()
    sessions = json.dumps([*read(path), texts], indent=2)
    write.write_text(path / FILE, sessions + '\n')
  if stopped:
    raise stopped


def read(workdir: str | os.PathLike[str]) -> list[dict[str, str]]:
  """Read the sessions of a run, but for those that were killed.

  Args:
    workdir: of the run.

  Returns:
    The sessions in order; none where there is no run.json.

  Raises:
    ValueError: run.json is damaged.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as workdir:
  ...   with session(workdir) as texts:
  ...     texts['Learning rate'] = '3e-5'
  ...   [recorded] = read(workdir)
  >>> recorded['Learning rate']
  '3e-5'
  """
  path = pathlib.Path(workdir) / FILE
  if not path.is_file():
    return []
  try:
    return _SESSIONS.validate_python(text_lib.read_json(path))
  except ValueError as error:
    raise ValueError(
      f'{path}: cannot be read: it is not a list of dicts of texts. It only '
      'says what the run was made with: move it away.'
    ) from error
