"""A parser of the text of compiled programs: instructions and their counts."""

from collections.abc import Callable
from collections.abc import Iterator
import math
import re
from typing import NamedTuple

# Bits of an element; others are an error.
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_NUMBER = re.compile(r'(?:s|u|f|bf|c)(\d+)(?:e\w+)?$')  # f32, bf16, f8e4m3fn

_COMPUTATION = re.compile(
  r'^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}', re.MULTILINE | re.DOTALL
)
_INSTRUCTION = re.compile(
  r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)', re.MULTILINE
)

# Opcodes of a loop that counts: its test, the counter, its state before and
# after a turn, the sum, the counter again, and start, limit and step.
_COUNTED = (
  *('compare', 'get-tuple-element', 'tuple', 'tuple', 'add'),
  *('get-tuple-element', 'constant', 'constant', 'constant'),
)


class Instruction(NamedTuple):
  """A line of the text, whose attributes are parsed when they are read."""

  name: str
  shape: str
  opcode: str
  operands: str
  attributes: str
  is_root: bool = False

  @property
  def head(self) -> str:
    """The attributes without those that hold free text."""
    return re.split(r', (?:metadata|backend_config)=', self.attributes)[0]

  @property
  def inputs(self) -> list[str]:
    """Names of the instructions whose results it takes."""
    return re.findall(r'%([\w.\-]+)', self.operands)

  @property
  def called(self) -> list[str]:
    """Names of the computations that are executed as part of it."""
    keys = r'\b(?:calls|to_apply|body|condition|\w+_computations?)'
    values = re.findall(rf'{keys}=(\{{.*?\}}|[^,{{}}]+)', self.head)
    return re.findall(r'[\w.\-]+', ' '.join(values))

  def attribute(self, key: str) -> str:
    """Return the value of one that is a name or a number, '' if absent."""
    value = re.search(rf'\b{key}=["%]?([\w.\-]+)', self.head)
    return value[1] if value else ''


Computation = dict[str, Instruction]


