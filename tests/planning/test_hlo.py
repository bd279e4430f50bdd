import pytest

from modelstock_jax.planning import hlo

HEADER = 'HloModule jit_f, is_scheduled=true, num_partitions=8\n\n'


def _executed(text):
  """Return the runs of each call of 'work', and True if that is certain."""
  module = hlo.parse(HEADER + text)
  actual = hlo.executed(module, lambda i: i.opcode == 'work')
  return {place.name: (count, exact) for place, _, count, exact in actual}


def test_an_instruction_is_taken_apart():
  module = hlo.parse(
    HEADER + 'ENTRY %main.3_spmd (a: f32[2], b: (f32[3], u32[])) -> f32[2] {\n'
    '  %a = f32[2]{0:T(128)} parameter(0), sharding={replicated}\n'
    '  ROOT %start.1 = (f32[2]{0:T(8,128)(2,1)}, /*index=1*/u32[]{:S(2)}) '
    'all-gather-start(%a, /*index=1*/f32[2]{0} %b.2), channel_id=7, '
    'calls=%inner.1, metadata={op_name="x, calls=%no"}, '
    'backend_config={"a":"channel_id=9"}\n}\n'
  )
  assert (module.entry, module.partitions) == ('main.3_spmd', 8)
  actual = module.computations['main.3_spmd']['start.1']
  assert actual.is_root
  assert actual.opcode == 'all-gather-start'
  assert actual.shape == '(f32[2]{0:T(8,128)(2,1)}, /*index=1*/u32[]{:S(2)})'
  assert actual.inputs == ['a', 'b.2']
  assert actual.attribute('channel_id') == '7'
  assert actual.attribute('op_name') == ''
  assert actual.called == ['inner.1']


@pytest.mark.parametrize(
  ('attributes', 'called'),
  [
    ('to_apply=%add', ['add']),
    ('branch_computations={%a, %b}', ['a', 'b']),
    ('true_computation=%a, false_computation=%b', ['a', 'b']),
    ('called_computations={%a}', ['a']),
  ],
)
def test_what_is_called(attributes, called):
  instruction = hlo.Instruction('x', 'f32[]', 'reduce', '', f', {attributes}')
  assert instruction.called == called


@pytest.mark.parametrize(
  ('shape', 'size'),
  [
    ('f32[]', 4),
    ('bf16[3,5]{1,0:T(8,128)(2,1)}', 30),
    ('(f32[2], (s8[3], pred[4]{0}), token[])', 8 + 3 + 4),
    ('c64[2]', 16),
    ('f8e4m3fn[5]', 5),
    ('s4[3]', 2),
    ('f32[<=10]', 40),
    ('f32[0,7]', 0),
  ],
)
def test_bytes(shape, size):
  assert hlo.array_bytes(shape) == size


# A loop whose counter goes from `first` by `step`, as a TPU's compiler writes
# it: without its number of turns.
LOOP = """
%body (s: (s32[], f32[], s32[])) -> (s32[], f32[], s32[]) {{
  %s = (s32[]{{:T(128)}}, f32[], s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %c = s32[]{{:S(6)}} copy(%i)
  %by = s32[] constant({step})
  %next = s32[] add(%c, %by)
  %x = f32[] get-tuple-element(%s), index=1
  %work.1 = f32[] work(%x)
  %n = s32[] get-tuple-element(%s), index=2
  ROOT %t = (s32[], f32[], s32[]) tuple(%next, %work.1, %n)
}}

%condition (s: (s32[], f32[], s32[])) -> pred[] {{
  %s = (s32[], f32[], s32[]) parameter(0)
  %limit = s32[] {limit}
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %test = pred[] compare(%i, %limit), direction={direction}
}}

ENTRY %main (a: f32[], n: s32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %n = s32[] parameter(1)
  %first = s32[] constant({first})
  %start = (s32[], f32[], s32[]) tuple(%first, %a, %n)
  ROOT %loop = (s32[], f32[], s32[]) while(%start), condition=%condition, \
body=%body{rest}
}}
"""


def _loop(**changes):
  values = dict(
    first=0,
    step=1,
    limit='constant(10)',
    direction='LT',
    rest='',
  )
  return LOOP.format(**{**values, **changes})


CARRIED = 'get-tuple-element(%s), index=2'


@pytest.mark.parametrize(
  ('changes', 'turns'),
  [
    ({}, 10),
    ({'first': 3}, 7),
    ({'step': 3}, 4),  # 0, 3, 6, 9
    ({'step': 3, 'limit': 'constant(9)'}, 3),
    ({'first': 10}, 0),
    # Written beside it, which needs no counter.
    (
      {
        'direction': 'NE',
        'rest': ', backend_config={"known_trip_count":{"n":"6"}}',
      },
      6,
    ),
  ],
)
def test_turns_of_a_loop(changes, turns):
  assert _executed(_loop(**changes)) == {'work.1': (turns, True)}


@pytest.mark.parametrize(
  'changes',
  [
    {'direction': 'NE'},
    {'step': 0},
    {'step': -1},  # it never ends
    {'limit': 'get-tuple-element(%s), index=1'},  # which changes
    {'limit': CARRIED},  # which comes from without
    {'first': 9, 'step': -3, 'limit': 'constant(0)', 'direction': 'GT'},
  ],
)
def test_turns_that_cannot_be_told(changes):
  assert _executed(_loop(**changes)) == {'work.1': (1, False)}


def test_what_a_loop_calls_runs_in_every_turn():
  outer = _loop().replace('work(%x)', 'call(%x), to_apply=%inner')
  inner = '%inner (p: f32[]) -> f32[] {\n  ROOT %work.2 = f32[] work(%p)\n}\n'
  assert _executed(inner + outer) == {'work.2': (10, True)}


def test_what_nothing_calls_is_not_left_out():
  stray = '%stray (p: f32[]) -> f32[] {\n  ROOT %work.2 = f32[] work(%p)\n}\n'
  with pytest.raises(ValueError, match=r'what executes it .*%work\.2'):
    _executed(stray + _loop())
