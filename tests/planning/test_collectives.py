import functools
import math
import re
import types

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from modelstock_jax.planning import collectives

BYTES = 8 * 16 * 4  # of a device's part of float32[2, 4, 8, 16]
SPEC = P('stock', 'data')


@pytest.fixture(scope='module')
def mesh():
  grid = np.array(jax.devices()[:8]).reshape(2, 4)
  return Mesh(grid, ('stock', 'data'), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope='module')
def compiled(mesh):
  """The text of a function of each device's part of float32[2, 4, 8, 16]."""
  where = NamedSharding(mesh, SPEC)
  x = jax.ShapeDtypeStruct((2, 4, 8, 16), jnp.float32, sharding=where)

  def text(function):
    function = jax.shard_map(
      function, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False
    )
    return jax.jit(function).lower(x).compile().as_text()

  return text


def swap(x):
  return lax.ppermute(x, 'stock', [(0, 1), (1, 0)])


def one_to_next_model(x):  # from place (0, 2) to (1, 0)
  return lax.ppermute(x, ('stock', 'data'), [(2, 4)])


@pytest.mark.parametrize(
  ('function', 'kind', 'axes'),
  [
    (lambda x: lax.psum(x, 'data'), 'all-reduce', ('data',)),
    (lambda x: lax.psum(x, 'stock'), 'all-reduce', ('stock',)),
    (
      lambda x: lax.psum(x, ('stock', 'data')),
      'all-reduce',
      ('stock', 'data'),
    ),
    (swap, 'collective-permute', ('stock',)),
    (one_to_next_model, 'collective-permute', ('stock', 'data')),
    (
      lambda x: lax.ppermute(x, 'data', [(i, i + 1) for i in range(3)]),
      'collective-permute',
      ('data',),
    ),
    (
      lambda x: lax.all_gather(x, 'data', axis=1, tiled=True),
      'all-gather',
      ('data',),
    ),
    (
      lambda x: lax.all_gather(x, 'stock', axis=0, tiled=True),
      'all-gather',
      ('stock',),
    ),
    (
      lambda x: lax.all_to_all(x, 'data', 3, 3, tiled=True),
      'all-to-all',
      ('data',),
    ),
    (
      lambda x: lax.psum_scatter(x, 'data', scatter_dimension=2, tiled=True),
      'reduce-scatter',
      ('data',),
    ),
  ],
)
def test_one_collective(compiled, mesh, function, kind, axes):
  [actual] = collectives.read(compiled(function), mesh)
  assert (actual.kind, actual.axes) == (kind, axes)
  assert (actual.bytes, actual.count, actual.exact) == (BYTES, 1, True)
  assert not actual.crosses_slices
  assert not actual.is_async
  # Around a ring: a gather passes each part on to all others; a sum of n
  # devices passes n - 1 parts of an n-th, and again to give out the result.
  others = math.prod({'stock': 2, 'data': 4}[axis] for axis in axes) - 1
  sent = {
    'all-gather': others * BYTES,
    'all-reduce': 2 * others * BYTES // (others + 1),
    'collective-permute': BYTES,
  }
  assert actual.sent == sent.get(kind, others * BYTES // (others + 1))
  for axis in ('stock', 'data'):
    expected = BYTES if axis in axes else 0
    assert collectives.crossing([actual], axis) == expected
  assert collectives.crossing_slices([actual]) == 0


def test_none(compiled, mesh):
  assert collectives.read(compiled(lambda x: 2 * x), mesh) == []


def test_operands_of_any_type_add_up(compiled, mesh):
  def function(x):
    low, high = x[:, :, :, :8], x[:, :, :, 8:]
    low, high = lax.psum((low, high.astype(jnp.int16)), 'data')
    return jnp.concatenate([low, high.astype(jnp.float32)], axis=-1)

  actual = collectives.read(compiled(function), mesh)
  assert sum(c.bytes for c in actual) == BYTES // 2 + BYTES // 4
  assert {c.kind for c in actual} == {'all-reduce'}


def test_every_branch_counts(compiled, mesh):
  def function(x):
    return lax.cond(
      jnp.sum(x) < 0,
      lambda x: lax.psum(x, 'data'),
      lambda x: lax.psum(x, 'stock'),
      x,
    )

  actual = collectives.read(compiled(function), mesh)
  assert {c.axes for c in actual} == {('data',), ('stock',)}


def gathered_sum(x):
  return x + jnp.sum(lax.all_gather(x, 'data', axis=1, tiled=True))


def three_times(x):
  return lax.fori_loop(0, 3, lambda i, x: gathered_sum(x * i), x)


def three_times_five(x):
  def outer(x, _):
    return lax.scan(
      lambda x, i: (gathered_sum(x * i), None), x, jnp.arange(5.0)
    )

  return lax.scan(outer, x, None, length=3)[0]


def for_each_row(x):
  return lax.map(lambda row: lax.psum(row, 'data'), x[0, 0])[None, None]


def _counts(first, last, step):
  """A loop of a counter that is not the kind that `lax.scan` writes."""

  def function(x):
    def more(state):
      return state[0] < last if step > 0 else state[0] >= last

    def body(state):
      return state[0] + step, gathered_sum(state[1])

    return lax.while_loop(more, body, (jnp.int32(first), x))[1]

  return function


LOOPS = [
  (three_times, 3),
  (three_times_five, 15),
  (for_each_row, 8),
  (_counts(1, 12, 5), 3),  # 1, 6, 11
  (_counts(9, 2, -3), 3),  # 9, 6, 3
  (_counts(10, 2, -4), 3),  # 10, 6, 2
]


@pytest.mark.parametrize(('function', 'turns'), LOOPS)
def test_loops_count_with_their_turns(compiled, mesh, function, turns):
  actual = collectives.read(compiled(function), mesh)
  assert all(c.exact for c in actual)
  assert sum(c.count for c in actual) == turns
  size = BYTES // 8 if function is for_each_row else BYTES
  assert collectives.crossing(actual, 'data') == turns * size


def test_a_loop_of_unknown_length_counts_once(compiled, mesh):
  def function(x):
    return lax.while_loop(lambda x: jnp.sum(x) < 9, gathered_sum, x)

  [actual] = collectives.read(compiled(function), mesh)
  assert (actual.count, actual.exact) == (1, False)


def test_what_mixes_models_is_seen(mesh):
  # One norm for all models in place of one for each: models meet.
  where = NamedSharding(mesh, SPEC)
  x = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32, sharding=where)

  def clipped(x, *, over):
    return x / jnp.sqrt(jnp.sum(x * x, axis=over, keepdims=True))

  def moved(over):
    function = functools.partial(clipped, over=over)
    program = jax.jit(function, out_shardings=where).lower(x).compile()
    return collectives.read(program.as_text(), mesh)

  apart, mixed = moved((1, 2)), moved((0, 1, 2))
  assert collectives.crossing(apart, 'data') > 0
  assert collectives.crossing(apart, 'stock') == 0
  assert collectives.crossing(mixed, 'stock') > 0


