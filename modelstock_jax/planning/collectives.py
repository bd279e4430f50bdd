"""What a compiled program sends between devices, read from its text.

XLA writes a collective with the partitions that take part in it. Here they
become places in the mesh, so that one can say along which of its axes data
moves: nothing along `stock` is what keeps models apart. What cannot be read
with certainty is an error; nothing is guessed.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import itertools
import math
import re
from typing import NamedTuple

from jax.sharding import Mesh
import numpy as np

from modelstock_jax.planning import hlo
from modelstock_jax.training import sharding

_GROUPED = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
)
_PERMUTE = 'collective-permute'
# Of a program on several slices, which are linked by the network of their
# hosts: the transfer's type, and what it is called within a slice.
_MEGASCALE = {
  'ALL_REDUCE': 'all-reduce',
  'ALL_GATHER': 'all-gather',
  'REDUCE_SCATTER': 'reduce-scatter',
  'ALL_TO_ALL': 'all-to-all',
  'ONE_TO_ONE': _PERMUTE,
}

Group = tuple[int, ...]


class Collective(NamedTuple):
  """One instruction that moves data between devices.

  Attributes:
    name: of the instruction.
    kind: 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all' or
      'collective-permute', within a slice or between slices.
    axes: the mesh axes along which devices exchange data, in their order.
    crosses_slices: whether devices of different slices do.
    bytes: of the operands of one device, in one execution: what a device puts
      in. How often that travels depends on kind and network.
    count: executions in a run of the program.
    exact: False where it is in a loop whose length is not known, for which
      `count` takes one turn.
  """

  name: str
  kind: str
  axes: tuple[str, ...]
  crosses_slices: bool
  bytes: int
  count: int
  exact: bool


def read(text: str, mesh: Mesh) -> list[Collective]:
  """The collectives of a compiled program.

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
  found = []
  for place, instruction in hlo.executed(module, _is_collective):
    groups = _groups(instruction, devices)
    groups = [g for g in groups if len(set(g)) > 1]
    if not groups:
      continue
    found.append(
      Collective(
        name=instruction.name,
        kind=_kind(instruction, place.computation),
        axes=devices.axes(groups),
        crosses_slices=devices.cross(groups),
        bytes=_operand_bytes(instruction, place.computation),
        count=place.count,
        exact=place.exact,
      )
    )
  return found


def crossing(collectives: Iterable[Collective], axis: str) -> int:
  """Bytes that a device puts into collectives along a mesh axis.

  >>> moved = Collective('a', 'all-reduce', ('stock',), False, 8, 3, True)
  >>> crossing([moved], 'stock'), crossing([moved], 'data')
  (24, 0)
  """
  return sum(c.bytes * c.count for c in collectives if axis in c.axes)


def crossing_slices(collectives: Iterable[Collective]) -> int:
  """Bytes that a device puts into collectives between slices."""
  return sum(c.bytes * c.count for c in collectives if c.crosses_slices)


class _Devices(NamedTuple):
  """Devices by their place in the flat mesh."""

  mesh: Mesh
  ids: dict[int, int]  # a device's id to its place
  slices: np.ndarray  # of each place
  partitions: list[list[int]]  # places, of each program that runs

  @classmethod
  def of(cls, mesh: Mesh, partitions: int) -> '_Devices':
    flat = list(mesh.devices.flat)
    slices = np.array([sharding.slice_index(device) for device in flat])
    places = [list(range(len(flat)))]
    if partitions != len(flat):  # one program for each slice
      places = [
        np.flatnonzero(slices == number).tolist()
        for number in np.unique(slices)
      ]
    if any(len(part) != partitions for part in places):
      raise ValueError(
        f'The program is for {partitions} devices, the mesh has {len(flat)} in '
        f'{len(np.unique(slices))} slices.'
      )
    ids = {device.id: place for place, device in enumerate(flat)}
    return cls(mesh, ids, slices, places)

  @property
  def size(self) -> int:
    """Partitions of one program."""
    return len(self.partitions[0])

  def places(self, groups: Iterable[Group]) -> list[Group]:
    """Of groups of partitions; each program has them all."""
    return [
      tuple(part[i] for i in group)
      for group, part in itertools.product(groups, self.partitions)
    ]

  def axes(self, groups: Sequence[Group]) -> tuple[str, ...]:
    names, shape = self.mesh.axis_names, self.mesh.devices.shape
    differ = np.zeros(len(shape), bool)
    for group in groups:
      where = np.array(np.unravel_index(group, shape))
      differ |= (where != where[:, :1]).any(axis=1)
    return tuple(
      str(name) for name, found in zip(names, differ, strict=True) if found
    )

  def cross(self, groups: Sequence[Group]) -> bool:
    return any(len(set(self.slices[list(g)])) > 1 for g in groups)


def _is_collective(instruction: hlo.Instruction) -> bool:
  """Whether it sends; an error if it might in a way that is not known."""
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


def _kind(instruction: hlo.Instruction, computation: hlo.Computation) -> str:
  if instruction.opcode == 'send':
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.head)
    if found is None or found[1] not in _MEGASCALE:
      raise hlo.unknown(instruction, 'the type of this transfer')
    return _MEGASCALE[found[1]]
  kind = instruction.opcode.removesuffix('-start')
  # A TPU writes one as the other, and a slice of its result.
  scatters = computation.name.startswith('all-reduce-scatter')
  return 'reduce-scatter' if scatters and kind == 'all-reduce' else kind


