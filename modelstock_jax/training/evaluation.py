"""Scores and embeddings of validation data and benchmarks, each once."""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import functools
from typing import Annotated
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import pydantic

from modelstock_jax import data
from modelstock_jax.clip import heads
from modelstock_jax.formats import text as text_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import task as task_lib

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


class Row(NamedTuple):
  """One measurement: a method's accuracy on a benchmark, for one seed."""

  method: str
  benchmark: str
  seed: int
  accuracy: Annotated[float, pydantic.Field(ge=0, le=1)]
  n: Annotated[int, pydantic.Field(ge=1)]  # examples
  # To choose from, where it is known.
  num_classes: Annotated[int, pydantic.Field(ge=1)] | None = None


class Evaluator:
  """Compiled evaluation steps of a task, and how batches reach them.

  Attributes:
    placement: batches are spread over all its devices.
    batch_size: a multiple of the number of devices.
    sums: deployed, variables, batch -> {name: float32[]}; see `sums`.
  """

  def __init__(
    self,
    task: task_lib.Task,
    placement: sharding.Placement,
    *,
    batch_size: int,
    consts: Any = (),
    data_dir: str | None = None,
    image_size: int | None = None,
  ):
    """Make the programs. Nothing is compiled yet.

    Args:
      task: the task.
      placement: batches are spread over all its devices.
      batch_size: examples in a step; rounded up to a multiple of the devices.
      consts: of the task, on the devices.
      data_dir: where prepared data sets are; None for those that ship.
      image_size: in pixels: images are resized and cropped to it by CLIP's
        own transform; None takes them as they are.
    """
    self.placement = placement
    self.batch_size = batch_size + -batch_size % placement.mesh.size
    self._task, self._consts = task, consts
    self._data_dir, self._image_size = data_dir, image_size
    self._correct, self._accuracy, self.sums = (
      jax.jit(functools.partial(step, task), out_shardings=placement.replicated)
      for step in (correct, accuracy, sums)
    )

  def __call__(
    self,
    models: Sequence[Params],
    benchmark: data.Benchmark,
    variables: Any = None,
  ) -> list[Score]:
    """Count the right answers of several models, in one pass.

    Each process reads the examples of its own devices; counts are of all.

    Args:
      models: params of single models, on the mesh.
      benchmark: what to evaluate on.
      variables: of the task, the same for all models; None if it has none.

    Returns:
      A `Score` for each model.

    Raises:
      FileNotFoundError: the data set is not there.
      ValueError: an image cannot be decoded, naming its record; the data set
        is not what the benchmark asks for; or the classes are not the models'.
    """
    if not models:
      return []
    variables = {} if variables is None else variables
    pairs = [(params, variables) for params in models]
    right, choices = self.correct(pairs, benchmark)
    return [Score(int(row.sum()), len(row), choices) for row in right]

  def correct(
    self, models: Sequence[tuple[Params, Any]], benchmark: data.Benchmark
  ) -> tuple[np.ndarray, int]:
    """Compare the answers of several models with the labels, in one pass.

    Args:
      models: params and variables of single models, at least one.
      benchmark: what to evaluate on.

    Returns:
      float32[M, n], 1 where model m is right about example n and else 0, of the
      examples that have a label, in their order; and the number of classes to
      choose from.

    Raises:
      FileNotFoundError: as `__call__`, and so for ValueError.
    """
    source = data.open_benchmark(benchmark, self._data_dir)
    table = data.answers(benchmark, source)
    answers = jax.device_put(table, self.placement.replicated)
    read = data.benchmark_reader(benchmark, source, self._image_size)

    def score(deployed, variables, batch):
      with text_lib.explained(f'{benchmark.name}: '):
        return self._correct(deployed, variables, answers, batch)

    right = self._of_examples(score, models, source, read)
    if not right.size:
      raise ValueError(f'{source.name}: no image with a label.')
    return right, len(set(table[table >= 0].tolist()))

  def accuracies(
    self, models: Sequence[tuple[Params, Any]], source: data.Source, read: Any
  ) -> np.ndarray:
    """Compute the score 'accuracy' of `Task.score` of several models.

    Args:
      models: params and variables of single models, at least one.
      source: the examples.
      read: record, index -> example; None takes records as they are.

    Returns:
      float32[M, n], of every example, in their order.

    Raises:
      ValueError: the task has no such score.
    """
    return self._of_examples(self._accuracy, models, source, read)

  def _of_examples(self, score, models, source, read) -> np.ndarray:
    """Return a score of examples, float32[M, n], without those of score -1."""
    deployed = [(self.deploy(params), of_model) for params, of_model in models]

    def step(batch):
      return [score(*model, batch) for model in deployed]

    outputs = run(step, source, read, self.placement, self.batch_size)
    table = np.concatenate([np.stack(each) for each in outputs], axis=1)
    return table[:, table[0] >= 0]

  def deploy(self, params: Params) -> Any:
    """Return what the task evaluates of params, replicated over the mesh."""
    # Params that are split over devices are gathered once, not in every step.
    params = jax.device_put(params, self.placement.replicated)
    return self._task.deploy(params, self._consts)

  def validate(
    self, params: Params, variables: Any, source: data.Source, read: Any
  ) -> dict[str, float]:
    """Compute the mean scores of one model over all examples of a source.

    Args:
      params: of one model.
      variables: of one model.
      source: the examples.
      read: record, index -> example; None takes records as they are.

    Returns:
      The task's scores by name, and the number of examples 'n'.
    """
    deployed = self.deploy(params)
    step = functools.partial(self.sums, deployed, variables)
    totals = run(step, source, read, self.placement, self.batch_size)
    n = int(sum(total['n'] for total in totals))
    names = totals[0].keys() - {'n'}
    means = {k: sum(float(t[k]) for t in totals) / n for k in sorted(names)}
    return {**means, 'n': n}


