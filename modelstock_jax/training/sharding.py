"""Where arrays live: a mesh with one axis for the models, one for the data."""

from collections.abc import Iterable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from modelstock_jax.training import state as state_lib

STOCK = 'stock'
DATA = 'data'


class Placement(NamedTuple):
  """Shardings of everything a run holds, over one mesh.

  With as many devices along `stock` as there are models, each model has
  devices of its own and a training step moves nothing between models; with
  one, every device advances all models on its share of the data.
  """

  mesh: Mesh

  @property
  def stack(self) -> NamedSharding:
    """Of leaves `[N, ...]`: models over `stock`, whole over `data`."""
    return NamedSharding(self.mesh, PartitionSpec(STOCK))

  @property
  def batch(self) -> NamedSharding:
    """Of training batches `[N, B, ...]`."""
    return NamedSharding(self.mesh, PartitionSpec(STOCK, DATA))

  @property
  def examples(self) -> NamedSharding:
    """Of evaluation batches `[B, ...]`: over all devices."""
    return NamedSharding(self.mesh, PartitionSpec((STOCK, DATA)))

  @property
  def replicated(self) -> NamedSharding:
    """Of what every device holds whole: the anchor, the merge, metrics."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def state(self) -> Any:
    """Of a `StockState`: a prefix of its tree, with shardings for leaves."""
    fields: dict[str, Any] = dict.fromkeys(
      state_lib.StockState._fields, self.stack
    )
    fields['step'] = self.replicated
    return state_lib.StockState(**fields)


def place(*, stock: int, num_models: int, batch_size: int) -> Placement:
  """Lays all devices out for N models.

  Args:
    stock: devices along the stack: 1, or N for devices of each model's own.
    num_models: N.
    batch_size: examples of each model in a step; spread over `data`.

  Returns:
    A `Placement` on a mesh ('stock', 'data').

  Raises:
    ValueError: if the devices or the batch do not divide, naming what does.
  """
  # The devices of a process side by side, so that it reads whole rows.
  devices = sorted(jax.devices(), key=lambda device: device.process_index)
  if stock not in (1, num_models):
    raise ValueError(
      f'mesh.stock: must be 1 or merge.num_models ({num_models}), got {stock}.'
    )
  if len(devices) % stock:
    raise ValueError(
      f'mesh.stock: {num_models} models do not divide {len(devices)} devices; '
      'use mesh.stock=1, or a number of models that divides them.'
    )
  data = len(devices) // stock
  if batch_size % data:
    near = [batch_size - batch_size % data, batch_size - batch_size % -data]
    raise ValueError(
      f'train.batch_size: {batch_size} examples do not divide over {data} '
      f'devices; the nearest that do are {[n for n in near if n]}.'
    )
  # `jax.make_mesh` makes Explicit axes unless told; the step is for Auto ones.
  grid = np.asarray(devices).reshape(stock, data)
  mesh = Mesh(grid, (STOCK, DATA), axis_types=(AxisType.Auto,) * 2)
  return Placement(mesh)


def local_models_and_rows(
  placement: Placement, num_models: int, batch_size: int
) -> tuple[range, slice]:
  """What this process reads of a training batch `[N, B, ...]`.

  Args:
    placement: over the devices of all processes.
    num_models: N.
    batch_size: B.

  Returns:
    The models and the rows of each that its devices hold.

  Raises:
    ValueError: they are not the same rows of every model.
  """
  models, rows = _block(
    placement.batch.addressable_devices_indices_map(
      (num_models, batch_size)
    ).values(),
    (num_models, batch_size),
  )
  return models, slice(rows.start, rows.stop)


def local_rows(placement: Placement, batch_size: int) -> slice:
  """What this process reads of an evaluation batch `[B, ...]`, likewise."""
  (rows,) = _block(
    placement.examples.addressable_devices_indices_map((batch_size,)).values(),
    (batch_size,),
  )
  return slice(rows.start, rows.stop)


def to_global(batch: Any, where: NamedSharding) -> Any:
  """Makes arrays of all processes from what each of them has read.

  Args:
    batch: a tree of numpy arrays: the models and rows of this process, as
      `local_models_and_rows` or `local_rows` say.
    where: the placement's `batch` or `examples`.

  Returns:
    The tree of arrays over all devices. Their copies are under way.
  """
  return jax.tree.map(
    lambda array: jax.make_array_from_process_local_data(where, array), batch
  )


def everywhere(found: bool) -> bool:
  """Whether all processes have found something: they use it all, or none."""
  if jax.process_count() == 1:
    return found
  return bool(multihost_utils.process_allgather(np.array(found)).all())


def _block(
  indices: Iterable[Sequence[slice] | None], shape: tuple[int, ...]
) -> tuple[range, ...]:
  """The block of an array that these parts make up; an error if none."""
  parts = {
    tuple(
      range(length)[part] for part, length in zip(index, shape, strict=True)
    )
    for index in indices
    if index is not None
  }
  block = tuple(
    range(min(r.start for r in along), max(r.stop for r in along))
    for along in zip(*parts, strict=True)
  )
  held = sum(math.prod(map(len, part)) for part in parts)
  if held < math.prod(map(len, block)):
    raise ValueError(
      'mesh.stock: the devices of this process hold different rows of '
      'different models, which cannot be read as one block; use mesh.stock=1.'
    )
  return block
