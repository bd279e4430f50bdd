"""The content of a workdir, finished or not, that a report needs."""

import pathlib
from typing import Any
from typing import NamedTuple

from modelstock_jax.formats import runs as runs_lib
from modelstock_jax.formats import text as text_lib
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import provenance
from modelstock_jax.report import results
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import metrics

GRID = 'grid.json'
RESULTS = 'results.json'

# Keys of the lines of metrics.jsonl, by their kind.
_KEYS = {
  'merge': ('epoch', 'restarts', 'cosine', 'ratio'),
  'validation': ('epoch', 'accuracy'),
  'train': ('loss',),
}


class Run(NamedTuple):
  """A training run.

  Attributes:
    config: of the run.
    lines: of its metrics.jsonl.
  """

  config: config_lib.Config
  lines: list[dict[str, Any]]

  @property
  def mode(self) -> str:
    """When the run merges: 'end', 'epoch', or a number of epochs."""
    return str(self.config.merge.every)

  @property
  def finished(self) -> bool:
    """True if the run has taken its last step."""
    merged = [line['epoch'] for line in self.lines if line['kind'] == 'merge']
    return bool(merged) and merged[-1] >= self.config.train.epochs


class Summary(NamedTuple):
  """The content of a workdir.

  Attributes:
    workdir: the folder.
    config: of the run, or of all runs of a comparison.
    rows: of results.json; none where it is not there.
    runs: one, or those of a comparison.
    grid: the models of a grid, as grid.json has them; none of other runs.
    sessions: what the run was made with, see `provenance.read`.
    missing: sentences on what is not there, and how it comes there.
  """

  workdir: pathlib.Path
  config: config_lib.Config
  rows: list[evaluation.Row]
  runs: list[Run]
  grid: list[dict[str, Any]]
  sessions: list[dict[str, str]]
  missing: list[str]

  @property
  def lines(self) -> list[dict[str, Any]]:
    """The metrics of the run; none of a comparison."""
    return self.runs[0].lines if len(self.runs) == 1 else []

  def merges(self) -> dict[str, merges_lib.Merges]:
    """Return the merges by mode; of runs that merge once, if they have."""
    by_mode: dict[str, list[Any]] = {}
    for run in self.runs:
      if merges := merges_lib.select(run.lines, run.config.train.epochs):
        by_mode.setdefault(run.mode, []).append(merges)
    return {mode: merges_lib.collect(of) for mode, of in by_mode.items()}


def read(workdir: str | pathlib.Path) -> Summary:
  """Read the workdir of a run, a comparison or a grid.

  Args:
    workdir: of `modelstock train`, `modelstock demo` or
      `python -m experiments.soups`.

  Returns:
    A `Summary`.

  Raises:
    FileNotFoundError: it is the workdir of none of them.
    ValueError: a file is damaged; the message names it.
  """
  workdir = pathlib.Path(workdir).expanduser()
  config = config_lib.from_json(workdir / runs_lib.CONFIG)
  folders = [
    path.parent for path in workdir.glob(f'seed_*/*/{runs_lib.CONFIG}')
  ]
  of_grid = (workdir / GRID).is_file() or (workdir / 'stacks').is_dir()
  path = workdir / RESULTS
  runs = [] if of_grid else [_run(folder) for folder in folders or [workdir]]
  summary = Summary(
    workdir=workdir,
    config=config,
    rows=results.load(path) if path.is_file() else [],
    runs=sorted(runs, key=lambda run: (run.config.seed, run.mode)),
    grid=_grid(workdir / GRID),
    sessions=provenance.read(workdir),
    missing=[],
  )
  missing = _missing(summary, compared=bool(folders), of_grid=of_grid)
  return summary._replace(missing=missing)


def is_older(workdir: pathlib.Path) -> bool:
  """Return True if the latest checkpoint is newer than the results."""
  latest = runs_lib.find(workdir)
  changed = (workdir / RESULTS).stat().st_mtime
  return latest is not None and changed < latest.stat().st_mtime


def _run(workdir: pathlib.Path) -> Run:
  lines = metrics.read(workdir)
  for number, line in enumerate(lines, 1):
    line = line if isinstance(line, dict) else {}
    needed = ('step', 'kind', *_KEYS.get(str(line.get('kind')), ()))
    if absent := [key for key in needed if key not in line]:
      raise ValueError(
        f'{workdir / metrics.FILE}, line {number}: it has no '
        f'{", ".join(absent)}. Take the file from a backup, or move it away.'
      )
  return Run(config_lib.from_json(workdir / runs_lib.CONFIG), lines)


def _grid(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.is_file():
    return []
  try:
    models = text_lib.read_json(path)['models']
    if not all(isinstance(model, dict) for model in models):
      raise ValueError('its models are not dicts')
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f'{path}: is not the list of the models of a grid: {error}. Run '
      '`python -m experiments.soups` again.'
    ) from error
  return models


def _missing(summary: Summary, *, compared: bool, of_grid: bool) -> list[str]:
  workdir, rows = summary.workdir, summary.rows
  command = 'modelstock demo' if compared else 'modelstock train'
  evaluate = f'`modelstock evaluate --workdir={workdir}` writes it'
  missing = [
    f'{_unfinished(run, compared)}. Rerun the same `{command}` command to '
    'resume.'
    for run in summary.runs
    if not run.finished
  ]
  if of_grid and len(summary.grid) < summary.config.grid.num_models:
    missing.append(
      f'The grid has {len(summary.grid)} of {summary.config.grid.num_models} '
      'models. Rerun the same `python -m experiments.soups` command to resume.'
    )
  if not of_grid and not rows:
    remedy = '`modelstock demo` writes it at its end' if compared else evaluate
    missing.append(f'No {RESULTS}, so no accuracy is known: {remedy}.')
  if rows and not compared and is_older(workdir):
    missing.append(
      f'{RESULTS} is older than the latest checkpoint: {evaluate} again.'
    )
  if not summary.sessions:
    missing.append(
      f'No {provenance.FILE}: hardware, versions and time of the run were not '
      'recorded.'
    )
  return missing


def _unfinished(run: Run, compared: bool) -> str:
  name = 'The run'
  if compared:
    when = results.merged_when(run.mode)
    name = f'The run of seed {run.config.seed}, merged {when},'
  if not run.lines:
    return f'{name} has not logged a step'
  done = max(line.get('epoch', 0) for line in run.lines)
  return (
    f'{name} is not finished: {done} of {run.config.train.epochs} epochs, step '
    f'{run.lines[-1]["step"]}'
  )