def run(
  step: Callable[[dict[str, jax.Array]], Any],
  source: data.Source,
  read: data.EvalRead | None,
  placement: sharding.Placement,
  batch_size: int,
) -> list[Any]:
  """Run a step once on each batch of a source; some may wait for the devices.

  Args:
    step: from a batch on the devices, {name: [B, ...]}, with 'mask' bool[B]
      that is False in places without an example.
    source: the examples.
    read: record, index -> example; None takes records as they are.
    placement: batches are spread over all its devices.
    batch_size: examples in a batch; a multiple of the number of devices.

  Returns:
    The results of all steps, on the host.
  """
  [block] = sharding.local_block(placement.examples, (batch_size,))
  rows = slice(block.start, block.stop)
  local = data.eval_batches(source, batch_size=batch_size, read=read, rows=rows)
  results = []
  with contextlib.closing(local):
    for batch in local:
      results.append(step(sharding.to_global(batch, placement.examples)))
      if len(results) > _AHEAD:
        results[-_AHEAD - 1] = jax.device_get(results[-_AHEAD - 1])
  return jax.device_get(results)


def sums(
  task: task_lib.Task, deployed: Any, variables: Any, batch: task_lib.Batch
) -> dict[str, jax.Array]:
  """Sum the scores of a batch over its examples, on the devices.

  Args:
    task: gives the scores.
    deployed: see `Task.deploy`.
    variables: of the task.
    batch: examples, and 'mask' bool[B], False in places without an example.

  Returns:
    float32[] by name, and 'n' int32[], the number of examples.

  Raises:
    ValueError: a score is not float32[B].
  """
  mask = batch['mask']
  totals = {'n': jnp.sum(mask, dtype=jnp.int32)}
  for name, values in task.score(deployed, variables, batch).items():
    if values.shape != mask.shape or values.dtype != jnp.float32:
      raise ValueError(
        f'Task.score: {name!r} is {values.dtype}{list(values.shape)}; return '
        f'one number for each example, float32{list(mask.shape)}.'
      )
    totals[name] = jnp.sum(jnp.where(mask, values, 0))
  return totals


