"""A family: all models that a workdir holds, and the anchor they left."""

from collections.abc import Sequence
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.analysis import merges as merges_lib
from modelstock_jax.formats import runs
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import grid
from modelstock_jax.training import metrics
from modelstock_jax.training import sharding

Params = Any


class Family(NamedTuple):
  """N models that were fine-tuned from one anchor.

  Attributes:
    kind: of workdir: 'run', 'comparison' or 'grid'.
    anchor: w_0, a tree of numpy arrays.
    models: N trees like it.
    names: of the models, N of them: 'seed 0, model 1'.
    epoch_merges: merged models of runs that merged every epoch, by name; none
      but in a comparison.
    histories: lines of metrics.jsonl for each run that merged once; none in
      a grid.
    diverged: names of the models of a grid that are left out.
  """

  kind: str
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
    """Tells which layers are of a kind: bool[L]."""
    return np.array([layer.kind == kind for layer in self.layers])

  @property
  def kinds(self) -> list[str]:
    """The kinds there are, in the order of `clip.layers.KINDS`."""
    found = {layer.kind for layer in self.layers}
    return [kind for kind in clip.layers.KINDS if kind in found]


def read(
  workdir: str | pathlib.Path,
  placement: sharding.Placement | None = None,
) -> tuple[Family, config_lib.ConfigDict]:
  """Reads all models of a workdir.

  Of a run of `modelstock train` these are the models before their last merge,
  of a comparison those that were merged once, at the end, and of a grid those
  that did not diverge.

  Args:
    workdir: of a run, a comparison (`modelstock demo`) or a grid.
    placement: where the anchor is made; None for all devices.

  Returns:
    The family, on the host, and its config.

  Raises:
    FileNotFoundError: this is no workdir, or nothing has been saved there.
    ValueError: it is unfinished: says all that is missing; or a file of it is
      damaged.
  """
  workdir = pathlib.Path(workdir).expanduser()
  if not (workdir / runs.CONFIG).is_file():
    raise FileNotFoundError(
      f'--workdir={workdir}: there is no {runs.CONFIG}; give the workdir of '
      '`modelstock train`, `demo` or `grid`.'
    )
  config = config_lib.from_json(workdir / runs.CONFIG)
  found: list[grid.Trained] = []
  seeds = sorted(workdir.glob('seed_*/'), key=lambda path: int(path.name[5:]))
  if (workdir / grid.FILE).exists() or (workdir / 'stacks').is_dir():
    kind, folders = 'grid', []
    found = _grid_members(workdir, config)
  elif seeds:
    kind, folders = 'comparison', [path / 'end' for path in seeds]
  else:
    kind, folders = 'run', [workdir]
  _check_finished(folders, workdir)
  # Now, as it takes long; what is missing has been said.
  anchor = anchor_lib.load(config, placement)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), anchor
  )
  models, names, merges, diverged = [], [], {}, []
  for each in found:
    name = f'model {each.member.index}'
    if each.status != 'finished':
      diverged.append(name)
      continue
    models.append(jax.device_get(grid.load(workdir, each, shapes)))
    names.append(name)
  if diverged and not models:
    raise ValueError(f'{workdir}: all {len(found)} models have diverged.')
  for folder in folders:
    step = runs.find(folder)
    assert step is not None  # it has been looked for
    stack = jax.device_get(runs.read_stack(step))
    run = f'{folder.parent.name.replace("_", " ")}, ' * (kind != 'run')
    for index, model in enumerate(_unstack(stack)):
      models.append(model)
      names.append(f'{run}model {index}')
    epochs = folder.parent / 'epoch'
    if kind == 'comparison' and not unfinished(epochs):
      merged = runs.read_merged(_found(epochs))
      merges[folder.parent.name.replace('_', ' ')] = jax.device_get(merged)
  _check_alike(shapes, models, names)
  histories = [metrics.read(folder) for folder in folders]
  family = Family(
    kind, jax.device_get(anchor), models, names, merges, histories, diverged
  )
  return family, config


def measure(anchor: Params, models: Sequence[Params]) -> Gram:
  """Inner products of displacements, all of them in float64.

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
  """The plain average of models, on the host.

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


def _unstack(stack: Params) -> list[Params]:
  number = len(jax.tree.leaves(stack)[0])
  return [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(number)]


def _found(folder: pathlib.Path) -> pathlib.Path:
  step = runs.find(folder)
  if step is None:
    raise FileNotFoundError(f'{folder}: there is no checkpoint.')
  return step


def _grid_members(
  workdir: pathlib.Path, config: config_lib.ConfigDict
) -> list[grid.Trained]:
  """All members; an error says which have not been trained yet."""
  done = []
  if (workdir / grid.FILE).exists():
    done = grid.read(workdir)
  trained = {each.member.index for each in done}
  missing = sorted(set(range(config.grid.num_models)) - trained)
  if missing:
    raise ValueError(
      f'{workdir}: the grid has {len(trained)} of {config.grid.num_models} '
      f'models; missing are {missing}. Run `modelstock grid` with this '
      '--workdir again: it goes on.'
    )
  return done


def _check_finished(
  folders: Sequence[pathlib.Path], workdir: pathlib.Path
) -> None:
  """Raises one error that names every run that has not come to its end."""
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
  """What is missing of a run.

  Args:
    folder: its workdir.

  Returns:
    Words for it, or '' if the run has come to its end.
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


def _check_alike(
  shapes: Params, models: Sequence[Params], names: Sequence[str]
) -> None:
  """Raises an error that names every leaf which is not as the anchor's."""
  expected = _by_path(shapes)
  problems = []
  for name, model in zip(names, models, strict=True):
    found = _by_path(model)
    for path in sorted({*expected, *found}):
      ours = found[path].shape if path in found else 'absent'
      theirs = expected[path].shape if path in expected else 'absent'
      if ours != theirs:
        problems.append(f'{name}: {path} is {ours}, in the anchor {theirs}')
  if problems:
    raise ValueError(
      'Models and anchor differ:\n  '
      + '\n  '.join(problems)
      + '\nThe anchor is made from the config: restore the weights and the '
      'data set it names.'
    )
