"""The content of a workdir, finished or not, that a report needs."""

import pathlib
from typing import Any
from typing import NamedTuple

from modelstock_jax.formats import runs
from modelstock_jax.formats import text as text_lib
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.report import provenance
from modelstock_jax.report import results
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import metrics

GRID = 'grid.json'
RESULTS = 'results.json'

_NEEDED = {
  'merge': ('epoch', 'restarts', 'cosine', 'ratio'),
  'validation': ('epoch', 'accuracy'),
  'train': ('loss',),
}


class Run(NamedTuple):
  """A training run.

  Attributes:
    seed: of the run.
    mode: when it merges: 'end', 'epoch', or a number of epochs.
    epochs: that it is to take.
    lines: of its metrics.jsonl.
    finished: whether it has come to its end.
  """

  seed: int
  mode: str
  epochs: int
  lines: list[dict[str, Any]]
  finished: bool


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

  def merges(self) -> dict[str, merges_lib.Merges]:
    """Return the merges by mode; of runs that merge once, if they have."""
    lines_by_mode: dict[str, list[merges_lib.Lines]] = {}
    for run in self.runs:
      # One model alone has no angle, and no merge worth the name.
      if any(
        line['kind'] == 'merge'
        and line['cosine']
        and (line['restarts'] or line['epoch'] >= run.epochs)
        for line in run.lines
      ):
        lines_by_mode.setdefault(run.mode, []).append(run.lines)
    return {
      mode: merges_lib.collect(lines, end=self.config.train.epochs)
      for mode, lines in lines_by_mode.items()
    }


def read(workdir: str | pathlib.Path) -> Summary:
  """Read the workdir of a run, a comparison or a grid.

  Args:
    workdir: of `modelstock train`, `demo` or `grid`.

  Returns:
    A `Summary`.

  Raises:
    FileNotFoundError: if it is none.
    ValueError: if a file is damaged; names it.
  """
  workdir = pathlib.Path(workdir).expanduser()
  config = config_lib.from_json(workdir / runs.CONFIG)
  folders = sorted(
    (path.parent for path in workdir.glob(f'seed_*/*/{runs.CONFIG}')),
    key=lambda path: (int(path.parent.name.removeprefix('seed_')), path.name),
  )
  of_grid = (workdir / GRID).is_file() or (workdir / 'stacks').is_dir()
  path = workdir / RESULTS
  summary = Summary(
    workdir=workdir,
    config=config,
    rows=results.load(path) if path.is_file() else [],
    runs=[] if of_grid else [_run(folder) for folder in folders or [workdir]],
    grid=_grid(workdir),
    sessions=provenance.read(workdir),
    missing=[],
  )
  missing = _missing(summary, compared=bool(folders), of_grid=of_grid)
  return summary._replace(missing=missing)


def is_older(workdir: pathlib.Path) -> bool:
  """Return True if the latest checkpoint is newer than the results."""
  latest = runs.find(workdir)
  changed = (workdir / RESULTS).stat().st_mtime
  return latest is not None and changed < latest.stat().st_mtime


def _run(workdir: pathlib.Path) -> Run:
  config = config_lib.from_json(workdir / runs.CONFIG)
  lines = metrics.read(workdir)
  for number, line in enumerate(lines, 1):
    known = isinstance(line, dict) and {'step', 'kind'} <= line.keys()
    needed = _NEEDED.get(line['kind'], ()) if known else ('step', 'kind')
    absent = [key for key in needed if not known or key not in line]
    if absent:
      raise ValueError(
        f'{workdir / metrics.FILE}, line {number}: it has no '
        f'{", ".join(absent)}. Take the file from a backup, or move it away.'
      )
  merged = [line['epoch'] for line in lines if line['kind'] == 'merge']
  epochs = config.train.epochs
  finished = bool(merged) and merged[-1] >= epochs
  return Run(config.seed, str(config.merge.every), epochs, lines, finished)


def _grid(workdir: pathlib.Path) -> list[dict[str, Any]]:
  path = workdir / GRID
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
  workdir = summary.workdir
  evaluate = f'`modelstock evaluate --workdir={workdir}` writes it'
  missing = [
    _unfinished(run, compared) for run in summary.runs if not run.finished
  ]
  if of_grid:
    number = summary.config.grid.num_models
    present = {model.get('index') for model in summary.grid}
    if absent := sorted(set(range(number)) - present):
      missing.append(
        f'The grid has {number - len(absent)} of {number} models; missing are '
        f'{absent}. The same `python -m experiments.soups` command goes on '
        'from there.'
      )
  elif not summary.rows:
    remedy = '`modelstock demo` writes it at its end' if compared else evaluate
    missing.append(f'No {RESULTS}, so no accuracy is known: {remedy}.')
  if summary.rows and not compared and is_older(workdir):
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
  which, command = 'The run', 'modelstock train'
  if compared:
    when = results.merged_when(run.mode)
    which = f'The run of seed {run.seed}, merged {when},'
    command = 'modelstock demo'
  state = 'has not logged a step'
  if run.lines:
    done = max(line.get('epoch', 0) for line in run.lines)
    step = run.lines[-1]['step']
    state = f'is not finished: {done} of {run.epochs} epochs, step {step}'
  return f'{which} {state}. The same `{command}` command goes on from there.'
