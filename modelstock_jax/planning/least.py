"""The least bytes that the programs of a run have to send between devices."""

from collections.abc import Iterator
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax.training import auto
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import memory
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding


def step_bytes(
  config: config_lib.Config,
  placement: sharding.Placement,
  hbm_bytes: int,
  params: Any,
) -> int:
  """Return the least bytes that a device has to send in a step.

  For each of its models on d devices,

    (d - 1) / d (2 s + g) bytes

  for a parameter that FSDP splits: the weights are gathered once forward and
  once backward, s bytes each in the dtype of the products, and the gradients
  scattered once, g bytes each; and for another one

    (d - 1) / d 2 g bytes

  in one all-reduce of the gradients. It is the least over the shardings that
  fit: with and without FSDP, and with models apart if they can be.

  Args:
    config: of the run, without 'auto' in its settings.
    placement: of the run.
    hbm_bytes: of each device.
    params: arrays of one model, or their shapes.
  """
  product = jnp.dtype(config.model.dtype).itemsize

  def of_placement(placement):
    def of_leaf(leaf, where):
      size = leaf.dtype.itemsize
      split = not where.is_fully_replicated
      return leaf.size * (2 * min(product, size) + size if split else 2 * size)

    sizes = jax.tree.map(of_leaf, params, placement.params(params))
    stock, members = placement.mesh.devices.shape
    models = config.merge.num_models // stock
    return sum(jax.tree.leaves(sizes)) * models * (members - 1) // members

  shardings = [placement, *_that_fit(config, placement, hbm_bytes)]
  return min(map(of_placement, shardings))


def _that_fit(
  config: config_lib.Config, placement: sharding.Placement, hbm_bytes: int
) -> Iterator[sharding.Placement]:
  """Yield the placements that send the least and fit by their estimates."""
  devices = list(placement.mesh.devices.flat)
  apart = auto.can_be_apart(config, devices)
  stock = config.merge.num_models if apart else config.mesh.stock
  for size in (0, memory.FSDP_MIN_SIZE):
    mesh = config_keys.Mesh(stock=stock, fsdp_min_size=size)
    candidate = config.model_copy(update={'mesh': mesh})
    needed = auto.needed_bytes(candidate, len(devices))
    if needed is not None and needed <= auto.SHARE * hbm_bytes:
      yield setup_lib.place(candidate, devices)
