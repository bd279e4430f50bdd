"""Where arrays live: a mesh with one axis for the models, one for the data."""

from typing import Any
from typing import NamedTuple

import jax
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
  devices = jax.devices()
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
