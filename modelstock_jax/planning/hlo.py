"""The text of a compiled program, taken apart: what runs, and how often."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import math
import re
from typing import NamedTuple

# Bits of an element; others are an error.
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_NUMBER = re.compile(r'(?:s|u|f|bf|c)(\d+)(?:e\w+)?$')  # f32, bf16, f8e4m3fn

# Element k of a loop's state, or nothing, plus a constant; (None, None) is what
# cannot be told.
_Integer = tuple[int | None, int | None]


class Instruction(NamedTuple):
  """A line of the text; what stands in it is read when asked for."""

  name: str
  shape: str
  opcode: str
  operands: str
  attributes: str

  @property
  def head(self) -> str:
    """The attributes without those that hold free text."""
    return re.split(r', (?:metadata|backend_config)=', self.attributes)[0]

  def operand_names(self) -> list[str]:
    """Of the instructions whose results it takes."""
    names = re.sub(r'/\*.*?\*/', '', self.operands)
    # An operand is written with its shape by some versions.
    return [n.split()[-1].lstrip('%') for n in split(names)]

  def called(self) -> list[str]:
    """Computations that are executed as part of it, other than loops."""
    keys = r'calls|true_computation|false_computation'
    if self.opcode == 'call':
      keys += '|to_apply'
    found = re.findall(rf'\b(?:{keys})=%?([\w.\-]+)', self.head)
    lists = r'\b(?:branch_computations|called_computations)=\{(.*?)\}'
    for names in re.findall(lists, self.head):
      found += [name.strip().lstrip('%') for name in names.split(',') if name]
    return found

  def attribute(self, key: str) -> str | None:
    """The value of one that is a name or a number."""
    found = re.search(rf'\b{key}=%?([\w.\-]+)', self.head)
    return found[1] if found else None


class Computation(NamedTuple):
  """A list of instructions with a name."""

  name: str
  instructions: dict[str, Instruction]
  root: str


class Module(NamedTuple):
  """A program."""

  partitions: int
  computations: dict[str, Computation]
  entry: str


class Place(NamedTuple):
  """Where an instruction is executed, and how often."""

  computation: Computation
  count: int
  exact: bool
  # Elements of its parameter, a tuple, whose values are known.
  known: dict[int, int]


def parse(text: str) -> Module:
  """Takes a text apart into computations and instructions.

  Args:
    text: what `compiled.as_text()` gives.

  Returns:
    The program.

  Raises:
    ValueError: it is not the text of one program of `jax.jit`.
  """
  header = re.match(r'\s*HloModule ([^\n]*)', text)
  if header is None or len(re.findall(r'^HloModule ', text, re.MULTILINE)) > 1:
    raise ValueError('This is not the text of one compiled program.')
  replicas = re.search(r'\breplica_count=(\d+)', header[1])
  if replicas and int(replicas[1]) > 1:
    raise ValueError(
      f'The program has {replicas[1]} replicas; only those of jax.jit, whose '
      'devices are partitions, are understood.'
    )
  partitions = re.search(r'\bnum_partitions=(\d+)', header[1])
  computations: dict[str, Computation] = {}
  entry = ''
  name, root = '', ''
  instructions: dict[str, Instruction] = {}
  for line in text.split('\n'):
    if not line.startswith((' ', '\t')):
      start = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
      if start:
        name, root, instructions = start[2], '', {}
        entry = name if start[1] else entry
      elif line.startswith('}') and name:
        computations[name] = Computation(name, instructions, root)
        name = ''
      continue
    found = re.match(r'\s+(ROOT )?%?([\w.\-]+) = (.*)', line)
    if not (name and found):
      continue
    instruction = _instruction(found[2], found[3])
    instructions[instruction.name] = instruction
    root = instruction.name if found[1] else root
  if not entry:
    raise ValueError('This is not the text of a compiled program.')
  return Module(int(partitions[1]) if partitions else 1, computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) if rest.startswith('(') else rest.find(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  begin = rest.find('(')
  if end < 1 or begin < 1:
    raise ValueError(f'%{name} = {shape} {rest[:80]}: is no instruction.')
  end = _closing(rest, begin)
  return Instruction(
    name, shape, rest[:begin], rest[begin + 1 : end - 1], rest[end:]
  )


def _closing(text: str, begin: int) -> int:
  """The end of what the bracket at `begin` opens."""
  depth = 0
  for bracket in re.finditer(r'[()]', text[begin:]):
    depth += 1 if bracket[0] == '(' else -1
    if not depth:
      return begin + bracket.end()
  raise ValueError(f'{text[:80]}: a bracket is not closed.')


def split(text: str) -> list[str]:
  """At the commas outside of all brackets.

  >>> split("'a', f32[2,3] %b, (c, d)")
  ["'a'", 'f32[2,3] %b', '(c, d)']
  """
  parts, depth, begin = [], 0, 0
  for found in re.finditer(r'[][(){},]', text):
    if found[0] != ',':
      depth += 1 if found[0] in '[({' else -1
    elif not depth:
      parts.append(text[begin : found.start()])
      begin = found.end()
  return [part.strip() for part in (*parts, text[begin:]) if part.strip()]


def executed(
  module: Module, wanted: Callable[[Instruction], bool]
) -> Iterator[tuple[Place, Instruction]]:
  """Every instruction of some kind that a run of the program starts.

  Args:
    module: the program.
    wanted: which instructions; what these call is not looked into.

  Yields:
    The instruction, and where it is executed.

  Raises:
    ValueError: one of them is in a computation that nothing calls.
  """
  chains = set()
  seen = set()
  waiting = [
    Place(module.computations[module.entry], count=1, exact=True, known={})
  ]
  while waiting:
    place = waiting.pop()
    seen.add(place.computation.name)
    inner = []
    for instruction in place.computation.instructions.values():
      if instruction.opcode.endswith(('-done', '-update')):
        continue
      if not wanted(instruction):
        inner += _inner(module, place, instruction)
        continue
      # A TPU spreads one over several fusions, each of which names it.
      chain = re.search(r'\bchain_id="?(\w+)', instruction.head)
      if chain:
        key = (instruction.attribute('channel_id'), chain[1])
        if key in chains:
          continue
        chains.add(key)
      yield place, instruction
    waiting += reversed(inner)
  for computation in module.computations.values():
    if computation.name not in seen:
      for instruction in filter(wanted, computation.instructions.values()):
        raise unknown(instruction, 'what executes it')


def _inner(
  module: Module, place: Place, instruction: Instruction
) -> Iterator[Place]:
  """The computations that an instruction executes."""
  if instruction.opcode != 'while':
    for name in instruction.called():
      yield place._replace(computation=module.computations[name], known={})
    return
  condition = module.computations[instruction.attribute('condition') or '']
  body = module.computations[instruction.attribute('body') or '']
  known, turns = _loop(module, place, instruction, condition, body)
  exact = place.exact and turns is not None
  turns = 1 if turns is None else turns
  times = place.count * turns
  yield Place(body, times, exact, known)
  yield Place(condition, times + place.count, exact, known)


def array_bytes(shape: str) -> int:
  """Of an array, or of all those of a tuple, without padding.

  >>> array_bytes('(bf16[3,5]{1,0:T(8,128)(2,1)}, pred[2], s4[3], token[])')
  34
  """
  total = 0
  for dtype, dims in re.findall(r'\b([a-z]\w*)\[([\d,<=]*)\]', shape):
    found = _NUMBER.match(dtype)
    bits = int(found[1]) if found else _BITS.get(dtype)
    if bits is None:
      raise ValueError(f'{dtype}[{dims}]: this type is not known.')
    sizes = [int(n.lstrip('<=')) for n in dims.split(',') if n]
    total += -(-math.prod(sizes) * bits // 8)
  return total


def _loop(
  module: Module,
  place: Place,
  loop: Instruction,
  condition: Computation,
  body: Computation,
) -> tuple[dict[int, int], int | None]:
  """Elements of the state that stay as they are, and the number of turns.

  The number is written beside the loop, or follows from a counter: the
  condition compares it with a constant, the body adds a constant to it.
  """
  start: dict[int, int] = {}
  state = place.computation.instructions.get(loop.operand_names()[0])
  if state is not None and state.opcode == 'tuple':
    for k, name in enumerate(state.operand_names()):
      element, value = _value(module, place.computation, name, place.known)
      if element is None and value is not None:
        start[k] = value
  step: dict[int, int] = {}
  after = body.instructions[body.root]
  if after.opcode == 'tuple':
    for k, name in enumerate(after.operand_names()):
      element, value = _value(module, body, name, {})
      if element == k and value is not None:
        step[k] = value
  known = {k: start[k] for k, by in step.items() if not by and k in start}
  written = re.search(
    r'known_trip_count\W+n\W+(\d+)', loop.attributes.replace('\\', '')
  )
  if written:
    return known, int(written[1])
  direction, values = _comparison(module, condition, known)
  if direction not in ('LT', 'LE', 'GT', 'GE'):
    return known, None
  (k, offset), (other, limit) = values
  if k is None or other is not None or offset is None or limit is None:
    return known, None
  if not step.get(k) or k not in start:
    return known, None
  way, by = limit - offset - start[k], step[k]
  if direction in ('GT', 'GE'):
    way, by = -way, -by
  if by < 0:
    return known, None
  return known, max(0, (way // by + 1) if 'E' in direction else -(-way // by))


def _comparison(
  module: Module, condition: Computation, known: dict[int, int]
) -> tuple[str | None, list[_Integer]]:
  """What a condition compares, and how; it may do so in a fusion."""
  test, arguments = condition.instructions[condition.root], None
  if test.opcode == 'fusion':
    arguments = [
      _value(module, condition, name, known) for name in test.operand_names()
    ]
    condition = module.computations[test.called()[0]]
    test = condition.instructions[condition.root]
  if test.opcode != 'compare':
    return None, []
  return test.attribute('direction'), [
    _value(module, condition, name, known, arguments)
    for name in test.operand_names()
  ]


def _value(
  module: Module,
  computation: Computation,
  name: str,
  known: dict[int, int],
  arguments: Sequence[_Integer] | None = None,
) -> _Integer:
  """The value of an instruction of a loop, or of a fusion in it."""
  instruction = computation.instructions[name]
  nothing = (None, None)
  value = functools.partial(
    _value, module, computation, known=known, arguments=arguments
  )
  match instruction.opcode:
    case 'constant':
      found = re.fullmatch(r'-?\d+', instruction.operands.strip())
      return (None, int(found[0])) if found else nothing
    case 'parameter':
      index = int(instruction.operands)
      return arguments[index] if arguments else nothing
    case 'get-tuple-element':
      source = computation.instructions[instruction.operand_names()[0]]
      if source.opcode != 'parameter' or arguments is not None:
        return nothing
      k = int(instruction.attribute('index') or -1)
      return (None, known[k]) if k in known else (k, 0)
    case 'copy' | 'bitcast' | 'convert' | 'reshape':
      return value(instruction.operand_names()[0])
    case 'add' | 'subtract':
      (k, a), (other, b) = map(value, instruction.operand_names())
      if a is None or b is None or (k is not None and other is not None):
        return nothing
      if instruction.opcode == 'add':
        return (other if k is None else k), a + b
      return (k, a - b) if other is None else nothing
    case 'fusion':
      [called] = instruction.called()
      inner = module.computations[called]
      given = [value(operand) for operand in instruction.operand_names()]
      return _value(module, inner, inner.root, {}, given)
  return nothing


def unknown(instruction: Instruction, what: str) -> ValueError:
  """An error about what cannot be read with certainty."""
  text = f'%{instruction.name} = {instruction.opcode}(...){instruction.head}'
  return ValueError(
    f'A compiled program cannot be read: {what} is not understood in '
    f'{text[:300]}'
  )
