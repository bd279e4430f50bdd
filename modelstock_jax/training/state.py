"""What changes during training."""

from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import optax

Params = Any


class StockState(NamedTuple):
  """N models in training: all that changes, and nothing that does not."""

  step: jax.Array  # int32[]     optimizer steps taken by each model
  params: Params  # leaves [N, ...] float32
  opt_state: Any  # leaves [N, ...]
  key: jax.Array  # key[N]      one random stream for each model


def create(
  anchor: Params,
  tx: optax.GradientTransformation,
  *,
  num_models: int,
  seed: jax.typing.ArrayLike,
) -> StockState:
  """N models at the anchor, with fresh optimizers and separate streams.

  Args:
    anchor: the pretrained weights, a tree of float32 arrays.
    tx: the optimizer of one model.
    num_models: N.
    seed: uint32[], of the random streams.

  Returns:
    A `StockState` at step 0. Traceable, so that under `jit` with
    `out_shardings` the state is born sharded.
  """
  params = replicate(anchor, num_models)
  return StockState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=jax.vmap(tx.init)(params),
    key=jax.random.split(jax.random.key(seed), num_models),
  )


def replicate(params: Params, num_models: int) -> Params:
  """Leaves `[...]` to `[N, ...]`: the same weights for every model."""
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (num_models, *x.shape)), params
  )
