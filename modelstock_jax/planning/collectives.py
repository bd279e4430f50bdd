"""The traffic between devices of a compiled program, read from its text.

XLA writes a collective with the partitions that take part in it. Here they are
converted to places in the mesh, which shows along which of its axes data moves:
models are separate if nothing moves along `stock`. What cannot be read with
certainty is an error; nothing is guessed.
"""

import collections
from collections.abc import Iterable
from collections.abc import Sequence
import itertools
import math
import re
from typing import Any
from typing import NamedTuple

from jax.sharding import Mesh
import numpy as np

from modelstock_jax.planning import hlo
from modelstock_jax.training import sharding

_GROUPED = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all')
_PERMUTE = 'collective-permute'
# The types of transfers between slices, which the network of their hosts links,
# and their names within a slice.
_MEGASCALE = {name.upper().replace('-', '_'): name for name in _GROUPED}
_MEGASCALE['ONE_TO_ONE'] = _PERMUTE
# The ids of the devices of a slice start at its number, from 1, times this.
_SLICE = 100_000

Group = tuple[int, ...]


class Collective(NamedTuple):
  """One instruction that moves data between devices.

  Attributes:
    name: of the instruction.
    kind: 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all' or
      'collective-permute', within a slice or between slices.
    axes: the mesh axes along which devices exchange data, in their order.
    crosses_slices: True if devices of different slices do.
    bytes: of the operands of one device, in one execution. How often these
      travel depends on kind and network.
    count: executions in a run of the program.
    exact: False where it is in a loop whose length is not known, for which
      `count` takes one turn.
    members: devices of its largest group.
    is_async: True if the device computes while data move.
  """

  name: str
  kind: str
  axes: tuple[str, ...]
  crosses_slices: bool
  bytes: int
  count: int
  exact: bool
  members: int
  is_async: bool

  @property
  def sent(self) -> int:
    """The bytes that a device sends in a run, if the devices form a ring.

    With n members, in units of `bytes`: n - 1 in an all-gather, 2 (n - 1) / n
    in an all-reduce, 1 in a permutation, (n - 1) / n in the others. No other
    algorithm sends less (Chan et al., Collective communication: theory,
    practice, and experience, 2007).
    """
    others = self.members - 1
    factors = {'all-gather': others * self.members, 'all-reduce': 2 * others}
    factors[_PERMUTE] = self.members
    factor = factors.get(self.kind, others)
    return self.bytes * self.count * factor // self.members


def read(text: str, mesh: Mesh) -> list[Collective]:
  """Read the collectives of a compiled program.

  Those in loops count as often as the loop turns, those in branches as if
  every branch were taken. Asynchronous ones count once. Groups of a single
  device move nothing and are left out.

  Args:
    text: what `compiled.as_text()` gives.
    mesh: that the program was compiled for.

  Returns:
    A list; a caller's come before those of what it calls.

  Raises:
    ValueError: something in it is not understood, or is not of this mesh.
  """
  module = hlo.parse(text)
  devices = _Devices.of(mesh, module.partitions)
  wrapped = {
    name
    for computation in module.computations.values()
    for instruction in computation.values()
    if instruction.opcode == 'async-start'
    for name in instruction.called
  }
  collectives = []
  for instruction, part, count, exact in hlo.executed(module, _is_collective):
    groups = [g for g in _groups(instruction, devices) if len(set(g)) > 1]
    if not groups:
      continue
    inputs = instruction.inputs
    if instruction.opcode == 'send':
      inputs = inputs[:1]  # the other one is a token
    computation = module.computations[part]
    size = sum(hlo.array_bytes(computation[name].shape) for name in inputs)
    kind, spans = _kind(instruction, part), devices.spans(groups)
    members = max(len(set(group)) for group in groups)
    # A start, or spread over fusions that compute.
    spread = instruction.attribute('chain_id') or part in wrapped
    is_async = bool(spread) or instruction.opcode.endswith(('-start', 'send'))
    collectives.append(
      Collective(
        instruction.name,
        kind,
        *spans,
        bytes=size,
        count=count,
        exact=exact,
        members=members,
        is_async=is_async,
      )
    )
  return collectives


def crossing(collectives: Iterable[Collective], axis: str) -> int:
  """Return the bytes that a device sends along a mesh axis.

  >>> moved = Collective(
  ...   'a', 'all-reduce', ('stock',), False, 8, 3, True, 2, False
  ... )
  >>> crossing([moved], 'stock'), crossing([moved], 'data')
  (24, 0)
  """
  return sum(c.bytes * c.count for c in collectives if axis in c.axes)


