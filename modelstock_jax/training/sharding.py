"""Placement of arrays: a mesh with an axis for models and one for data."""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from modelstock_jax.training import state as state_lib

STOCK = 'stock'
DATA = 'data'


class Placement(NamedTuple):
  """Shardings of all arrays of a run, over one mesh.

  With as many devices along `stock` as there are models, each model has
  devices of its own and a training step moves nothing between models; with
  one, every device advances all models on its share of the data.

  With `fsdp_min_size`, weights and moments are spread over `data` as well
  (fully sharded data parallelism): a leaf with at least this many elements is
  split along its largest axis that the devices divide; smaller leaves, whose
  exchange would cost more than their memory, are replicated.
  """

  mesh: Mesh
  fsdp_min_size: int = 0  # elements of one model's leaf; 0 splits none

  @property
  def stack(self) -> NamedSharding:
    """Sharding of arrays `[N]`, and of leaves `[N, ...]` with no split."""
    return self._on(STOCK)

  @property
  def batch(self) -> NamedSharding:
    """Sharding of training batches `[N, B, ...]`."""
    return self._on(STOCK, DATA)

  @property
  def rows(self) -> NamedSharding:
    """Sharding of one model's batch `[B, ...]` within a mapped step."""
    return self._on(DATA)

  @property
  def examples(self) -> NamedSharding:
    """Sharding of evaluation batches `[B, ...]`: over all devices."""
    return self._on((STOCK, DATA))

  @property
  def replicated(self) -> NamedSharding:
    """Sharding of arrays that every device holds entirely."""
    return self._on()

  def params(self, tree: Any) -> Any:
    """Return shardings of one model's leaves `[...]`, such as the anchor's."""
    return jax.tree.map(lambda x: self._on(*self._split(x.shape)), tree)

  def stacked(self, tree: Any) -> Any:
    """Return shardings of leaves `[N, ...]`, split as those of one model."""
    return jax.tree.map(
      lambda x: self._on(STOCK, *self._split(x.shape[1:])), tree
    )

  def state(self, state: state_lib.State) -> state_lib.State:
    """Return shardings of a state, or of its shapes."""
    step: Any = self.replicated
    key: Any = self.stack
    params, variables, opt_state = self.stacked(
      (state.params, state.variables, state.opt_state)
    )
    return state_lib.State(step, params, variables, opt_state, key)

  def pin(self, tree: Any, shardings: Any) -> Any:
    """Fix where arrays are in the middle of a program."""
    if self.mesh.size == 1:  # where it would only hinder the compiler
      return tree
    return jax.lax.with_sharding_constraint(tree, shardings)

  def _on(self, *axes: Any) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*axes))

  def _split(self, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the mesh axis of each axis of one model's leaf."""
    # Without FSDP the mesh may have another axis than `data`.
    if not self.fsdp_min_size or math.prod(shape) < self.fsdp_min_size:
      return ()
    devices = self.mesh.shape[DATA]
    sizes = [0 if n % devices else n for n in shape]
    if not any(sizes):
      return ()
    largest = sizes.index(max(sizes))
    return tuple(DATA if i == largest else None for i in range(len(shape)))


def place(
  *,
  stock: int = 1,
  batch_size: int = 0,
  fsdp_min_size: int = 0,
  accumulate: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Placement:
  """Lay all devices out for N models.

  Neighbours in the mesh are of one process, and processes of one slice. So
  each process reads whole rows of a batch; and where `stock` is N and the
  slices (or hosts) divide by N, each model has slices (or hosts) of its own:
  the network between them carries nothing until the models are merged.

  Args:
    stock: devices along the stack: 1, or N to give each model its devices.
    batch_size: examples of each model in a step; spread over `data`. 0 if
      there is no such step, as where models are only evaluated.
    fsdp_min_size: see `Placement`.
    accumulate: parts that the batch is cut into, one after the other.
    devices: to be used; None for all.

  Returns:
    A `Placement` on a mesh ('stock', 'data').

  Raises:
    ValueError: if the devices or the batch do not divide, naming what does.
  """
  devices = sorted(jax.devices() if devices is None else devices, key=_position)
  if len(devices) % stock:
    raise ValueError(
      f'mesh.stock: {stock} models do not divide {len(devices)} devices; '
      'use mesh.stock=1, or a number of models that divides them.'
    )
  data = len(devices) // stock
  if batch_size % (data * accumulate):
    raise ValueError(
      f'train.batch_size: {batch_size} examples do not divide over {data} '
      f'devices in train.accumulate={accumulate} parts; use a multiple of '
      f'{data * accumulate}.'
    )
  # `jax.make_mesh` makes Explicit axes unless told; the step is for Auto ones.
  grid = np.asarray(devices).reshape(stock, data)
  mesh = Mesh(grid, (STOCK, DATA), axis_types=(AxisType.Auto,) * 2)
  return Placement(mesh, fsdp_min_size)


def can_separate(devices: Sequence[jax.Device], num_models: int) -> bool:
  """Return True if `place` can give each model devices of its own.

  That is, if N models divide the devices, and no host or slice that shares a
  model with others has a part of a further model.
  """
  if len(devices) % num_models:
    return False
  grid = np.asarray(sorted(devices, key=_position)).reshape(num_models, -1)
  for owner in (slice_index, lambda device: device.process_index):
    owners = [{*map(owner, row)} for row in grid]
    pairs = itertools.permutations(owners, 2)
    if any(len(shared) > 1 and shared & other for shared, other in pairs):
      return False
  return True


def _position(device: jax.Device) -> tuple[int, int, int]:
  return slice_index(device), device.process_index, device.id


def slice_index(device: jax.Device) -> int:
  """Return the slice of a TPU that a device is on; 0 where there are none."""
  return getattr(device, 'slice_index', None) or 0


def exchange(placement: Placement, stack: Any) -> list[Any]:
  """Bring the models of a stack together, each device keeping its part.

  Every device sends its part of its model once to each of the other models'
  devices; with one device along `stock` nothing moves. Left to itself the
  partitioner would gather, or send the same part several times.

  Args:
    placement: where the stack lives.
    stack: leaves `[N, ...]`, as `placement.stacked` lays them out.

  Returns:
    N trees with leaves `[...]`, as `placement.params` lays them out: on every
    device the same part of all models.
  """
  number = placement.mesh.shape[STOCK]
  if number == 1:
    models = jax.tree.leaves(stack)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(models)]

  def exchange_parts(stack):
    here = jax.lax.axis_index(STOCK)
    model = jax.tree.map(lambda x: x[0], stack)
    shifted = [model]  # the k-th is the model of k places before
    for k in range(1, number):
      pairs = [(i, (i + k) % number) for i in range(number)]
      shifted.append(jax.lax.ppermute(model, STOCK, pairs))

    def select(index, *parts):
      return jax.lax.select_n((here - index) % number, *parts)

    return [
      jax.tree.map(functools.partial(select, index), *shifted)
      for index in range(number)
    ]

  specs = jax.tree.map(lambda x: placement.stacked(x).spec, stack)
  of_model = jax.tree.map(
    lambda x: PartitionSpec(*placement.stacked(x).spec[1:]), stack
  )
  return jax.shard_map(
    exchange_parts,
    mesh=placement.mesh,
    in_specs=(specs,),
    out_specs=[of_model] * number,
    check_vma=False,  # it cannot know that all devices select the same
  )(stack)


def sum_over_data(placement: Placement, tree: Any) -> Any:
  """Sum what each device along `data` has, straight into parts.

  Args:
    placement: where the result lives.
    tree: leaves `[devices, ...]` of one model, each on its device.

  Returns:
    Leaves `[...]`, as `placement.params` lays them out.
  """
  number = placement.mesh.shape[DATA]

  def sum_leaf(leaf, spec):
    leaf = leaf[0]
    if DATA not in spec:
      return jax.lax.psum(leaf, DATA)
    # Along a leading axis, or a TPU may sum all of it, and take its part.
    axis = spec.index(DATA)
    shape = (*leaf.shape[:axis], number, -1, *leaf.shape[axis + 1 :])
    parts = jnp.moveaxis(leaf.reshape(shape), axis, 0)
    return jax.lax.psum_scatter(parts, DATA)

  specs = jax.tree.map(
    lambda x: PartitionSpec(*placement._split(x.shape[1:])), tree
  )
  return jax.shard_map(
    lambda tree: jax.tree.map(sum_leaf, tree, specs),
    mesh=placement.mesh,
    in_specs=PartitionSpec(DATA),
    out_specs=specs,
    check_vma=False,
  )(tree)


def local_block(
  sharding: NamedSharding, shape: tuple[int, ...]
) -> tuple[range, ...]:
  """Return the part of a global batch that this process reads.

  Args:
    sharding: the placement's `batch` or `examples`.
    shape: (N, B) of a training batch, (B,) of an evaluation batch.

  Returns:
    The models, if there is such an axis, and the rows that the devices of
    this process hold.

  Raises:
    ValueError: they are not the same rows of every model.
  """
  indices = sharding.addressable_devices_indices_map(shape).values()
  parts = {
    tuple(range(n)[part] for part, n in zip(index or (), shape, strict=True))
    for index in indices
  }
  block = tuple(
    range(min(r.start for r in along), max(r.stop for r in along))
    for along in zip(*parts, strict=True)
  )
  covered = sum(math.prod(map(len, part)) for part in parts)
  if covered < math.prod(map(len, block)):
    raise ValueError(
      'mesh.stock: the devices of this process hold different rows of '
      'different models, which cannot be read as one block; use mesh.stock=1.'
    )
  return block


def to_global(batch: Any, where: NamedSharding) -> Any:
  """Make arrays of all processes from what each of them has read.

  Args:
    batch: a tree of numpy arrays: the models and rows of this process, see
      `local_block`.
    where: the placement's `batch` or `examples`.

  Returns:
    The tree of arrays over all devices. Their copies are under way.
  """
  return jax.tree.map(
    lambda array: jax.make_array_from_process_local_data(where, array), batch
  )
