"""The least bytes that the programs of a run have to send between devices."""

from collections.abc import Iterator
import math
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax.training import auto
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import memory
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding


def sent_bytes(
  config: config_lib.Config,
  placement: sharding.Placement,
  hbm_bytes: int,
  params: Any,
) -> dict[str, int]:
  """Return the least bytes that a device has to send.

  In a step, for each of its models on d devices,

    (d - 1) / d (2 s + g) bytes

  for a parameter that FSDP splits: the weights are gathered once forward and
  once backward, s bytes each in the dtype of the products, and the gradients
  scattered once, g bytes each; and for another one

    (d - 1) / d 2 g bytes

  in one all-reduce of the gradients. It is the least over the shardings that
  fit: with and without FSDP, and with models apart if they can be. In a merge,
  its part of its model once to each of the models on other devices.

  Args:
    config: of the run, without 'auto' in its settings.
    placement: of the run.
    hbm_bytes: of each device.
    params: arrays of one model, or their shapes.

  Returns:
    Bytes by the name of the program.
  """
  product = jnp.dtype(config.model.dtype).itemsize

  def of_step(placement):
    def of_leaf(leaf, where):
      size = leaf.dtype.itemsize
      split = not where.is_fully_replicated
      return leaf.size * (2 * min(product, size) + size if split else 2 * size)

    sizes = jax.tree.map(of_leaf, params, placement.params(params))
    stock, members = placement.mesh.devices.shape
    models = config.merge.num_models // stock
    return sum(jax.tree.leaves(sizes)) * models * (members - 1) // members

  def part(leaf, where):
    return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  parts = jax.tree.map(part, params, placement.params(params))
  others = placement.mesh.shape[sharding.STOCK] - 1
  shardings = [placement, *_that_fit(config, placement, hbm_bytes)]
  return {
    'step': min(map(of_step, shardings)),
    'merge': sum(jax.tree.leaves(parts)) * others,
  }


def _that_fit(
  config: config_lib.Config, placement: sharding.Placement, hbm_bytes: int
) -> Iterator[sharding.Placement]:
  """Yield the placements that send the least and fit by their estimates."""
  devices = list(placement.mesh.devices.flat)
  mesh, num_models = config.mesh, config.merge.num_models
  vmap = config.train.models == 'vmap'
  apart = vmap and sharding.can_separate(devices, num_models)
  for size in (0, memory.FSDP_MIN_SIZE):
    update = {'fsdp_min_size': size}
    update |= {'stock': num_models} if apart else {}
    split = mesh.model_copy(update=update)
    update = {'mesh': split}
    needed = auto.needed_bytes(config.model_copy(update=update), len(devices))
    if needed is not None and needed <= auto.SHARE * hbm_bytes:
      yield setup_lib.place(config.train, split, devices)
