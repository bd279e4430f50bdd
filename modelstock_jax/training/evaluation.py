"""Accuracy on benchmarks, counted over every example once."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax import data
from modelstock_jax.clip import model as model_lib
from modelstock_jax.training import sharding

Params = Any

# Steps that may wait for the devices: more would pile up batches in memory.
_AHEAD = 4


class Score(NamedTuple):
  """Correct answers, examples, and the classes there were to choose from."""

  correct: int
  n: int
  num_classes: int

  @property
  def accuracy(self) -> float:
    """Share of correct answers, 0..1."""
    return self.correct / self.n


class Evaluator(NamedTuple):
  """A compiled evaluation step, and how batches reach it."""

  step: Callable[..., jax.Array]
  placement: sharding.Placement
  batch_size: int  # a multiple of the number of devices
  data_dir: str | None
  image_size: int | None
  as_classifier: Callable[[Params], Params] | None = None

  def __call__(
    self, models: Sequence[Params], benchmark: data.Benchmark
  ) -> list[Score]:
    """Scores of several models, in one pass over a benchmark.

    Each process reads the examples of its own devices; counts are of all.

    Args:
      models: params of single models, on the mesh.
      benchmark: what to evaluate on.

    Returns:
      A `Score` for each model.

    Raises:
      FileNotFoundError: the data set is not there.
      ValueError: an image cannot be decoded, naming its record; the data set
        is not what the benchmark asks for; or the classes are not the models'.
    """
    if not models:
      return []
    # What is split over devices is gathered here, and not in every step.
    models = [jax.device_put(p, self.placement.replicated) for p in models]
    if self.as_classifier:
      models = [self.as_classifier(p) for p in models]
    totals, choices = self.totals(self.step, models, benchmark)
    return [Score(int(correct), int(n), choices) for correct, n in totals]

  def totals(
    self,
    step: Callable[..., jax.Array],
    models: Sequence[Any],
    benchmark: data.Benchmark,
  ) -> tuple[np.ndarray, int]:
    """Sums what a step counts, in one pass over a benchmark.

    Args:
      step: a model, answers and a batch -> int32[..., 2], as `count` gives.
      models: its first arguments, at least one.
      benchmark: what to evaluate on.

    Returns:
      int64[len(models), ..., 2], and the number of classes to choose from.

    Raises:
      FileNotFoundError: as `__call__`, and so for ValueError.
    """
    source = data.open_benchmark(benchmark, self.data_dir)
    table = data.answers(benchmark, source)
    answers = jax.device_put(table, self.placement.replicated)
    counts: list[list[jax.Array]] = []  # on the devices
    batches = data.eval_batches(
      source,
      batch_size=self.batch_size,
      read=data.benchmark_reader(benchmark, source, self.image_size),
      rows=sharding.local_rows(self.placement, self.batch_size),
    )
    try:
      for batch in batches:
        batch = sharding.to_global(batch, self.placement.examples)
        try:
          counts.append([step(p, answers, **batch) for p in models])
        except ValueError as error:
          raise ValueError(f'{benchmark.name}: {error}') from error
        if len(counts) > _AHEAD:
          jax.block_until_ready(counts[-_AHEAD])
    finally:
      batches.close()
    totals = np.array(jax.device_get(counts), np.int64).sum(axis=0)
    choices = len(set(table[table >= 0].tolist()))
    if not totals[..., 1].any():  # in whose lists of labels there is none
      raise ValueError(f'{source.name} has no image with a label')
    return totals, choices


def evaluator(
  model: model_lib.Model,
  preprocess: Callable[[jax.Array], jax.Array],
  placement: sharding.Placement,
  *,
  batch_size: int,
  data_dir: str | None = None,
  image_size: int | None = None,
  as_classifier: Callable[[Params], Params] | None = None,
) -> Evaluator:
  """Compiles the evaluation of a network.

  Args:
    model: the network.
    preprocess: uint8 images to what the network takes.
    placement: batches are spread over all its devices.
    batch_size: examples in a step; rounded up to a multiple of the devices.
    data_dir: where prepared data sets are; None for those that ship.
    image_size: of the network, pixels: images are resized and cropped to it
      by CLIP's own transform. None takes them as they are.
    as_classifier: makes what the network takes of the params of a model, once
      in each evaluation. None takes them as they are.

  Returns:
    An `Evaluator`.
  """
  devices = placement.mesh.size
  step = jax.jit(
    functools.partial(count, model, preprocess),
    out_shardings=placement.replicated,
  )
  return Evaluator(
    step,
    placement,
    batch_size + -batch_size % devices,
    data_dir,
    image_size,
    as_classifier,
  )


def count(
  model: model_lib.Model,
  preprocess: Callable[[jax.Array], jax.Array],
  params: Params,
  answers: jax.Array,
  *,
  image: jax.Array,
  label: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """Counts the right answers of a batch, on the devices.

  Args:
    model: the network.
    preprocess: uint8 images to what the network takes.
    params: of one model.
    answers: int32[K], what every logit stands for: see `data.answers`.
    image: uint8[B, Y, X, C].
    label: int[B], or int[B, L] of which any is right, filled up with -1.
    mask: bool[B], whether there is an example in a place.

  Returns:
    int32[2]: right answers, and examples that have a label.
  """
  logits = model.apply(params, preprocess(image))
  if logits.shape[-1] != len(answers):
    raise ValueError(
      f'the model has {logits.shape[-1]} classes, the data set {len(answers)}. '
      'Evaluate on data of the classes that its head was made for.'
    )
  choices = jnp.where((answers >= 0)[None], logits, -jnp.inf)
  answer = answers[jnp.argmax(choices, -1)]
  labels = label.reshape(len(label), -1)  # a list of them ends in -1
  right = (labels == answer[:, None]).any(-1)
  counted = mask & (labels >= 0).any(-1)
  return jnp.stack(
    [jnp.sum(x, dtype=jnp.int32) for x in (right & counted, counted)]
  )