# What follows are texts, as XLA writes them for machines that are not here.


def _module(lines, *, partitions=8, before=''):
  body = '\n'.join(f'  {line}' for line in lines)
  return (
    f'HloModule jit_f, is_scheduled=true, num_partitions={partitions}\n\n'
    f'{before}ENTRY %main (x: f32[4]) -> f32[4] {{\n'
    '  %x = f32[4]{0:T(128)} parameter(0), sharding={devices=[8]<=[8]}\n'
    f'{body}\n}}\n'
  )


def _mesh(stock, *, slices=1, size=8):
  devices = [
    types.SimpleNamespace(
      # As libtpu numbers them, for several slices.
      id=i if slices == 1 else (s + 1) * 100_000 + i,
      slice_index=s,
    )
    for s in range(slices)
    for i in range(size // slices)
  ]
  grid = np.array(devices, dtype=object).reshape(stock, -1)
  return types.SimpleNamespace(devices=grid, axis_names=('stock', 'data'))


def _reduce(groups, rest='use_global_device_ids=true, to_apply=%add'):
  return _module(
    [
      f'ROOT %all-reduce.1 = f32[4]{{0:T(128)}} all-reduce(%x), channel_id=1, '
      f'replica_groups={groups}, {rest}, metadata={{op_name="a, b={{1}}"}}'
    ]
  )


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', ('data',)),
    ('{{0,4},{1,5},{2,6},{3,7}}', ('stock',)),
    ('{{0,5},{1,4},{2,6},{3,7}}', ('stock', 'data')),
    ('{}', ('stock', 'data')),  # all
    ('{{0},{1},{2},{3},{4},{5},{6},{7}}', None),  # nothing moves
    ('[2,4]<=[8]', ('data',)),
    ('[4,2]<=[8]', ('data',)),
    ('[4,2]<=[2,4]T(1,0)', ('stock',)),
    ('[1,8]<=[8]', ('stock', 'data')),
    ('[4,2]<=[2,2,2]T(1,2,0)', ('stock',)),
    ('[4,2]<=[2,2,2]T(2,0,1)', ('data',)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ('data',)),
    ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_0','axis_2'}", ('stock',)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", ('stock', 'data')),
    # Of 8, the outer two, the inner four, and two in the middle.
    ("mesh['a'=8] {'a':(1)2}", ('stock',)),
    ("mesh['a'=8] {'a':(2)4}", ('data',)),
    ("mesh['a'=8] {'a':(2)2}", ('data',)),
    # Devices in the order 0, 4, 1, 5, ...: pairs are neighbours in it.
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ('stock',)),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ('data',)),
  ],
)
def test_forms_of_groups(groups, axes):
  actual = collectives.read(_reduce(groups), _mesh(2))
  assert [(c.axes, c.bytes) for c in actual] == ([(axes, 16)] if axes else [])


