"""All models that a workdir holds, and the anchor they left."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax

from experiments.geometry import gram as gram_lib
from experiments.soups import members
from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.formats import compare
from modelstock_jax.formats import runs
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import metrics
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
) -> tuple[Family, config_lib.Config]:
  """Read all models of a workdir.

  Of a run of `modelstock train` these are the models before their last merge,
  of a comparison those that were merged once, at the end, and of a grid those
  that did not diverge.

  Args:
    workdir: of a run, a comparison (`modelstock demo`) or a grid.
    get_task: of the run's config file; None is `clip_task.task`.

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
  config = config_lib.from_json(workdir / runs.CONFIG)
  config_lib.check_task(config.hooks, f'--workdir={workdir}', get_task)

  def make_anchor() -> Params:
    task = (get_task or clip_task.task)(config)
    start = setup_lib.start(task, sharding.place(), config.seed)
    return jax.device_get(start[0])

  if (workdir / members.FILE).exists() or (workdir / 'stacks').is_dir():
    family = _of_grid(workdir, config.grid.num_models, make_anchor)
  else:
    family = _of_runs(workdir, make_anchor)
  wanted = gram_lib.by_path(family.anchor)
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


def _of_grid(
  workdir: pathlib.Path, number: int, make_anchor: Callable[[], Params]
) -> Family:
  """Read the models of a grid that did not diverge."""
  by_name = {f'model {t.member.index}': t for t in members.read(workdir)}
  every = [f'model {index}' for index in range(number)]
  if missing := [name for name in every if name not in by_name]:
    raise ValueError(
      f'{workdir}: {len(missing)} of {number} models of the grid are missing: '
      f'{", ".join(missing)}. Rerun `python -m experiments.soups` to resume.'
    )
  diverged = [name for name in every if by_name[name].status == 'diverged']
  if diverged == every:
    raise ValueError(f'{workdir}: all {number} models have diverged.')
  anchor = make_anchor()
  models = {
    name: jax.device_get(
      clip.load_safetensors(workdir / by_name[name].file, anchor)
    )
    for name in every
    if name not in diverged
  }
  return Family(anchor, models, diverged=diverged)


def _of_runs(
  workdir: pathlib.Path, make_anchor: Callable[[], Params]
) -> Family:
  """Read the models of a run, or of the runs of a comparison."""
  seeds = sorted(workdir.glob('seed_*/'), key=lambda path: int(path.name[5:]))
  folders = [seed / 'end' for seed in seeds] or [workdir]
  steps: dict[pathlib.Path, Any] = {f: _last_step(f) for f in folders}
  if unfinished := [str(folder) for folder in folders if not steps[folder]]:
    raise ValueError(
      f'{workdir} is not finished: {", ".join(unfinished)}. Rerun the same '
      'command to resume.'
    )
  models, merges = {}, {}
  for folder, step in steps.items():
    prefix = f'{folder.parent.name.replace("_", " ")}, ' if seeds else ''
    stack = jax.device_get(runs.read(step, runs.STATE))
    for index, model in enumerate(merging.unstack(stack)):
      models[f'{prefix}model {index}'] = model
  for seed in seeds:
    if step := _last_step(seed / 'epoch'):
      merges[seed.name.replace('_', ' ')] = jax.device_get(runs.read(step))
  histories = [metrics.read(folder) for folder in folders]
  return Family(make_anchor(), models, merges, histories)


def _last_step(folder: pathlib.Path) -> pathlib.Path | None:
  """Return the last checkpoint of a run, None if the run is not finished."""
  try:
    step = runs.find(folder)
  except FileNotFoundError:
    step = None
  if step is None:
    return None
  epochs = config_lib.from_json(folder / runs.CONFIG).train.epochs
  ends = [
    line['step']
    for line in metrics.read(folder)
    if line['kind'] == 'merge' and line['epoch'] == epochs
  ]
  return step if ends and int(step.name) >= ends[-1] else None
