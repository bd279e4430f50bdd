"""Cosine and ratio of every layer at every merge, over the seeds of a run."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import re
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax.files import names as names_lib
from modelstock_jax.report import plots

Lines = Sequence[Mapping[str, Any]]


class Layer(NamedTuple):
  """A layer of a network.

  Attributes:
    name: its path, or that of the group whose parameters share its cosine.
    kind: a key of `plots.KIND_STYLES`, see `files.names.layer_kind`.
    place: index in `Merges.places`.
  """

  name: str
  kind: str
  place: int


class Merges(NamedTuple):
  """S runs that differ in their seed, merged E times, with L layers each.

  Attributes:
    epochs: E numbers, ascending: the epochs after which the runs merged.
    layers: L of them; parameters that share a cosine are one.
    places: names along the depth: 'input', '0', '1', ... (blocks), 'output'.
    cosine: float64[S, E, L], raw.
    ratio: float64[S, E, L], 0 is the anchor and 1 the plain average.
  """

  epochs: list[int]
  layers: list[Layer]
  places: list[str]
  cosine: np.ndarray
  ratio: np.ndarray


def select(lines: Lines, epochs: int) -> dict[int, Mapping[str, Any]]:
  """Return the merges of a run by epoch.

  A merge is a line of kind 'merge' from which the run resumed, or that at the
  end; other lines say what a merge there would have been. A single model has
  no cosines, and no merges.

  Args:
    lines: of its metrics.jsonl.
    epochs: of the finished run.

  >>> line = {'kind': 'merge', 'cosine': {'head/bias': 0.5}, 'restarts': False}
  >>> list(select([{**line, 'epoch': 1}, {**line, 'epoch': 2}], 2))
  [2]
  """
  return {
    line['epoch']: line
    for line in lines
    if line['kind'] == 'merge'
    and line['cosine']
    and (line['restarts'] or line['epoch'] >= epochs)
  }


def collect(runs: Sequence[Mapping[int, Mapping[str, Any]]]) -> Merges:
  """Collect the merges of runs of one config.

  Args:
    runs: for each seed the lines of its merges by epoch, see `select`.

  Returns:
    Merges after the epochs that all runs have in common.

  Raises:
    ValueError: the runs differ in their layers.

  >>> line = {'cosine': {'head/bias': 0.5}, 'ratio': {'head/bias': 2 / 3}}
  >>> merges = collect([{2: line}])
  >>> merges.epochs, merges.layers
  ([2], [Layer(name='head/bias', kind='head', place=1)])
  """
  epochs = sorted(set.intersection(*map(set, runs)))
  lines = [[run[epoch] for epoch in epochs] for run in runs]
  paths = list(lines[0][0]['cosine'])
  for line in itertools.chain(*lines):
    if different := set(line['cosine']) ^ set(paths):
      raise ValueError(
        f'The runs differ in their layers: {sorted(different)}. Give runs of '
        'one network.'
      )
  # Query, key and value have equal values where they share a cosine, and
  # values of their own where merging is by filter: their mean serves both.
  groups, layers, places = group_layers(paths)

  def means(values: Mapping[str, Any]) -> list[Any]:
    return [np.mean([values[path] for path in g]) for g in groups.values()]

  cosine, ratio = (
    np.array([[means(line[name]) for line in of_run] for of_run in lines])
    for name in ('cosine', 'ratio')
  )
  return Merges(epochs, layers, places, cosine, ratio)


def group_layers(
  paths: Sequence[str],
) -> tuple[dict[str, list[str]], list[Layer], list[str]]:
  """Return the layers of a network; query, key and value of ours are one.

  Args:
    paths: of the parameters.

  Returns:
    The paths of each layer, by its name; the layers; and the places.

  >>> paths = [f'block_0/attention/{x}/kernel' for x in ('key', 'query')]
  >>> groups, layers, places = group_layers(paths)
  >>> list(groups), layers[0].kind, places
  (['block_0/attention/qkv/kernel'], 'attention', ['input', '0', 'output'])
  """
  groups: dict[str, list[str]] = {}
  for path in paths:  # as `clip.clip_layers` does
    name = re.sub('/attention/(query|key|value)/', '/attention/qkv/', path)
    groups.setdefault(name, []).append(path)
  blocks = {name: names_lib.layer_block(name) for name in groups}
  depth = 1 + max((k for k in blocks.values() if k is not None), default=-1)
  layers = []
  for name, block in blocks.items():
    kind = names_lib.layer_kind(name)
    place = depth + 1 if block is None else block + 1
    if block is None and (kind == 'embedding' or 'ln_pre' in name):
      place = 0
    layers.append(Layer(name, kind, place))
  return groups, layers, ['input', *map(str, range(depth)), 'output']


def by_kind(layers: Sequence[Layer]) -> dict[str, np.ndarray]:
  """Return a mask of the layers, bool[L], for each kind that occurs.

  Kinds are in the order of `plots.KIND_STYLES`.
  """
  kinds = np.array([layer.kind for layer in layers])
  return {kind: kinds == kind for kind in plots.KIND_STYLES if kind in kinds}
