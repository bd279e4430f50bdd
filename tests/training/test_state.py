import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax.training import optimizer
from modelstock_jax.training import sharding
from modelstock_jax.training import state as state_lib

ADAMW = optimizer.from_optax(optimizer.adamw(weight_decay=0.1, clip_norm=1.0))


def create(anchor, *, num_models, seed=0):
  models = jnp.arange(num_models)
  return state_lib.create(
    anchor, {}, seed, models, optimizer=ADAMW, num_keys=num_models
  )


@pytest.fixture
def anchor():
  return {'w': jnp.arange(6, dtype=jnp.float32).reshape(2, 3), 'b': jnp.ones(3)}


@pytest.mark.parametrize('num_models', [2, 4])
def test_all_models_start_at_the_anchor(anchor, num_models):
  state = create(anchor, num_models=num_models)
  for model in range(num_models):
    for name, leaf in anchor.items():
      np.testing.assert_array_equal(state.params[name][model], leaf)
  assert state.step.dtype == jnp.int32
  assert state.step.shape == ()
  assert int(state.step) == 0


def test_optimizers_are_fresh_ones_of_single_models(anchor):
  state = create(anchor, num_models=3)
  single = ADAMW.init(anchor)
  assert jax.tree.structure(state.opt_state) == jax.tree.structure(single)
  for stacked, leaf in zip(
    jax.tree.leaves(state.opt_state), jax.tree.leaves(single), strict=True
  ):
    assert stacked.dtype == leaf.dtype
    np.testing.assert_array_equal(stacked, np.stack([leaf] * 3))


def test_each_model_has_a_random_stream(anchor):
  keys = [
    jax.random.key_data(create(anchor, num_models=4, seed=seed).key)
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(keys[0], keys[1])
  assert len(np.unique(np.concatenate([keys[0], keys[2]]), axis=0)) == 8


def test_state_is_born_sharded(anchor):
  placement = sharding.place(stock=2, batch_size=8)
  two = functools.partial(create, num_models=2)
  where = placement.state(jax.eval_shape(two, anchor))
  anchor = jax.device_put(anchor, placement.replicated)
  state = jax.jit(two, out_shardings=where)(anchor)
  first = {
    shard.device
    for shard in state.params['w'].addressable_shards
    if shard.index[0] == slice(0, 1)
  }
  assert first == set(placement.mesh.devices[0])
  assert state.key.sharding.is_equivalent_to(placement.stack, 1)
  assert state.step.sharding.is_fully_replicated
