"""The folder of a run, which belongs to one config."""

from collections.abc import Iterator
import contextlib
import json
import logging
import pathlib

from modelstock_jax.formats import lock
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write as write_lib
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import hosts

_log = logging.getLogger(__name__)

CHECKPOINTS = 'checkpoints'  # in the workdir
# Output of the process, which may be there before the run is.
_LOGS = ('.err', '.log', '.out')


@contextlib.contextmanager
def claim(workdir: str | pathlib.Path, text: str) -> Iterator[pathlib.Path]:
  """Hold a workdir against other processes, and make it that of a config.

  On several processes of a run, process 0 holds it for all.

  Args:
    workdir: a folder that all processes see; created if it does not exist.
    text: the config of the run, as `Config.to_json` writes it.

  Yields:
    The folder's absolute path.

  Raises:
    BlockingIOError: another process trains in it, see `lock.hold`.
    ValueError: it has other files, and no config.json of a run; or a run with
      another config has made it; lists every difference.
      Settings of execution may change, see `changes.of_run`: the folder's
      config.json then holds the latest.
    OSError: it cannot be written, or the hosts do not share it.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  with contextlib.ExitStack() as stack:
    hosts.run_on_process_0(lambda: _claim(workdir, text, stack))
    hosts.check_shared(workdir)
    yield workdir


def _claim(
  workdir: pathlib.Path, text: str, stack: contextlib.ExitStack
) -> None:
  path = workdir / 'config.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock.hold(workdir / '.lock', workdir))
    if path.exists():
      with text_lib.explained(
        f'{path}: is not the config of a run (',
        '). Choose another workdir.',
        (AttributeError, TypeError, ValueError),
      ):
        old = text_lib.read_json(path)
        changes = changes_lib.differences(old, json.loads(text))
      text_lib.raise_problems(
        f'--workdir={workdir} belongs to a run with another config. Choose '
        'another workdir, or the config it was made with.',
        changes_lib.of_run(changes),
      )
      if not changes:
        return
      _log.info('Resuming with %s.', ', '.join(changes))
    elif others := sorted(
      each.name
      for each in workdir.iterdir()
      if each.suffix not in _LOGS and not each.name.startswith('.')
    ):
      raise ValueError(
        f'--workdir={workdir}: has no config.json of a run, but '
        f'{text_lib.listed(others)}. Choose a new folder.'
      )
    write_lib.write_text(path, text)
  except BlockingIOError:
    raise
  except OSError as error:
    raise OSError(
      f'--workdir={workdir}: cannot be written: {error}. Choose a folder that '
      'you may write to.'
    ) from error
