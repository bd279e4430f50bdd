"""The merge on eight devices: equal everywhere, and nothing is gathered."""

import math
import re

import jax
from jax import numpy as jnp
from jax import sharding as js
import numpy as np
import pytest

import modelstock_jax as ms

P = js.PartitionSpec
SHAPES = {'conv': (8, 4, 16), 'bias': (8,)}
# the axis of each leaf that is cut over the mesh axis 'data'
PARAMS = {
  'whole': {'conv': P(), 'bias': P()},
  'first': {'conv': P('data'), 'bias': P('data')},
  'last': {'conv': P(None, None, 'data'), 'bias': P('data')},
}
# the list of models, a stack on every device, a stack on its own mesh axis
FORMS = ['list', 'stack', 'stock']
OPTIONS = {
  'layer': {},
  'filter': {'unit': 'filter'},
  'model': {'unit': 'model'},
  'group': {'layers': lambda path, leaf: ms.Layer(group='dense')},
}
COLLECTIVE = re.compile(
  r' = (?P<type>.*?) (?P<op>all-gather|all-reduce|all-to-all|reduce-scatter|'
  r'collective-permute|collective-broadcast)(?:-start)?\('
)


BRANCHES = re.compile(r'(?:branch|true|false)_computations?=\{?([^}]*?)[}\n]')


def collectives(text, branches=True):
  """The (operation, elements moved) of each collective in compiled HLO.

  Without `branches`, those of conditionals do not count: sums are taken again
  where squares would under- or overflow.
  """
  actual, skip = [], False
  names = set(re.findall(r'%[\w.-]+', ' '.join(BRANCHES.findall(text))))
  for line in text.splitlines():
    line = re.sub(r'/\*.*?\*/', '', line)
    if line.startswith(('%', 'ENTRY')):
      skip = not branches and line.split()[0] in names
    if not skip and (match := COLLECTIVE.search(line)):
      shapes = re.findall(r'\w+\[([\d,]*)\]', match['type'])
      sizes = [math.prod(int(n) for n in s.split(',') if n) for s in shapes]
      actual.append((match['op'], sum(sizes)))
  return actual


@pytest.fixture(scope='module')
def mesh():
  devices = np.array(jax.devices()).reshape(2, 4)
  auto = js.AxisType.Auto
  return js.Mesh(devices, ('stock', 'data'), axis_types=(auto, auto))


def _place(mesh, specs, form, family):
  """The family on the mesh: (anchor, models, stacked)."""

  def put(tree, *lead):
    return {
      name: jax.device_put(leaf, js.NamedSharding(mesh, P(*lead, *specs[name])))
      for name, leaf in tree.items()
    }

  anchor, models = family
  if form == 'list':
    return put(anchor), [put(m) for m in models], False
  lead = 'stock' if form == 'stock' else None
  return put(anchor), put(ms.stack(models), lead), True


def _merge(mesh, specs, stacked, options):
  """Merge as training does: under jit, back on the anchor's shards."""
  shardings = {k: js.NamedSharding(mesh, spec) for k, spec in specs.items()}

  def merge(anchor, models):
    merged = ms.model_stock(anchor, models, stacked=stacked, **options)
    return merged._replace(
      params=jax.lax.with_sharding_constraint(merged.params, shardings)
    )

  return jax.jit(merge)


def _close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
  ('specs', 'options'),
  [
    *[(specs, 'layer') for specs in PARAMS],
    *[('last', options) for options in OPTIONS if options != 'layer'],
  ],
)
def test_jit_on_shards(make_family, mesh, specs, options, form):
  family = make_family(SHAPES)
  expected = ms.model_stock(*family, **OPTIONS[options])
  specs = PARAMS[specs]
  anchor, models, stacked = _place(mesh, specs, form, family)
  merge = _merge(mesh, specs, stacked, OPTIONS[options])
  program = merge.lower(anchor, models).compile()

  merged = program(anchor, models)
  jax.tree.map(_close, merged, expected)
  for name, leaf in merged.params.items():
    assert leaf.sharding.is_equivalent_to(anchor[name].sharding, leaf.ndim)

  actual = collectives(program.as_text())
  # d_1.d_1, d_1.d_2 and d_2.d_2 of every cosine of every leaf
  elements = 3 * (16 + 1 if options == 'filter' else len(SHAPES))
  if form == 'stock':
    # Each model has to come to where the other one is, shard by shard; XLA
    # may do so anew for each of the three products and for the mean.
    assert {op for op, _ in actual} <= {'all-reduce', 'collective-permute'}
    shards = sum(x.addressable_shards[0].data.size for x in anchor.values())
    elements += 2 * 4 * shards
  elif specs == PARAMS['whole']:
    elements = 0
  else:
    assert {op for op, _ in actual} == {'all-reduce'}
  always = collectives(program.as_text(), branches=False)
  assert sum(n for _, n in always) <= elements


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('options', ['layer', 'filter'])
def test_eager_on_shards(make_family, mesh, options, form):
  options = OPTIONS[options]
  family = make_family(SHAPES)
  expected = ms.model_stock(*family, **options)
  anchor, models, stacked = _place(mesh, PARAMS['last'], form, family)
  merged = ms.model_stock(anchor, models, stacked=stacked, **options)
  jax.tree.map(_close, merged, expected)


