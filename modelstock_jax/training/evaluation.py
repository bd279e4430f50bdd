"""Accuracy on benchmarks, counted over every example once."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp

from modelstock_jax import data
from modelstock_jax.clip import model as model_lib
from modelstock_jax.training import sharding

Params = Any


class Score(NamedTuple):
  """Correct answers and examples."""

  correct: int
  n: int

  @property
  def accuracy(self) -> float:
    """Top-1, 0..1."""
    return self.correct / self.n


class Evaluator(NamedTuple):
  """A compiled evaluation step, and how batches reach it."""

  step: Callable[..., jax.Array]
  placement: sharding.Placement
  batch_size: int  # a multiple of the number of devices
  data_dir: str | None

  def __call__(
    self, models: Sequence[Params], benchmark: data.Benchmark
  ) -> list[Score]:
    """Scores of several models, in one pass over a benchmark.

    Args:
      models: params of single models, replicated over the mesh.
      benchmark: what to evaluate on.

    Returns:
      A `Score` for each model.
    """
    counts = []  # on the devices until the last batch is under way
    n = 0
    batches = data.eval_batches(
      benchmark, batch_size=self.batch_size, data_dir=self.data_dir
    )
    try:
      for batch in batches:
        n += int(batch['mask'].sum())
        batch = jax.device_put(batch, self.placement.examples)
        counts.append([self.step(params, **batch) for params in models])
    finally:
      batches.close()
    columns = zip(*jax.device_get(counts), strict=True)
    return [Score(sum(map(int, column)), n) for column in columns]


def evaluator(
  model: model_lib.Model,
  preprocess: Callable[[jax.Array], jax.Array],
  placement: sharding.Placement,
  *,
  batch_size: int,
  data_dir: str | None = None,
) -> Evaluator:
  """Compiles the evaluation of a network.

  Args:
    model: the network.
    preprocess: uint8 images to what the network takes.
    placement: batches are spread over all its devices.
    batch_size: examples in a step; rounded up to a multiple of the devices.
    data_dir: where prepared data sets are; None for those that ship.

  Returns:
    An `Evaluator`.
  """
  devices = placement.mesh.size
  step = jax.jit(
    functools.partial(_count_correct, model, preprocess),
    out_shardings=placement.replicated,
  )
  return Evaluator(
    step, placement, batch_size + -batch_size % devices, data_dir
  )


def _count_correct(model, preprocess, params, *, image, label, mask):
  logits = model.apply(params, preprocess(image))
  correct = (jnp.argmax(logits, -1) == label) & mask
  return jnp.sum(correct, dtype=jnp.int32)
