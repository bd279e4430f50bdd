"""All models that a workdir holds, and the anchor they left."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax

from experiments.geometry import gram as gram_lib
from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.formats import compare
from modelstock_jax.formats import runs
from modelstock_jax.report import summary as summary_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import task as task_lib

Params = Any


@dataclasses.dataclass(frozen=True)
class Family:
  """N models that were fine-tuned from one anchor.

  Attributes:
    anchor: w_0, a tree of numpy arrays.
    models: trees like it, by name: 'seed 0, model 1'.
    epoch_merges: merged models of runs that merged every epoch, by name; none
      but in a comparison.
    histories: lines of metrics.jsonl for each run that merged once; none in
      a grid.
    diverged: names of the models of a grid that are left out.
  """

  anchor: Params
  models: dict[str, Params]
  epoch_merges: dict[str, Params] = dataclasses.field(default_factory=dict)
  histories: Sequence[Sequence[dict[str, Any]]] = ()
  diverged: Sequence[str] = ()

  @property
  def names(self) -> list[str]:
    """The names of the models."""
    return list(self.models)

  @functools.cached_property
  def gram(self) -> gram_lib.Gram:
    """The inner products of the models' displacements."""
    return gram_lib.measure(self.anchor, list(self.models.values()))


def read(
  workdir: str | pathlib.Path,
  get_task: Callable[..., task_lib.Task] | None = None,
  allow_pickle: bool = False,
) -> tuple[Family, config_lib.Config]:
  """Read all models of a workdir.

  Of a run of `modelstock train` these are the models before their last merge,
  of a comparison those that were merged once, at the end, and of a grid those
  that did not diverge.

  Args:
    workdir: of a run, a comparison (`modelstock demo`) or a grid.
    get_task: of the run's config file; None is `clip_task.task`.
    allow_pickle: trust an anchor that is a `.npy` file.

  Returns:
    The family, on the host, and its config.

  Raises:
    FileNotFoundError: this is no workdir, or it has no checkpoint.
    ValueError: it is unfinished, with all that is missing; or its models are
      not like the anchor.
  """
  workdir = pathlib.Path(workdir).expanduser()
  if not (workdir / runs.CONFIG).is_file():
    raise FileNotFoundError(
      f'--workdir={workdir}: there is no {runs.CONFIG}; give the workdir of '
      '`modelstock train`, `demo` or `experiments.soups`.'
    )
  summary = summary_lib.read(workdir)
  config = config_lib.from_json(
    workdir / runs.CONFIG, allow_pickle=allow_pickle
  )
  config_lib.check_task(config.hooks, f'--workdir={workdir}', get_task)
  finished = all(run.finished for run in summary.runs)
  if not summary.runs:
    finished = len(summary.grid) == config.grid.num_models
  if not finished:
    raise ValueError(
      f'{workdir} is not finished.\n' + '\n'.join(summary.missing)
    )
  task = (get_task or clip_task.task)(config)
  start = setup_lib.start(task, sharding.place(), config.seed)
  anchor = jax.device_get(start[0])
  family = (_of_runs if summary.runs else _of_grid)(summary, anchor)
  wanted = gram_lib.by_path(anchor)
  problems = [
    f'{name}: {line}'
    for name, model in family.models.items()
    for line in compare.differences(
      wanted, gram_lib.by_path(model), dtypes=False
    )
  ]
  if problems:
    lines = '\n  '.join(problems)
    raise ValueError(
      f'Models and anchor differ:\n  {lines}\nThe anchor is made from the '
      'config: restore the weights and the data set it names.'
    )
  return family, config


def _of_grid(summary: summary_lib.Summary, anchor: Params) -> Family:
  """Read the models of a grid that did not diverge."""
  models, diverged = {}, []
  for row in summary.grid:
    name, path = f'model {row["index"]}', summary.workdir / row['file']
    if row['status'] == 'diverged':
      diverged.append(name)
    else:
      models[name] = jax.device_get(clip.load_safetensors(path, anchor))
  if not models:
    raise ValueError(f'{summary.workdir}: all its models have diverged.')
  return Family(anchor, models, diverged=diverged)


def _of_runs(summary: summary_lib.Summary, anchor: Params) -> Family:
  """Read the models of a run, or of the runs of a comparison."""
  compared = any(summary.workdir.glob('seed_*/'))
  models, merges, histories = {}, {}, []
  for run in summary.runs:
    folder, seed = summary.workdir, f'seed {run.config.seed}'
    if compared:
      folder = folder / f'seed_{run.config.seed}' / run.mode
    step: Any = runs.find(folder)
    if int(step.name) < run.lines[-1]['step']:
      raise ValueError(
        f'{folder}: the end of the run was not saved. Rerun the same command '
        'to resume.'
      )
    if compared and run.mode != 'end':
      if run.mode == 'epoch':
        merges[seed] = jax.device_get(runs.read(step, runs.MERGED))
      continue
    histories.append(run.lines)
    stack = jax.device_get(runs.read(step, runs.STATE))
    for index, model in enumerate(merging.unstack(stack)):
      name = f'model {index}'
      models[f'{seed}, {name}' if compared else name] = model
  return Family(anchor, models, merges, histories)