@pytest.mark.parametrize(
  'groups',
  [
    '{{0,1,2,3}}',  # where are the others?
    '{{0,1,2,3},{3,4,5,6}}',
    '[2,4]<=[4]',
    '[2,4]',
    'something new',
    "mesh['a'=2,'b'=2] {'a'}",
    "mesh['a'=2,'b'=4] {'c'}",
    "mesh['a'=2,'b'=4] {'b':(3)2}",
    "mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}",
  ],
)
def test_other_forms_are_refused(groups):
  with pytest.raises(ValueError, match=r'not understood in %all-reduce\.1'):
    collectives.read(_reduce(groups), _mesh(2))


@pytest.mark.parametrize(
  ('groups', 'axes'), [('{{0}}', ('stock', 'data')), ('{}', ('stock', 'data'))]
)
def test_groups_of_replicas_are_of_all_their_partitions(groups, axes):
  [actual] = collectives.read(_reduce(groups, 'to_apply=%add'), _mesh(2))
  assert actual.axes == axes
  with pytest.raises(ValueError, match='groups of replicas'):
    collectives.read(_reduce('{{0,1}}', 'to_apply=%add'), _mesh(2))


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('f32[4]{0} all-reduce(%x), replica_groups={}', 'collective of replicas'),
    ('f32[4]{0} collective-permute(%x), channel_id=1', 'between which devices'),
    ('f32[4]{0} collective-broadcast(%x), channel_id=1', 'this instruction'),
    ('f32[4]{0} ragged-all-to-all(%x), channel_id=1', 'this instruction'),
    (
      'f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
      'backend_config={"custom_call_config":{"has_communication":true}}',
      'this instruction',
    ),
    ('(f32[4]{0}, u32[], token[]) send(%x, %t), channel_id=1', 'sends to'),
  ],
)
def test_what_is_not_known_is_refused(line, message):
  text = _module([f'ROOT %strange = {line}'])
  with pytest.raises(ValueError, match=f'{message}.*%strange'):
    collectives.read(text, _mesh(2))


