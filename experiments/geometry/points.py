"""Accuracy at many points of weight space, many at a time in one program."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax import data
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation
from modelstock_jax.training import sharding

Params = Any

# Points in a chunk: as many as this has room for the weights of.
CHUNK_BYTES, MAX_CHUNK = 2**30, 8


class Scorer(NamedTuple):
  """Evaluation of points that are made on the devices, some at a time.

  Attributes:
    count: see `evaluation.count`, of the network of a run.
    evaluator: its batches, and where they go.
    chunk: points at a time.
  """

  count: Callable[..., jax.Array]
  evaluator: evaluation.Evaluator
  chunk: int

  def __call__(
    self,
    make: Callable[[Any, Any], Params],
    shared: Any,
    points: Any,
    benchmarks: Sequence[str],
  ) -> dict[str, list[float]]:
    """Measure accuracy at P points on benchmarks, each of which is read once.

    Args:
      make: from `shared` and C of the points to a stack, leaves `[C, ...]`;
        a function of a module, which is compiled once.
      shared: what all points are made of: a tree of arrays.
      points: tree of arrays `[P, ...]`, one entry for each point.
      benchmarks: names.

    Returns:
      For each benchmark P accuracies, 0..1.

    Raises:
      FileNotFoundError: a data set is not there.
      ValueError: for an unknown benchmark; or as `evaluation.Evaluator`.
    """
    number = len(jax.tree.leaves(points)[0])
    chunk = min(self.chunk, number)
    where = self.evaluator.placement.replicated
    shared = jax.device_put(shared, where)
    # The last chunk is filled up with its last point: one program for all.
    places = np.minimum(np.arange(number + -number % chunk), number - 1)
    chunks = [
      jax.device_put(_part(points, part), where)
      for part in places.reshape(-1, chunk)
    ]

    count = _program(self.count, make, where)
    accuracies = {}
    for name in benchmarks:
      totals, _ = self.evaluator.totals(
        count, [(shared, part) for part in chunks], data.find_benchmark(name)
      )
      correct, n = np.moveaxis(totals.reshape(-1, 2)[:number], 1, 0)
      accuracies[name] = (correct / n).tolist()
    return accuracies


@functools.cache
def _program(
  count: Callable[..., jax.Array],
  make: Callable[[Any, Any], Params],
  where: jax.sharding.Sharding,
) -> Callable[..., jax.Array]:
  """Return the compiled count of a chunk; it is called many times."""

  @functools.partial(jax.jit, out_shardings=where)
  def run(both, answers, batch):
    def one(params):
      return count(params, {}, answers, batch)

    return jax.vmap(one)(make(*both))

  return run


def scorer(
  config: config_lib.ConfigDict, anchor: Params, *, chunk: int | None = None
) -> Scorer:
  """Prepare the evaluation of a run's network, on all devices.

  Args:
    config: of the run.
    anchor: a model, for the number of classes and the memory it takes.
    chunk: points at a time; None is as many as `CHUNK_BYTES` hold, up to
      `MAX_CHUNK`.

  Returns:
    A `Scorer`.
  """
  if chunk is None:
    size = sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(anchor)
    )
    chunk = max(1, min(MAX_CHUNK, CHUNK_BYTES // size))
  task = clip_task.task(config, len(anchor['head']['bias']))
  placement = sharding.place()
  evaluator = evaluation.Evaluator(
    task,
    placement,
    batch_size=config.evaluate.batch_size,
    data_dir=config.data.data_dir or None,
    image_size=config.model.image.image_size,
  )
  count = functools.partial(evaluation.count, task)
  return Scorer(count, evaluator, chunk)


def pick(models: Params, indices: jax.Array) -> Params:
  """Select models of a stack, `[K, ...]`: int32[C] -> leaves `[C, ...]`."""
  return jax.tree.map(lambda leaf: leaf[indices], models)


def combine(basis: Params, shares: Any) -> Params:
  """Return weighted sums of a few trees.

  Args:
    basis: leaves `[K, ...]`.
    shares: float32[C, K], or a tree of them with shares for each leaf of its
      own; they need not add up to one.

  Returns:
    Leaves `[C, ...]`.

  >>> basis = {'w': jnp.array([[1.0, 2.0], [3.0, 4.0]])}
  >>> combine(basis, jnp.array([[0.5, 0.5], [0.0, 1.0]]))['w'].tolist()
  [[2.0, 3.0], [3.0, 4.0]]
  """
  if isinstance(shares, jax.Array):
    shares = jax.tree.map(lambda _: shares, basis)
  return jax.tree.map(
    lambda leaf, share: jnp.tensordot(
      share, leaf, axes=1, precision=jax.lax.Precision.HIGHEST
    ),
    basis,
    shares,
  )


def by_point(accuracies: dict[str, list[float]]) -> list[dict[str, float]]:
  """Turn accuracies by benchmark into those of each point.

  >>> by_point({'digits': [0.5, 0.75], 'noise': [0.25, 0.5]})
  [{'digits': 0.5, 'noise': 0.25}, {'digits': 0.75, 'noise': 0.5}]
  """
  return [
    dict(zip(accuracies, values, strict=True))
    for values in zip(*accuracies.values(), strict=True)
  ]


def _part(points: Any, places: np.ndarray) -> Any:
  return jax.tree.map(lambda leaf: np.asarray(leaf)[places], points)


def stack(trees: Sequence[Params]) -> Params:
  """Stack trees of numpy arrays into leaves `[K, ...]`, on the host."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