def accuracy(
  task: task_lib.Task, deployed: Any, variables: Any, batch: task_lib.Batch
) -> jax.Array:
  """Return the score 'accuracy' of each example, on the devices.

  Args:
    task: gives the scores.
    deployed: see `Task.deploy`.
    variables: of the task.
    batch: see `sums`.

  Returns:
    float32[B], -1 in places without an example.

  Raises:
    ValueError: there is no such score.
  """
  scores = task.score(deployed, variables, batch)
  if 'accuracy' not in scores:
    raise ValueError(
      f"Task.score: there is no 'accuracy' among {sorted(scores)}, which "
      'results.json records. Return one as well, or read metrics.jsonl.'
    )
  return jnp.where(batch['mask'], scores['accuracy'], -1)


def correct(
  task: task_lib.Task,
  deployed: Any,
  variables: Any,
  answers: jax.Array,
  batch: task_lib.Batch,
) -> jax.Array:
  """Compare the answers to a batch with the labels, on the devices.

  Args:
    task: predicts classes.
    deployed: see `Task.deploy`.
    variables: of the task.
    answers: int32[K], what every logit stands for: see `data.answers`.
    batch: of these 'label', int[B], or int[B, L] of which any is right, filled
      up with -1; and 'mask' bool[B], False in places without an example.

  Returns:
    float32[B]: 1 for a right answer, 0 for a wrong one, -1 where there is no
    example or it has no label.

  Raises:
    ValueError: the task does not predict these classes.
  """
  if task.predict is None:
    raise ValueError(
      'The task has no `predict`, which gives the logits of classes: '
      'benchmarks of classes cannot be evaluated.'
    )
  logits = task.predict(deployed, variables, batch)
  if logits.shape[-1] != len(answers):
    raise ValueError(
      f'the model has {logits.shape[-1]} classes, the data set {len(answers)}. '
      'Evaluate on data of the classes that its head was made for.'
    )
  choices = jnp.where((answers >= 0)[None], logits, -jnp.inf)
  answer = answers[jnp.argmax(choices, -1)]
  label = batch['label']
  labels = label.reshape(len(label), -1)  # a list of them ends in -1
  right = (labels == answer[:, None]).any(-1)
  counted = batch['mask'] & (labels >= 0).any(-1)
  return jnp.where(counted, right.astype(jnp.float32), -1)


def image_features(
  encode: Callable[[Params, jax.Array], jax.Array],
  preprocess: Callable[[jax.Array], jax.Array],
  params: Params,
  placement: sharding.Placement,
  source: data.Source,
  read: data.EvalRead,
  *,
  batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Embed every example once, on all devices.

  Compiled once for the same `encode`, `preprocess` and shapes: pass the same
  functions again for the next source.

  Args:
    encode: params, images -> embeddings float[B, D], such as
      `clip.create(config).encode_image`.
    preprocess: uint8 images to what `encode` takes.
    params: of `encode`, replicated over the mesh.
    placement: batches are spread over all its devices.
    source: the examples.
    read: record, index -> example with 'image' and 'label'.
    batch_size: examples in a step; rounded up to a multiple of the devices.

  Returns:
    Features float32[n, D], of length 1, and labels int32[n], in the order of
    the source.

  Raises:
    ValueError: the batch size is not positive.
  """
  batch_size += -batch_size % placement.mesh.size
  embed = functools.partial(
    _embed, encode, preprocess, placement.replicated, params
  )
  outputs = run(
    lambda batch: embed(**batch), source, read, placement, batch_size
  )
  rows, labels, mask = map(np.concatenate, zip(*outputs, strict=True))
  return rows[mask], labels[mask]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed(encode, preprocess, replicated, params, *, image, label, mask):
  rows = heads.normalize(encode(params, preprocess(image)))
  # Every process fetches all of them.
  return jax.lax.with_sharding_constraint((rows, label, mask), replicated)
