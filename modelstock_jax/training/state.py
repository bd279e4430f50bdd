"""The arrays that change during training."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import optax

from modelstock_jax.training import task as task_lib

Params = Any


class State(NamedTuple):
  """N models in training: all that changes, and nothing that does not."""

  step: jax.Array  # int32[]     optimizer steps taken by each model
  params: Params  # leaves [N, ...] float32
  variables: Any  # leaves [N, ...]; {} where a task has none
  opt_state: Any  # leaves [N, ...]
  key: jax.Array  # key[N]      one random stream for each model


def create(
  anchor: Params,
  variables: Any,
  seed: jax.typing.ArrayLike,
  models: jax.Array,
  *,
  optimizer: task_lib.Optimizer,
  num_keys: int,
) -> State:
  """Create N models at the anchor, with fresh optimizers and separate streams.

  Args:
    anchor: the pretrained weights, a tree of float32 arrays.
    variables: of one model.
    seed: uint32[], of the random streams.
    models: int32[N], the indices of these models among all `num_keys`.
    optimizer: of one model.
    num_keys: number of random streams; that of a model follows from its index.

  Returns:
    A `State` at step 0. Traceable, so that under `jit` with `out_shardings`
    the state is born sharded.
  """
  number = models.shape[0]
  params = replicate(anchor, number)
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    variables=replicate(variables, number),
    opt_state=jax.vmap(optimizer.init)(params),
    key=jax.random.split(jax.random.key(seed), num_keys)[models],
  )


def replicate(tree: Any, num_models: int) -> Any:
  """Return leaves `[N, ...]` of leaves `[...]`: the same for every model."""
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (num_models, *x.shape)), tree
  )


def average(tree: Any) -> Any:
  """Return the mean over models of leaves `[N, ...]`: leaves `[...]`.

  Leaves that are not floating are those of the first model: counts are equal
  in all of them.
  """

  def mean(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf[0]
    return jnp.mean(leaf, axis=0)

  return jax.tree.map(mean, tree)


def restart_optimizer(
  opt_state: Any, how: str, init: Callable[[Params], Any], params: Params
) -> Any:
  """Return the optimizer states of models that continue from a merge.

  Args:
    opt_state: of N models, leaves [N, ...].
    how: 'keep' each model's own, 'average' them over models, or 'reset' them
      to fresh ones. A schedule that optax counts itself continues.
    init: params of one model -> its fresh state.
    params: that the models continue from, leaves [N, ...].
  """
  if how == 'keep':
    return opt_state
  if how == 'average':
    number = jax.tree.leaves(params)[0].shape[0]
    return replicate(average(opt_state), number)

  def is_schedule(part: Any) -> bool:
    return isinstance(part, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda old, new: old if is_schedule(old) else new,
    opt_state,
    jax.vmap(init)(params),
    is_leaf=is_schedule,
  )


def with_raw_key(state: State) -> State:
  """Return a state, or its shapes, with the bits of the keys for the keys."""
  if not isinstance(state.key, jax.ShapeDtypeStruct):
    return state._replace(key=jax.random.key_data(state.key))
  raw = jax.eval_shape(jax.random.key_data, state.key)
  return state._replace(key=abstract(raw, state.key.sharding))


def abstract(tree: Any, shardings: Any = None) -> Any:
  """Return the shapes of a tree with shardings.

  Args:
    tree: arrays, or their shapes.
    shardings: a prefix of the tree; None takes those of the arrays.
  """
  if shardings is None:
    shardings = jax.tree.map(lambda x: x.sharding, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    jax.tree.broadcast(shardings, tree),
  )