def crossing_slices(collectives: Iterable[Collective]) -> int:
  """Return the bytes that a device sends between slices."""
  return sum(c.bytes * c.count for c in collectives if c.crosses_slices)


def totals(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
  """Add up the collectives of one kind on the same axes, most bytes first."""
  groups = collections.defaultdict(list)
  for each in collectives:
    groups[each.kind, each.axes, each.crosses_slices].append(each)
  result = [
    {
      'kind': kind,
      'axes': list(axes),
      'crosses_slices': crosses_slices,
      'count': sum(each.count for each in group),
      'async_count': sum(each.count for each in group if each.is_async),
      'bytes': sum(each.count * each.bytes for each in group),
      'sent_bytes': sum(each.sent for each in group),
      'exact': all(each.exact for each in group),
    }
    for (kind, axes, crosses_slices), group in groups.items()
  ]
  return sorted(result, key=lambda total: -total['bytes'])


class _Devices(NamedTuple):
  """Devices by their place in the flat mesh.

  Attributes:
    axes: names of the axes of the mesh.
    where: int[axes + 1, devices], places along the axes, and the slice.
    partitions: places of each program that runs: one, or one for each slice.
    ids: a device's id to its place.
  """

  axes: tuple[str, ...]
  where: np.ndarray
  partitions: list[list[int]]
  ids: dict[int, int]

  @classmethod
  def of(cls, mesh: Mesh, partitions: int) -> '_Devices':
    flat = list(mesh.devices.flat)
    slices = np.array([sharding.slice_index(device) for device in flat])
    numbers = np.unique(slices)
    places = [np.flatnonzero(slices == number).tolist() for number in numbers]
    if partitions == len(flat):
      places = [list(range(len(flat)))]
    if any(len(part) != partitions for part in places):
      raise ValueError(
        f'The program is for {partitions} devices, the mesh has {len(flat)} in '
        f'{len(numbers)} slices.'
      )
    along = np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1)
    where = np.vstack([along, slices])
    ids = {device.id: place for place, device in enumerate(flat)}
    return cls(tuple(map(str, mesh.axis_names)), where, places, ids)

  def places(self, groups: Iterable[Group]) -> list[Group]:
    """Return groups of partitions as places; each program has them all."""
    return [
      tuple(part[i] for i in group)
      for group, part in itertools.product(groups, self.partitions)
    ]

  def spans(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], bool]:
    """Return the axes along which groups reach, and if they cross slices."""
    parts = [self.where[:, list(group)] for group in groups]
    *along, crosses = np.any(
      [(part != part[:, :1]).any(axis=1) for part in parts], axis=0
    )
    return tuple(itertools.compress(self.axes, along)), bool(crosses)


def _is_collective(instruction: hlo.Instruction) -> bool:
  """Return True if it moves data; raise if that is not known."""
  opcode = instruction.opcode.removesuffix('-start')
  if opcode in (*_GROUPED, _PERMUTE, 'send'):
    return True
  # A `recv` is of a send, which every partition executes as well.
  if opcode in ('recv', 'after-all') or opcode.endswith(('-done', '-update')):
    return False
  strange = opcode.startswith(('all-', 'collective-', 'ragged-'))
  if opcode == 'custom-call':
    sends = r'replica_groups=|has_communication\W+true'
    strange = bool(re.search(sends, instruction.attributes))
  if strange:
    raise hlo.unknown(instruction, 'this instruction')
  return False


def _kind(instruction: hlo.Instruction, computation: str) -> str:
  if instruction.opcode == 'send':
    kind = instruction.attribute('_xla_megascale_transfer_type')
    if kind not in _MEGASCALE:
      raise hlo.unknown(instruction, 'the type of this transfer')
    return _MEGASCALE[kind]
  kind = instruction.opcode.removesuffix('-start')
  # A TPU writes one as the other, and a slice of its result.
  scatters = computation.startswith('all-reduce-scatter')
  return 'reduce-scatter' if scatters and kind == 'all-reduce' else kind


