"""The content of a workdir, finished or not, that a report needs."""

import pathlib
from typing import Any
from typing import NamedTuple

from modelstock_jax.formats import runs as runs_lib
from modelstock_jax.formats import text as text_lib
from modelstock_jax.report import differences as differences_lib
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
    """When the run merges, see `config_keys.Merge`."""
    return self.config.merge.mode

  @property
  def epoch(self) -> int:
    """The last epoch whose end is logged."""
    return max((line.get('epoch', 0) for line in self.lines), default=0)

  @property
  def finished(self) -> bool:
    """True if the run has merged after its last epoch."""
    merged = [line['epoch'] for line in self.lines if line['kind'] == 'merge']
    return self.config.train.epochs in merged


class Summary(NamedTuple):
  """The content of a workdir.

  Attributes:
    workdir: the folder.
    config: of the run, or of all runs of a comparison.
    rows: of results.json, with the name of the anchor; none where it is not
      there.
    differences: of its methods, likewise.
    runs: one, or those of a comparison.
    grid: the models of a grid, as grid.json has them; none of other runs.
    sessions: what the run was made with, see `provenance.read`.
    missing: sentences on what is not there, and how it comes there.
  """

  workdir: pathlib.Path
  config: config_lib.Config
  rows: list[evaluation.Row]
  differences: list[differences_lib.Difference]
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
  configs = list(workdir.glob(f'seed_*/*/{runs_lib.CONFIG}'))
  folders = [path.parent for path in configs] or [workdir]
  of_grid = (workdir / GRID).is_file() or (workdir / 'stacks').is_dir()
  runs = [] if of_grid else [_run(folder) for folder in folders]
  path = workdir / RESULTS
  rows = results.load(path) if path.is_file() else []
  differences = differences_lib.load(path.with_suffix(differences_lib.SUFFIX))
  grid = _grid(workdir / GRID)
  missing = [
    f'The run with seed={run.config.seed} and merge.every='
    f'{run.config.merge.every} is not finished: {run.epoch} of '
    f'{run.config.train.epochs} epochs. Rerun the same command to resume.'
    for run in runs
    if not run.finished
  ]
  if of_grid and len(grid) < config.grid.num_models:
    missing.append(
      f'The grid has {len(grid)} of {config.grid.num_models} models. Rerun the '
      'same command to resume.'
    )
  command = f'modelstock evaluate --workdir={workdir}'
  if not of_grid and not rows:
    command = 'modelstock demo' if configs else command
    missing.append(f'There is no {RESULTS}: `{command}` writes it.')
  if rows and is_older(workdir):
    missing.append(
      f'{RESULTS} is older than the latest checkpoint: `{command}` renews it.'
    )
  return Summary(
    workdir=workdir,
    config=config,
    rows=results.name_anchor(rows, config.anchor.head),
    differences=results.name_anchor(differences, config.anchor.head),
    runs=sorted(runs, key=lambda run: (run.config.seed, run.mode)),
    grid=grid,
    sessions=provenance.read(workdir),
    missing=missing,
  )


def is_older(workdir: pathlib.Path) -> bool:
  """Return True if the latest checkpoint is newer than the results."""
  latest = runs_lib.find(workdir)
  changed = (workdir / RESULTS).stat().st_mtime
  return latest is not None and changed < latest.stat().st_mtime


def _run(workdir: pathlib.Path) -> Run:
  lines = metrics.read(workdir)
  for number, line in enumerate(lines, 1):
    needed = _KEYS.get(line['kind'], ())
    if absent := [key for key in needed if key not in line]:
      raise ValueError(
        f'{workdir / metrics.FILE}, line {number}: it has no '
        f'{", ".join(absent)}. Take the file from a backup, or move it away.'
      )
  return Run(config_lib.from_json(workdir / runs_lib.CONFIG), lines)


def _grid(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.is_file():
    return []
  with text_lib.explained(
    f'{path}: is not the list of the models of a grid: ',
    '. Run `python -m experiments.soups` again.',
    (KeyError, TypeError, ValueError),
  ):
    models = text_lib.read_json(path)['models']
    if not all(isinstance(model, dict) for model in models):
      raise ValueError('its models are not dicts')
    return models
