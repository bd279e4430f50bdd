"""The seam between a network and the trainer: `Task` and `Optimizer`.

A task is one model as pure functions; an optimizer is how one model makes a
step. Neither knows of the stack of models, of meshes, files or accumulation:
the trainer maps them over N models, shards them, cuts batches and saves.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp

from modelstock_jax import merging
from modelstock_jax.formats import text as text_lib

Params = Any
Batch = dict[str, Any]


class Task(NamedTuple):
  """One model as pure functions, and what the trainer needs to know of it.

  Every leaf of the params is an array of floating dtype: it is merged. What is
  never trained and never merged belongs in `consts`; running statistics, and
  leaves that are not floating, belong in `variables`. A part of the params is
  frozen by `jax.lax.stop_gradient` in `loss`, and with `optimizer.only` it has
  no moments and no weight decay either.

  Attributes:
    init: key[] -> params, variables. Makes the params of one model, and its
      variables ({} if there are none). Its shapes are taken from
      `jax.eval_shape`, so it is traceable, unless `load` is given and the
      closure holds no arrays to trace.
    loss: params, variables, batch, key[], anchor, consts -> float32[],
      (metrics {name: float32[]}, variables). The loss and the metrics are means
      over the examples of this batch, which may be a part of the whole one.
      `anchor` is the params that training started from. With `accumulate`
      parts, the variables of one part are handed to the next; those of a
      `MeanOfExamples` may be cut further, over devices.
    score: deployed, variables, batch -> {name: float32[B]}, one number for
      each example; the trainer leaves out padding and takes the mean.
    example: {name: ShapeDtypeStruct} of one example, without a batch axis.
    draw: batch, key[], consts, hyper -> batch. Called once a step on the whole
      batch of one model, before it is cut into parts: for mixup partners or
      captions. Arrays are cut along their first axis; scalars go whole to each
      part. The key is the one that `loss` gets.
    deploy: params, consts -> what `score` and `predict` take, called outside of
      `jit` once in an evaluation on arrays that are replicated over the mesh.
      `plan` takes its shapes from `jax.eval_shape`.
    predict: deployed, variables, batch -> logits float32[B, K]; None where
      there are no classes, and so no benchmarks.
    consts: arrays beside the params, the same for all models and never changed,
      or `jax.ShapeDtypeStruct` of them where `load` makes them.
    load: placement -> params, variables, consts. Reads what a run starts from;
      None starts at `init` of the seed.
    layers: path, leaf -> `merging.Layer`; None makes each leaf a layer.
    select: the score that chooses the best checkpoint; higher is better.
    flops: FLOPs of a step on one example, forward and backward; 0 if unknown.
  """

  init: Callable[..., tuple[Params, Any]]
  loss: Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]
  score: Callable[..., dict[str, jax.Array]]
  example: Mapping[str, jax.ShapeDtypeStruct]
  draw: Callable[..., Batch] = lambda batch, key, consts, hyper: batch
  deploy: Callable[[Params, Any], Any] = lambda params, consts: params
  predict: Callable[..., jax.Array] | None = None
  consts: Any = ()
  load: Callable[[Any], tuple[Params, Any, Any]] | None = None
  layers: merging.Layers | None = None
  select: str = 'accuracy'
  flops: int = 0


class MeanOfExamples(NamedTuple):
  """A `Task.loss` that is a mean over examples of which none sees another.

  Its batch may be cut anywhere, so with `accumulate` each device may add up the
  gradients of its own examples. A mean of squares is one; a contrastive loss,
  or one that normalises by statistics of the batch, is not.

  Attributes:
    loss: see `Task.loss`.
  """

  loss: Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]

  def __call__(self, *args: Any) -> Any:
    """Return what the loss returns."""
    return self.loss(*args)


class Optimizer(NamedTuple):
  """An update rule of one model.

  `optimizer.from_optax` makes one of an optax transformation.

  Attributes:
    init: params -> opt_state, a tree of arrays.
    step: params, grads, opt_state, learning_rate float32[], anchor, hyper ->
      params, opt_state. `anchor` is the params that training started from;
      `hyper` holds the hyper-parameters of one model of a grid, else nothing.
  """

  init: Callable[[Params], Any]
  step: Callable[..., tuple[Params, Any]]


def check_params(params: Params) -> None:
  """Check that all params can be trained and merged.

  Args:
    params: arrays of one model, or their shapes.

  Raises:
    ValueError: a leaf is not floating; names all of them.

  >>> check_params({'w': jnp.zeros(2), 'steps': jnp.zeros(2, jnp.int32)})
  Traceback (most recent call last):
    ...
  ValueError: Task.init: params['steps'] is int32[2], which cannot be trained or merged. Return it with the variables, or give it in Task.consts.
  """  # noqa: E501
  wrong = [
    f'params{jax.tree_util.keystr(path)} is {_text(leaf)}'
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if not jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  if wrong:
    raise ValueError(
      f'Task.init: {", ".join(wrong)}, which cannot be trained or merged. '
      'Return it with the variables, or give it in Task.consts.'
    )


def check_loss(
  loss: jax.Array, metrics: Any, variables: Any, before: Any
) -> None:
  """Check the results of `Task.loss`, at trace time.

  Args:
    loss: must be float32[].
    metrics: must be {name: float32[]}.
    variables: must have the structure, shapes and dtypes of `before`.
    before: the variables that `Task.loss` was given.

  Raises:
    ValueError: one of them does not fit; names all that do not.
  """
  named = {'the loss': loss, **{f'metric {k!r}': v for k, v in metrics.items()}}
  wrong = [
    f'{name} is {_text(value)}, not float32[]'
    for name, value in named.items()
    if jnp.shape(value) or jnp.result_type(value) != jnp.float32
  ]
  old, new = _leaves(before), _leaves(variables)
  wrong += [
    f'variables{path}: {old.get(path, "absent")} before the step, '
    f'{new.get(path, "absent")} after it'
    for path in sorted({*old, *new})
    if old.get(path) != new.get(path)
  ]
  text_lib.raise_problems(
    'Task.loss must return float32[], ({name: float32[]}, variables):', wrong
  )


def _leaves(tree: Any) -> dict[str, str]:
  return {
    jax.tree_util.keystr(path): _text(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _text(leaf: Any) -> str:
  shape = ', '.join(map(str, jnp.shape(leaf)))
  return f'{jnp.result_type(leaf)}[{shape}]'
