"""The folder of a run: made by one config, seen by all processes."""

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
    workdir: a folder, created if need be; one that all processes see.
    text: the config of the run, as `Config.to_json` writes it.

  Returns:
    The folder's absolute path.

  Raises:
    ValueError: if a config of another run has made it; shows every
      difference. Settings that only say how a run is carried out may change,
      see `config.changes`: the folder's config.json is then the latest.
    OSError: if it cannot be written, or the hosts do not share it.
  """
  workdir = pathlib.Path(workdir).expanduser().absolute()
  hosts.run_on_process_0(lambda: _claim(workdir, text))
  hosts.check_shared(workdir)
  return workdir


def _claim(workdir: pathlib.Path, text: str) -> None:
  path = workdir / 'config.json'
  try:
    if path.exists():
      old = path.read_text(encoding='utf-8')
      try:
        changes = changes_lib.changes(
          text_lib.parse_json(old), json.loads(text)
        )
      except (AttributeError, ValueError) as error:
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
      _log.info('Going on with %s.', ', '.join(changes.of_execution))
    workdir.mkdir(parents=True, exist_ok=True)
    write_lib.write_text(path, text)
  except OSError as error:
    raise OSError(
      f'--workdir={workdir}: cannot be written: {error}. Choose a folder of '
      'your own.'
    ) from error