def test_types_that_are_not_known_are_refused():
  text = _reduce('{}').replace('%x = f32', '%x = mx')
  with pytest.raises(ValueError, match=r'mx\[4\]'):
    collectives.read(text, _mesh(2))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'not the text of one compiled program'),
    (_module([]) * 2, 'not the text of one compiled program'),
    ('HloModule a', 'not the text of one compiled program'),
    (_module([]).replace('is_', 'replica_count=2, is_'), '2 replicas'),
    (_module([], partitions=4), 'for 4 devices, the mesh has 8 in 1 slices'),
  ],
)
def test_other_texts_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    collectives.read(text, _mesh(2))


def test_asynchronous_ones_count_once():
  [actual] = collectives.read(
    _module(
      [
        '%collective-permute-start = (f32[4]{0:T(128)}, f32[4]{0:T(128)S(1)}, '
        'u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, '
        'source_target_pairs={{0,4},{4,0}}',
        'ROOT %collective-permute-done = f32[4]{0:T(128)S(1)} '
        'collective-permute-done(%collective-permute-start)',
      ]
    ),
    _mesh(2),
  )
  assert actual.kind == 'collective-permute'
  assert (actual.axes, actual.bytes, actual.count) == (('stock',), 16, 1)
  assert actual.is_async


def test_wrapped_ones_count_where_they_start():
  wrapper = (
    '%async_computation (p: f32[4]) -> f32[4] {\n'
    '  %p = f32[4]{0} parameter(0)\n'
    '  ROOT %all-to-all = f32[4]{0} all-to-all(%p), channel_id=1, '
    'replica_groups=[2,4]<=[8], dimensions={0}\n'
    '}, execution_thread="parallel"\n\n'
  )
  lines = [
    '%s = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%x), '
    'calls=%async_computation',
    '%u = ((f32[4]{0}), f32[4]{0}, u32[]) async-update(%s), '
    'calls=%async_computation',
    'ROOT %d = f32[4]{0} async-done(%u), calls=%async_computation',
  ]
  [actual] = collectives.read(_module(lines, before=wrapper), _mesh(2))
  assert (actual.kind, actual.axes, actual.count) == (
    'all-to-all',
    ('data',),
    1,
  )
  assert actual.is_async
  with pytest.raises(ValueError, match='what executes it is not understood'):
    collectives.read(_module([], before=wrapper), _mesh(2))


def test_one_that_is_spread_over_fusions_counts_once():
  # As a TPU overlaps it with other work: each part names the whole.
  gather = (
    'all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, '
    'use_global_device_ids=true, frontend_attributes={chain_id="2"}'
  )
  parts = ''.join(
    f'%part.{i} (p: f32[4]) -> f32[16] {{\n  %p = f32[4]{{0}} parameter(0)\n'
    f'  ROOT %all-gather.{i} = f32[16]{{0}} {gather}\n}}\n\n'
    for i in range(3)
  )
  lines = [
    f'%fusion.{i} = f32[16]{{0}} fusion(%x), kind=kCustom, calls=%part.{i}'
    for i in range(3)
  ]
  [actual] = collectives.read(_module(lines, before=parts), _mesh(2))
  assert (actual.kind, actual.bytes, actual.count) == ('all-gather', 16, 1)


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
  fused = (
    '%all-reduce-scatter.3 (p: f32[4]) -> f32[1] {\n'
    '  %p = f32[4]{0} parameter(0)\n'
    '  %all-reduce = f32[4]{0} all-reduce(%p), channel_id=7, '
    'replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true\n'
    '  ROOT %slice = f32[1]{0} slice(%all-reduce), slice={[0:1]}\n}\n\n'
  )
  lines = ['ROOT %f = f32[1]{0} fusion(%x), calls=%all-reduce-scatter.3']
  [actual] = collectives.read(_module(lines, before=fused), _mesh(2))
  assert (actual.kind, actual.axes) == ('reduce-scatter', ('data',))


