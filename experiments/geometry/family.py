"""All models that a workdir holds, and the anchor they left."""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from experiments.soups import members as grid
from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.formats import compare
from modelstock_jax.formats import runs
from modelstock_jax.report import merges as merges_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import metrics
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import task as task_lib

Params = Any


class Family(NamedTuple):
  """N models that were fine-tuned from one anchor.

  Attributes:
    anchor: w_0, a tree of numpy arrays.
    models: N trees like it.
    names: of the models, N of them: 'seed 0, model 1'.
    epoch_merges: merged models of runs that merged every epoch, by name; none
      but in a comparison.
    histories: lines of metrics.jsonl for each run that merged once; none in
      a grid.
    diverged: names of the models of a grid that are left out.
  """

  anchor: Params
  models: list[Params]
  names: list[str]
  epoch_merges: dict[str, Params]
  histories: list[list[dict[str, Any]]]
  diverged: list[str]


class Gram(NamedTuple):
  """Inner products of the displacements d_i = w_i - w_0, layer by layer.

  Attributes:
    layers: L of them, as CLIP's, one for each group that shares a cosine.
    places: along the depth, see `merges.Merges`.
    products: float64[L, N, N].
  """

  layers: list[merges_lib.Layer]
  places: list[str]
  products: np.ndarray

  def of_kind(self, kind: str) -> np.ndarray:
    """Return a mask of the layers of a kind: bool[L]."""
    return np.array([layer.kind == kind for layer in self.layers])

  @property
  def kinds(self) -> list[str]:
    """The kinds of its layers, in the order of `clip.layers.KINDS`."""
    kinds = {layer.kind for layer in self.layers}
    return [kind for kind in clip.layers.KINDS if kind in kinds]