class Module(NamedTuple):
  """A program: its computations by name, and the one that runs first."""

  partitions: int
  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Parse a text into computations and instructions.

  Args:
    text: what `compiled.as_text()` gives.

  Returns:
    The program.

  Raises:
    ValueError: it is not the text of a single program of `jax.jit`.
  """
  headers = re.findall(r'^HloModule .*', text, re.MULTILINE)
  computations, entry = {}, ''
  for first, name, body in _COMPUTATION.findall(text):
    entry = name if first else entry
    computations[name] = {
      line[1]: _instruction(*line) for line in _INSTRUCTION.findall(body)
    }
  if len(headers) != 1 or not entry:
    raise ValueError('This is not the text of one compiled program.')
  replicas, partitions = (
    int((re.findall(rf'\b{key}=(\d+)', headers[0]) or [1])[0])
    for key in ('replica_count', 'num_partitions')
  )
  if replicas > 1:
    raise ValueError(
      f'The program has {replicas} replicas; only those of jax.jit, whose '
      'devices are partitions, are understood.'
    )
  return Module(partitions, computations, entry)


def _instruction(
  root: str, name: str, shape: str, opcode: str, rest: str
) -> Instruction:
  depth = 1
  for bracket in re.finditer(r'[()]', rest):
    depth += 1 if bracket[0] == '(' else -1
    if not depth:
      operands, attributes = rest[: bracket.start()], rest[bracket.end() :]
      return Instruction(name, shape, opcode, operands, attributes, bool(root))
  raise ValueError(f'%{name} = {opcode}({rest[:80]}: a bracket is not closed.')


def executed(
  module: Module, wanted: Callable[[Instruction], bool]
) -> Iterator[tuple[Instruction, str, int, bool]]:
  """Yield every instruction of some kind that a run of the program executes.

  Args:
    module: the program.
    wanted: True for these instructions, whose own calls are not followed.

  Yields:
    An instruction, the name of its computation, its executions in a run of the
    program, and False if it is in a loop whose length is not known, which
    counts once. Those of a caller come before those of what it calls.

  Raises:
    ValueError: one of them is in a computation that nothing calls.
  """
  chains, seen = set(), set()
  waiting = [(module.entry, 1, True)]
  while waiting:
    name, count, exact = waiting.pop()
    seen.add(name)
    inner = []
    for instruction in module.computations[name].values():
      if instruction.opcode.endswith(('-done', '-update')):
        continue
      if wanted(instruction):
        # A TPU spreads one over several fusions, each of which names it.
        chain = instruction.attribute('chain_id')
        key = (instruction.attribute('channel_id'), chain)
        if not chain or key not in chains:
          yield instruction, name, count, exact
        chains.add(key)
        continue
      turns = 1
      if instruction.opcode == 'while':
        turns = _turns(module, module.computations[name], instruction)
      known = exact and turns is not None
      times = count * (1 if turns is None else turns)
      inner += [(called, times, known) for called in instruction.called]
    waiting += reversed(inner)
  for name in module.computations.keys() - seen:
    for instruction in filter(wanted, module.computations[name].values()):
      raise unknown(instruction, 'what executes it')


def _turns(
  module: Module, outside: Computation, loop: Instruction
) -> int | None:
  """Return the turns of a loop, or None if they are not known.

  XLA writes them as `known_trip_count`, except on TPUs. There a loop of
  `lax.scan` compares a counter, an element of its state, with a constant.
  """
  written = re.search(
    r'known_trip_count\W+n\W+(\d+)', loop.attributes.replace('\\', '')
  )
  if written:
    return int(written[1])
  condition, body = (
    module.computations[loop.attribute(key)] for key in ('condition', 'body')
  )
  test, after = (
    next(i for i in part.values() if i.is_root) for part in (condition, body)
  )
  try:
    counter, limit = (_origin(condition, name) for name in test.inputs)
    index = int(counter.attribute('index'))
    before = _origin(outside, loop.inputs[0])
    start = _origin(outside, before.inputs[index])
    add = _origin(body, after.inputs[index])
    element, step = (_origin(body, name) for name in add.inputs)
    numbers = [int(part.operands) for part in (start, limit, step)]
  except (IndexError, ValueError):
    return None
  parts = (test, counter, before, after, add, element, start, limit, step)
  if (
    tuple(part.opcode for part in parts) != _COUNTED
    or test.attribute('direction') != 'LT'
    or element.attribute('index') != str(index)
    or numbers[2] < 1
  ):
    return None
  return len(range(*numbers))


def _origin(computation: Computation, name: str) -> Instruction:
  """Return what an instruction is a copy of."""
  instruction = computation[name]
  while instruction.opcode in ('copy', 'bitcast'):
    instruction = computation[instruction.inputs[0]]
  return instruction


def array_bytes(shape: str) -> int:
  """Return the bytes of an array, or of all those of a tuple, unpadded.

  >>> array_bytes('(bf16[3,5]{1,0:T(8,128)(2,1)}, pred[2], s4[3], token[])')
  34
  """
  total = 0
  for dtype, dims in re.findall(r'\b([a-z]\w*)\[([\d,<=]*)\]', shape):
    number = _NUMBER.match(dtype)
    bits = int(number[1]) if number else _BITS.get(dtype)
    if bits is None:
      raise ValueError(f'{dtype}[{dims}]: this type is not known.')
    sizes = [int(n.lstrip('<=')) for n in dims.split(',') if n]
    total += -(-math.prod(sizes) * bits // 8)
  return total


def unknown(instruction: Instruction, what: str) -> ValueError:
  """Return an error about what cannot be read with certainty."""
  text = f'%{instruction.name} = {instruction.opcode}(...){instruction.head}'
  return ValueError(
    f'A compiled program cannot be read: {what} is not understood in '
    f'{text[:300]}'
  )
