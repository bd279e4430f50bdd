"""The folder of a run, which belongs to one config."""

import json
import logging
import pathlib

from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write as write_lib
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import hosts

_log = logging.getLogger(__name__)

CHECKPOINTS = 'checkpoints'  # in the workdir


def claim(workdir: str | pathlib.Path, text: str) -> pathlib.Path:
  """Make a workdir that of a config, or check that it is.

  Args:
    workdir: a folder that all processes see; created if it does not exist.
    text: the config of the run, as `Config.to_json` writes it.

  Returns:
    The folder's absolute path.

  Raises:
    ValueError: a run with another config has made it; lists every difference.
      Settings of execution may change, see `changes.changes`: the folder's
      config.json then holds the latest.
    OSError: it cannot be written, or the hosts do not share it.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  hosts.run_on_process_0(lambda: _claim(workdir, text))
  hosts.check_shared(workdir)
  return workdir


def _claim(workdir: pathlib.Path, text: str) -> None:
  path = workdir / 'config.json'
  try:
    if path.exists():
      try:
        old = text_lib.parse_json(path.read_text(encoding='utf-8'))
        changes = changes_lib.changes(old, json.loads(text))
      except (TypeError, ValueError) as error:
        raise ValueError(
          f'{path}: is not the config of a run ({error}). Choose another '
          'workdir.'
        ) from error
      text_lib.raise_problems(
        f'--workdir={workdir} belongs to a run with another config. Choose '
        'another workdir, or the config it was made with.',
        changes.of_run,
      )
      if not changes.of_execution:
        return
      _log.info('Resuming with %s.', ', '.join(changes.of_execution))
    workdir.mkdir(parents=True, exist_ok=True)
    write_lib.write_text(path, text)
  except OSError as error:
    raise OSError(
      f'--workdir={workdir}: cannot be written: {error}. Choose a folder that '
      'you may write to.'
    ) from error
