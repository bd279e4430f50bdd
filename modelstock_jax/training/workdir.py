"""The folder of a run, which belongs to one config."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import logging
import pathlib
from typing import Any

from modelstock_jax.formats import lock
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write as write_lib
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import hosts

_log = logging.getLogger(__name__)

CHECKPOINTS = 'checkpoints'  # in the workdir


@contextlib.contextmanager
def claim(
  workdir: str | pathlib.Path,
  text: str,
  inputs: Mapping[str, Any] | None = None,
) -> Iterator[pathlib.Path]:
  """Hold a workdir against other processes, and make it that of a config.

  On several processes of a run, process 0 holds it for all.

  Args:
    workdir: a folder that all processes see; created if it does not exist.
    text: the config of the run, as `Config.to_json` writes it.
    inputs: what else decides the numbers of the run, see `setup.inputs`.

  Yields:
    The folder's absolute path.

  Raises:
    BlockingIOError: another process trains in it, see `lock.hold`.
    ValueError: a run with another config has made it; lists every difference.
      Settings of execution may change, see `changes.changes`: the folder's
      config.json then holds the latest. Or the inputs have changed.
    OSError: it cannot be written, or the hosts do not share it.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  with contextlib.ExitStack() as stack:
    hosts.run_on_process_0(lambda: _claim(workdir, text, inputs, stack))
    hosts.check_shared(workdir)
    yield workdir


def _claim(
  workdir: pathlib.Path,
  text: str,
  inputs: Mapping[str, Any] | None,
  stack: contextlib.ExitStack,
) -> None:
  path, other = workdir / 'config.json', workdir / 'inputs.json'
  changes = changes_lib.Changes([], [])
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock.hold(workdir / '.lock', workdir))
    if path.exists():
      changes = _compare(path, json.loads(text), changes_lib.changes)
      text_lib.raise_problems(
        f'--workdir={workdir} belongs to a run with another config. Choose '
        'another workdir, or the config it was made with.',
        changes.of_run,
      )
    if inputs and other.exists():
      text_lib.raise_problems(
        f'--workdir={workdir}: the inputs of its run have changed. Restore '
        'them, or choose another workdir. To read an older version of a data '
        'set, set data.data_dir to a folder without the newer one.',
        _compare(other, inputs, changes_lib.differences),
      )
    if changes.of_execution or not path.exists():
      write_lib.write_text(path, text)
    if inputs and not other.exists():
      write_lib.write_text(other, json.dumps(inputs, indent=2) + '\n')
  except BlockingIOError:
    raise
  except OSError as error:
    raise OSError(
      f'--workdir={workdir}: cannot be written: {error}. Choose a folder that '
      'you may write to.'
    ) from error
  if changes.of_execution:
    _log.info('Resuming with %s.', ', '.join(changes.of_execution))


def _compare(path: pathlib.Path, new: Any, compare: Callable[..., Any]) -> Any:
  """Compare what a file of a run holds with what there is now."""
  with text_lib.explained(
    f'{path}: is not the {path.stem} of a run (',
    '). Choose another workdir.',
    (AttributeError, TypeError, ValueError),
  ):
    old = text_lib.parse_json(path.read_text(encoding='utf-8'))
    return compare(old, new)