def read(
  workdir: str | pathlib.Path,
  get_task: Callable[..., task_lib.Task] | None = None,
) -> tuple[Family, config_lib.ConfigDict]:
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
    ValueError: it is unfinished, with all that is missing; or a file of it is
      damaged.
  """
  workdir = pathlib.Path(workdir).expanduser()
  if not (workdir / runs.CONFIG).is_file():
    raise FileNotFoundError(
      f'--workdir={workdir}: there is no {runs.CONFIG}; give the workdir of '
      '`modelstock train`, `demo` or `experiments.soups`.'
    )
  config = config_lib.from_json(workdir / runs.CONFIG)
  config_lib.check_task(config.hooks, f'--workdir={workdir}', get_task)
  if (workdir / grid.FILE).exists() or (workdir / 'stacks').is_dir():
    members = _grid_members(workdir, config)
    anchor = _anchor(config, get_task)
    family = _of_grid(workdir, members, anchor)
  else:
    seeds = workdir.glob('seed_*/')
    folders = [
      path / 'end'
      for path in sorted(seeds, key=lambda path: int(path.name[5:]))
    ] or [workdir]
    _check_finished(folders, workdir)
    # Now, as it takes long; what is missing has been said.
    anchor = _anchor(config, get_task)
    family = _of_runs(folders, anchor, compared=folders != [workdir])
  _check_alike(family)
  return family, config


def _anchor(
  config: config_lib.ConfigDict,
  get_task: Callable[..., task_lib.Task] | None,
) -> Params:
  """Make the params that the models started from."""
  placement = sharding.place(
    stock=1, num_models=1, batch_size=len(jax.devices())
  )
  task = (get_task or clip_task.task)(config)
  return setup_lib.start(task, placement, config.seed)[0]


def _of_grid(
  workdir: pathlib.Path, members: Sequence[grid.Trained], anchor: Params
) -> Family:
  """Read the models of a grid that did not diverge."""
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), anchor
  )
  models, diverged = {}, []
  for each in members:
    name = f'model {each.member.index}'
    if each.status == 'finished':
      models[name] = jax.device_get(grid.load(workdir, each, shapes))
    else:
      diverged.append(name)
  if diverged and not models:
    raise ValueError(f'{workdir}: all {len(members)} models have diverged.')
  return Family(
    jax.device_get(anchor),
    list(models.values()),
    list(models),
    epoch_merges={},
    histories=[],
    diverged=diverged,
  )


def _of_runs(
  folders: Sequence[pathlib.Path], anchor: Params, *, compared: bool
) -> Family:
  """Read the models of a run, or of the runs of a comparison."""
  models, merges = {}, {}
  for folder in folders:
    seed = folder.parent.name.replace('_', ' ')
    stack = jax.device_get(runs.read(_checkpoint(folder), runs.STATE))
    for index, model in enumerate(merging.unstack(stack)):
      models[f'{seed}, model {index}' if compared else f'model {index}'] = model
    epochs = folder.parent / 'epoch'
    if compared and not unfinished(epochs):
      merges[seed] = jax.device_get(runs.read(_checkpoint(epochs)))
  return Family(
    jax.device_get(anchor),
    list(models.values()),
    list(models),
    epoch_merges=merges,
    histories=[metrics.read(folder) for folder in folders],
    diverged=[],
  )


def measure(anchor: Params, models: Sequence[Params]) -> Gram:
  """Return inner products of displacements, all of them in float64.

  Where models agree to six digits, as the biases of a head do, differences of
  these products would be lost in float32.

  Args:
    anchor: w_0, a tree with the paths of CLIP.
    models: N trees like it.

  Returns:
    A `Gram`.

  >>> anchor = {'head': {'bias': np.zeros(2)}}
  >>> models = [{'head': {'bias': np.array(b)}} for b in ([3, 4], [0, 1])]
  >>> measure(anchor, models).products.tolist()
  [[[25.0, 4.0], [4.0, 1.0]]]
  """
  leaves, others = _by_path(anchor), [_by_path(model) for model in models]
  groups, layers, places = merges_lib.group_layers(list(leaves))
  products = np.zeros((len(groups), len(models), len(models)))
  for total, paths in zip(products, groups.values(), strict=True):
    for path in paths:
      center = np.asarray(leaves[path], np.float64).ravel()
      steps = np.stack(
        [np.asarray(each[path], np.float64).ravel() for each in others]
      )
      steps -= center[None]
      total += steps @ steps.T
  return Gram(layers, places, products)


def mean(models: Sequence[Params]) -> Params:
  """Return the plain average of models, on the host.

  >>> mean([{'w': np.zeros(1)}, {'w': np.ones(1)}])['w'].tolist()
  [0.5]
  """
  return jax.tree.map(
    lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64).astype(
      leaves[0].dtype
    ),
    *models,
  )


def _by_path(tree: Params) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {merging.path_name(path): leaf for path, leaf in leaves}


def _checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """Return the latest checkpoint of a run."""
  step = runs.find(folder)
  if step is None:
    raise FileNotFoundError(f'{folder}: there is no checkpoint.')
  return step


def _grid_members(
  workdir: pathlib.Path, config: config_lib.ConfigDict
) -> list[grid.Trained]:
  """Return all members; raise if some have not been trained yet."""
  done = []
  if (workdir / grid.FILE).exists():
    done = grid.read(workdir)
  trained = {each.member.index for each in done}
  missing = sorted(set(range(config.grid.num_models)) - trained)
  if missing:
    raise ValueError(
      f'{workdir}: the grid has {len(trained)} of {config.grid.num_models} '
      f'models; missing are {missing}. Run `python -m experiments.soups` '
      'with this --workdir again: it goes on.'
    )
  return done


def _check_finished(
  folders: Sequence[pathlib.Path], workdir: pathlib.Path
) -> None:
  """Raise one error that names every unfinished run."""
  problems = [
    f'{folder}: {problem}'
    for folder in folders
    if (problem := unfinished(folder))
  ]
  if problems:
    raise ValueError(
      f'{workdir} is not finished:\n  '
      + '\n  '.join(problems)
      + '\nRun the command that made it again: it goes on from there.'
    )


def unfinished(folder: pathlib.Path) -> str:
  """Describe the missing part of a run.

  Args:
    folder: its workdir.

  Returns:
    Words, or '' if the run is finished.
  """
  if not (folder / runs.CONFIG).is_file():
    return 'has not begun'
  epochs = config_lib.from_json(folder / runs.CONFIG).train.epochs
  lines = metrics.read(folder)
  merges = [line for line in lines if line['kind'] == 'merge']
  last = merges[-1] if merges else None
  try:
    step = runs.find(folder)
  except FileNotFoundError:
    step = None
  if step is None:
    return f'has no checkpoint yet, of {epochs} epochs'
  saved = int(step.name)
  if last is None:
    return f'{saved} steps are done, not one of {epochs} epochs'
  per_epoch = last['step'] // last['epoch']
  if saved < per_epoch * epochs:
    return f'{saved} of {per_epoch * epochs} steps are done'
  return ''


def _check_alike(family: Family) -> None:
  """Raise an error that names every leaf which is not as the anchor's."""
  expected = _by_path(family.anchor)
  problems = [
    f'{name}: {line}'
    for name, model in zip(family.names, family.models, strict=True)
    for line in compare.differences(expected, _by_path(model), dtypes=False)
  ]
  if problems:
    raise ValueError(
      'Models and anchor differ:\n  '
      + '\n  '.join(problems)
      + '\nThe anchor is made from the config: restore the weights and the '
      'data set it names.'
    )
