"""Accuracy at many points of weight space."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from experiments.geometry import family as family_lib
from experiments.geometry import gram
from modelstock_jax import data
from modelstock_jax.report import merges
from modelstock_jax.report import results
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding

# Points, each a dict about it and its shares of the models' displacements,
# float64[N] or for each layer [L, N]; and the models, by default those of the
# family -> the dicts, with 'accuracy', 0..1, by benchmark.
Score = Callable[..., list[dict[str, Any]]]


def scorer(
  config: config_lib.Config,
  family: family_lib.Family,
  benchmarks: Sequence[str],
) -> Score:
  """Prepare the evaluation of a run's network, on all devices.

  Args:
    config: of the run.
    family: with the anchor from which displacements begin.
    benchmarks: names.

  Returns:
    A `Score`. Each point is made on the devices, when a batch needs it.

  Raises:
    FileNotFoundError: a data set is not there.
    ValueError: a benchmark is not known, or none is in distribution.
  """
  if not set(benchmarks) & set(results.IN_DISTRIBUTION):
    raise ValueError(
      f'--benchmarks={",".join(benchmarks)}: give one of '
      f'{", ".join(results.IN_DISTRIBUTION)}, and shifts of it.'
    )
  anchor, data_dir = family.anchor, config.data.data_dir
  specs = [data.find_benchmark(name) for name in benchmarks]
  for spec in specs:  # what is missing is an error before anything takes long
    data.open_benchmark(spec, data_dir)
  task = clip_task.task(config, len(anchor['head']['bias']))
  placement = sharding.place()
  paths = list(gram.by_path(anchor))
  groups = list(merges.group_layers(paths)[0].values())
  layer_of = {path: row for row, group in enumerate(groups) for path in group}
  layers = jax.tree.unflatten(
    jax.tree.structure(anchor), [layer_of[path] for path in paths]
  )

  def combine(leaf, share):
    return jnp.tensordot(share, leaf, 1, precision=jax.lax.Precision.HIGHEST)

  def predict(share, stack, batch):
    assert task.predict is not None
    return task.predict(jax.tree.map(combine, stack, share), {}, batch)

  evaluator = setup_lib.evaluator(
    config, task._replace(predict=predict), placement
  )

  def score(points, models=None):
    models = family.models.values() if models is None else models
    shape = len(groups), len(models)
    shares = np.stack([np.broadcast_to(share, shape) for _, share in points])
    rest = 1 - shares.sum(-1, keepdims=True)  # the share of the anchor
    shares = np.concatenate([rest, shares], axis=-1, dtype=np.float32)
    by_leaf = [jax.tree.map(share.__getitem__, layers) for share in shares]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), anchor, *models)
    by_leaf, stack = jax.device_put((by_leaf, stack), placement.replicated)

    measured = [{**about, 'accuracy': {}} for about, _ in points]
    for spec in specs:
      right, _ = evaluator.correct([(x, stack) for x in by_leaf], spec)
      for point, row in zip(measured, right, strict=True):
        point['accuracy'][spec.name] = float(row.mean(dtype=np.float64))
    return measured

  return score