def _send(target, kind):
  handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
  return _module(
    [
      '%after-all = token[] after-all()',
      '%send = (f32[4]{0:T(128)}, u32[], token[]) send(%x, %after-all), '
      f'channel_id=2, is_host_transfer=true, frontend_attributes={{{handler},'
      f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}',
      '%recv = (f32[4]{0:T(128)}, u32[], token[]) recv(%after-all), '
      'channel_id=1, is_host_transfer=true',
      'ROOT %send-done = token[] send-done(%send), channel_id=2',
    ],
    partitions=4,
  )


@pytest.mark.parametrize(
  ('target', 'type_', 'kind', 'axes'),
  [
    ('"{1,2}x{0:3}"', 'ALL_REDUCE', 'all-reduce', ('stock',)),
    ('"{1,2}x{0:3}"', 'ALL_GATHER', 'all-gather', ('stock',)),
    ('"{1,2}x{0:3}"', 'REDUCE_SCATTER', 'reduce-scatter', ('stock',)),
    (
      '{{100000,200003},{100001,200002},{100002,200001},{100003,200000}}',
      'ALL_REDUCE',
      'all-reduce',
      ('stock', 'data'),
    ),
    (
      '{{100000->200000},{200000->100000}}',
      'ONE_TO_ONE',
      'collective-permute',
      ('stock',),
    ),
    (
      '{{100003->200000}}',
      'ONE_TO_ONE',
      'collective-permute',
      ('stock', 'data'),
    ),
    (
      '{{100000,100001,100002,100003,200000,200001,200002,200003}}',
      'ALL_TO_ALL',
      'all-to-all',
      ('stock', 'data'),
    ),
  ],
)
def test_transfers_between_slices(target, type_, kind, axes):
  [actual] = collectives.read(_send(target, type_), _mesh(2, slices=2))
  assert (actual.kind, actual.axes) == (kind, axes)
  assert (actual.bytes, actual.count, actual.crosses_slices) == (16, 1, True)
  assert collectives.crossing_slices([actual]) == 16


def test_along_data_where_that_spans_the_slices():
  text = _send('"{1,2}x{0:3}"', 'ALL_REDUCE')
  [actual] = collectives.read(text, _mesh(1, slices=2))
  assert (actual.axes, actual.crosses_slices) == (('data',), True)


@pytest.mark.parametrize(
  ('target', 'type_', 'message'),
  [
    ('"{1,2}x{0:3}"', 'SOMETHING', 'the type of this transfer'),
    ('"{1,2}y{0:3}"', 'ALL_REDUCE', 'the form of its target'),
    ('{{100000=>200000}}', 'ONE_TO_ONE', 'the form of its target'),
    ('{{100000->300000}}', 'ONE_TO_ONE', 'not of this mesh'),
  ],
)
def test_other_transfers_are_refused(target, type_, message):
  with pytest.raises(ValueError, match=message):
    collectives.read(_send(target, type_), _mesh(2, slices=2))


def test_groups_within_a_slice_are_of_every_slice():
  # 4 slices of 2 devices as 2 x 4: a group is of two neighbours in a slice.
  text = _module(
    [
      'ROOT %r = f32[4]{0} all-reduce(%x), channel_id=1, '
      'replica_groups={{0,1}}, use_global_device_ids=true'
    ],
    partitions=2,
  )
  [actual] = collectives.read(text, _mesh(2, slices=4))
  assert (actual.axes, actual.crosses_slices) == (('data',), False)
  # 2 slices as 4 x 2, of which each has two rows: along both axes.
  text = re.sub('partitions=2', 'partitions=4', text)
  text = text.replace('{{0,1}}', '{{0,1,2,3}}')
  [actual] = collectives.read(text, _mesh(4, slices=2))
  assert (actual.axes, actual.crosses_slices) == (('stock', 'data'), False)