def _operand_bytes(
  instruction: hlo.Instruction, computation: hlo.Computation
) -> int:
  names = instruction.operand_names()
  if instruction.opcode == 'send':
    names = names[:1]  # the other one is a token
  shapes = (computation.instructions[name].shape for name in names)
  return sum(map(hlo.array_bytes, shapes))


def _groups(instruction: hlo.Instruction, devices: _Devices) -> list[Group]:
  """Devices that exchange data, as places in the flat mesh."""
  if instruction.opcode == 'send':
    return _megascale_groups(instruction, devices)
  head, size = instruction.head, devices.size
  if instruction.opcode.removesuffix('-start') == _PERMUTE:
    found = re.search(r'source_target_pairs=(\{.*?\}\}|\{\})', head)
    if found is None:
      raise hlo.unknown(instruction, 'between which devices it is')
    return devices.places(_braces(found[1]))
  if instruction.attribute('channel_id') is None:
    raise hlo.unknown(instruction, 'a collective of replicas')
  groups = _replica_groups(instruction, size)
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


def _replica_groups(instruction: hlo.Instruction, size: int) -> list[Group]:
  """Groups of partitions, in any of the forms that they are written in."""
  head = instruction.head
  if found := re.search(r'replica_groups=(\{\}|\{\{[\d,{} ]*\}\})', head):
    return _braces(found[1])
  iota = r'replica_groups=\[(\d+,\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?(?=,|$)'
  if found := re.search(iota, head):
    table, shape = _iota(found[2], found[3]), _integers(found[1])
    if table.size == math.prod(shape):
      return [tuple(row) for row in table.reshape(shape).tolist()]
  found = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}',
    head,
  )
  if found:
    groups = _mesh_groups(found[1], found[2], found[3], size)
    if groups is not None:
      return groups
  raise hlo.unknown(instruction, 'the form of its groups')


def _braces(text: str) -> list[Group]:
  """{{0,1},{2,3}}."""
  return [
    tuple(int(n) for n in group.split(',') if n)
    for group in re.findall(r'\{([\d, ]*)\}', text)
    if group
  ]


def _iota(source: str, order: str | None) -> np.ndarray:
  """[2,4]T(1,0): 0, 1, ... in that shape, turned."""
  shape = _integers(source)
  table = np.arange(math.prod(shape)).reshape(shape)
  return table.transpose(_integers(order)) if order else table


def _mesh_groups(
  sizes: str, devices: str | None, axes: str, size: int
) -> list[Group] | None:
  """mesh['a'=2,'b'=4] {'a','b':(1)2}: along a, and along a part of b."""
  mesh = re.findall(r"'?([\w.\-]+)'?=(\d+)", sizes)
  order = np.arange(size)
  if devices is not None:
    found = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', devices)
    if found is None:
      return None
    order = _iota(found[1], found[2])
  parts = []  # the sizes of all axes, cut where a part begins or ends
  along = []  # those of the parts that are meant
  named = {}
  for axis in hlo.split(axes):
    found = re.fullmatch(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", axis)
    if found is None or found[1] in named:
      return None
    named[found[1]] = found
  for name, length in mesh:
    found = named.pop(name, None)
    length = int(length)
    if found is None:
      parts.append(length)
      continue
    before, own = int(found[2] or 1), int(found[3] or length)
    if length % (before * own):
      return None
    along.append(len(parts) + 1)
    parts += [before, own, length // (before * own)]
  if named or not along or not math.prod(parts) == order.size == size:
    return None
  table = order.reshape(parts)
  table = np.moveaxis(table, along, range(-len(along), 0))
  members = math.prod(parts[i] for i in along)
  return [tuple(row) for row in table.reshape(-1, members).tolist()]


def _megascale_groups(
  instruction: hlo.Instruction, devices: _Devices
) -> list[Group]:
  """Of a transfer between slices; it names devices by their ids."""
  handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
  if handler not in instruction.head:
    raise hlo.unknown(instruction, 'where it sends to')
  found = re.search(
    r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})', instruction.head
  )
  target = found[1] if found else ''
  if product := re.fullmatch(r'"\{([\d,]+)\}x\{(\d+):(\d+)\}"', target):
    # Devices of one number, in each of these slices.
    first, last = int(product[2]), int(product[3])
    slices = _integers(product[1])
    groups = [
      tuple(number * _SLICE + i for number in slices)
      for i in range(first, last + 1)
    ]
  elif re.fullmatch(r'\{(\{\d+(->\d+|(,\d+)*)\},?)+\}', target):
    groups = _braces(target.replace('->', ','))
  else:
    raise hlo.unknown(instruction, 'the form of its target')
  strange = {i for group in groups for i in group} - devices.ids.keys()
  if strange:
    raise ValueError(
      f'%{instruction.name}: sends to devices {sorted(strange)[:4]}, which are '
      'not of this mesh.'
    )
  return [tuple(devices.ids[i] for i in group) for group in groups]


# The ids of the devices of a slice start at its number, counted from 1, times
# this.
_SLICE = 100_000


def _integers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]