def _groups(instruction: hlo.Instruction, devices: _Devices) -> list[Group]:
  """Return groups of devices that exchange data, as places."""
  if instruction.opcode == 'send':
    return _megascale_groups(instruction, devices)
  head, size = instruction.head, len(devices.partitions[0])
  if instruction.opcode.removesuffix('-start') == _PERMUTE:
    pairs = re.search(r'source_target_pairs=(\{.*?\}\}|\{\})', head)
    if pairs is None:
      raise hlo.unknown(instruction, 'between which devices it is')
    return devices.places(_braces(pairs[1]))
  if not instruction.attribute('channel_id'):
    raise hlo.unknown(instruction, 'a collective of replicas')
  try:
    groups = _replica_groups(head, size)
  except ValueError:
    raise hlo.unknown(instruction, 'the form of its groups') from None
  to_all = instruction.opcode.startswith('all-to-all')  # of partitions always
  if not (to_all or 'use_global_device_ids=true' in head):
    # Of replicas, of which there is one: with it go all of its partitions.
    if groups not in ([], [(0,)]):
      raise hlo.unknown(instruction, 'its groups of replicas')
    groups = []
  groups = groups or [tuple(range(size))]
  if sorted(itertools.chain(*groups)) != list(range(size)):
    raise hlo.unknown(instruction, f'its groups of {size} devices')
  return devices.places(groups)


_IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # [2,4]T(1,0)


def _replica_groups(head: str, size: int) -> list[Group]:
  """Return groups of partitions, written in any of three forms."""
  if form := re.search(r'replica_groups=(\{\}|\{\{[\d,{} ]*\}\})', head):
    return _braces(form[1])
  if form := re.search(rf'replica_groups=\[(\d+,\d+)\]<={_IOTA}(?=,|$)', head):
    table = _iota(form[2], form[3]).reshape(_integers(form[1]))
    return list(map(tuple, table.tolist()))
  mesh = r'mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}'
  if form := re.search(f'replica_groups={mesh}', head):
    return _mesh_groups(form[1], form[2], form[3], size)
  raise ValueError


def _braces(text: str) -> list[Group]:
  """Read {{0,1},{2,3}}."""
  groups = re.findall(r'\{([\d, ]+)\}', text)
  return [tuple(_integers(group)) for group in groups]


def _iota(shape: str, order: str | None) -> np.ndarray:
  """Count from 0 in a shape, turned as [2,4]T(1,0) says."""
  table = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
  return table.transpose(_integers(order)) if order else table


def _mesh_groups(
  sizes: str, devices: str | None, axes: str, size: int
) -> list[Group]:
  """Read mesh['a'=2,'b'=4] {'a','b':(1)2}: along a, and a part of b."""
  order = np.arange(size)
  if devices is not None:
    iota = re.fullmatch(_IOTA, devices)
    if iota is None:
      raise ValueError
    order = _iota(iota[1], iota[2])
  wanted = {
    name: (int(before or 1), int(length or 0))
    for name, before, length in re.findall(
      r"([\w.\-]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes
    )
  }
  parts: list[int] = []  # sizes of all axes, cut where a part begins or ends
  along = []  # places of the parts that are wanted
  for name, length in re.findall(r"([\w.\-]+)'?=(\d+)", sizes):
    before, size_of_part = wanted.get(name, (1, 1))
    if name in wanted:
      along.append(len(parts) + 1)
    size_of_part = size_of_part or int(length)
    parts += [before, size_of_part, int(length) // (before * size_of_part)]
  if len(along) != len(wanted):
    raise ValueError
  table = np.moveaxis(order.reshape(parts), along, range(-len(along), 0))
  members = math.prod(parts[i] for i in along)
  return list(map(tuple, table.reshape(-1, members).tolist()))


def _megascale_groups(
  instruction: hlo.Instruction, devices: _Devices
) -> list[Group]:
  """Return the groups of a transfer between slices, which names ids."""
  handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
  if handler not in instruction.head:
    raise hlo.unknown(instruction, 'where it sends to')
  target = instruction.head.partition('_xla_megascale_target=')[2]
  if product := re.match(r'"\{([\d,]+)\}x\{(\d+):(\d+)\}"', target):
    # Devices of one number, in each of these slices.
    first, last = int(product[2]), int(product[3])
    groups = [
      tuple(number * _SLICE + i for number in _integers(product[1]))
      for i in range(first, last + 1)
    ]
  elif pairs := re.match(r'\{(\{\d+(->\d+|(,\d+)*)\},?)+\}', target):
    groups = _braces(pairs[0].replace('->', ','))
  else:
    raise hlo.unknown(instruction, 'the form of its target')
  strange = {i for group in groups for i in group} - devices.ids.keys()
  if strange:
    raise ValueError(
      f'%{instruction.name}: sends to devices {sorted(strange)[:4]}, which are '
      'not of this mesh.'
    )
  return [tuple(devices.ids[i] for i in group) for group in groups]


def _integers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]