def test_collectives_finds_a_gather(mesh):
  # the finder itself: a gather, and a sum of a sharded array
  cut = js.NamedSharding(mesh, P('data'))
  full = js.NamedSharding(mesh, P())
  array = jax.device_put(jnp.arange(16.0), cut)
  gather = jax.jit(lambda x: x * 2, out_shardings=full)
  text = gather.lower(array).compile().as_text()
  assert ('all-gather', 16) in collectives(text)
  text = jax.jit(jnp.sum).lower(array).compile().as_text()
  assert collectives(text) == [('all-reduce', 1)]


def test_several_models_to_a_stock_shard(make_family, mesh):
  # four models on a mesh axis of two
  family = make_family(SHAPES, 4)
  expected = ms.model_stock(*family)
  anchor, stack, _ = _place(mesh, PARAMS['first'], 'stock', family)
  merge = _merge(mesh, PARAMS['first'], True, {})
  jax.tree.map(_close, merge(anchor, stack), expected)
  actual = collectives(merge.lower(anchor, stack).compile().as_text())
  assert 'all-gather' not in {op for op, _ in actual}


def test_scanned_layers_cut_over_devices(make_family, mesh):
  # each device holds two of the eight layers whole: not one number crosses, but
  # a flag whether any has to be taken again
  specs = {'conv': P('data')}
  family = make_family({'conv': SHAPES['conv']})
  options = {'layers': lambda path, leaf: ms.Layer(axes=(0,))}
  expected = ms.model_stock(*family, **options)
  anchor, models, stacked = _place(mesh, specs, 'stack', family)
  merge = _merge(mesh, specs, stacked, options)
  jax.tree.map(_close, merge(anchor, models), expected)
  actual = collectives(merge.lower(anchor, models).compile().as_text())
  assert actual == [('all-reduce', 1)]


def test_counters_on_shards(make_family, mesh):
  anchor, models = make_family({'bias': (8,)})
  specs = {'bias': P('data'), 'count': P()}
  for tree in (anchor, *models):
    tree['count'] = np.int32(4)
  placed = _place(mesh, specs, 'stock', (anchor, models))
  merged = ms.model_stock(placed[0], placed[1], stacked=True)
  assert merged.params['count'] == 4


def _explicit():
  """A mesh as `jax.make_mesh` makes it today."""
  devices = np.array(jax.devices()).reshape(2, 4)
  kinds = (js.AxisType.Explicit,) * 2
  return js.Mesh(devices, ('stock', 'data'), axis_types=kinds)


@pytest.mark.parametrize('spec', [P('data'), P(None, 'data')])
def test_explicit_axes(spec):
  rng = np.random.default_rng(0)
  anchor = rng.normal(size=(8, 16)).astype(np.float32)
  models = anchor + 0.1 * rng.normal(size=(2, 8, 16)).astype(np.float32)
  expected = ms.model_stock(anchor, models, stacked=True)
  mesh = _explicit()
  actual = ms.model_stock(
    jax.device_put(anchor, js.NamedSharding(mesh, spec)),
    jax.device_put(models, js.NamedSharding(mesh, P(None, *spec))),
    stacked=True,
  )
  np.testing.assert_allclose(actual.params, expected.params, atol=1e-6)
  np.testing.assert_allclose(actual.cosine, expected.cosine, atol=1e-6)


@pytest.mark.parametrize('jit', [False, True])
def test_a_stack_cut_over_models_along_an_explicit_axis(jit):
  where = js.NamedSharding(_explicit(), P('stock'))
  models = jax.device_put(np.ones((2, 8), np.float32), where)

  def merge(models):
    return ms.model_stock(jnp.zeros(8), models, stacked=True).params

  with pytest.raises(ValueError, match=r"axis 'stock', which is Explicit, .*A"):
    (jax.jit(merge) if jit else merge)(models)
