"""The merge inside other people's programs: where arrays lie, who donates."""

import functools
import pathlib
import re

import equinox as eqx
import jax
from jax import numpy as jnp
from jax import sharding as js
import ml_dtypes
import numpy as np
import pytest

import modelstock_jax as ms

P = js.PartitionSpec
AUTO, EXPLICIT = js.AxisType.Auto, js.AxisType.Explicit

# Functions of an anchor and two models: those that measure whole leaves, and
# those that take each number by itself.
MEASURE = {
  'model_stock': lambda a, b, c: ms.model_stock(a, [b, c]).params,
  'gram': lambda a, b, c: ms.displacement_gram(a, [b, c]),
  'cosine': lambda a, b, c: ms.displacement_cosine(a, [b, c]),
  'merge_every': lambda a, b, c: ms.merge_every(2, 2, a, ms.stack([b, c])),
  'yoyo_scale': lambda a, b, c: ms.yoyo_scale(a, [b, c]).params,
  'mono_soup': lambda a, b, c: ms.mono_soup(a, b).params,
}
ELEMENTWISE = {
  'ema': lambda a, b, c: ms.ema(a, b, 0.5),
  'swa': lambda a, b, c: ms.swa(a, b, 1),
  'wise_ft': lambda a, b, c: ms.wise_ft(a, b, 0.5),
  'lines': lambda a, b, c: ms.lines(a, b, lambda path, leaf: len(path) - 1),
  'uniform_soup': lambda a, b, c: ms.uniform_soup([b, c]),
  'stack': lambda a, b, c: ms.stack([b, c]),
  'unstack': lambda a, b, c: ms.unstack(ms.stack([b, c])),
}
GREEDY = {
  'greedy_soup': lambda a, b, c: ms.greedy_soup([b, c], lambda p: 1.0).params,
}
ALL = MEASURE | ELEMENTWISE | GREEDY


def _place(mesh, *specs):
  """A leaf of every tree, placed by its spec."""
  places = [js.NamedSharding(mesh, spec) for spec in specs]
  return [{'ww': jax.device_put(np.ones((8, 4)), place)} for place in places]


def _mesh(kind, devices=4):
  return js.Mesh(np.array(jax.devices()[:devices]), ('data',), (kind,))


@pytest.fixture
def family(make_family):
  """An anchor and two models of leaves 'w' and 'bb', and a counter."""
  anchor, models = make_family({'w': (8, 4), 'bb': (4,)})
  extra = {'count': np.arange(3, dtype=np.int32)}
  return [tree | extra for tree in (anchor, *models)]


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('function', MEASURE)
def test_shards_are_not_measured(family, function, check_vma):
  merge = jax.shard_map(
    lambda *trees: MEASURE[function](*({'w': x} for x in trees)),
    mesh=_mesh(AUTO),
    in_specs=P('data'),
    out_specs=P('data'),
    check_vma=check_vma,
  )
  with pytest.raises(
    ValueError,
    match=r"(?s)w: the anchor may be a shard.*mesh axes \['data'\].*jit",
  ):
    jax.eval_shape(merge, *(tree['w'] for tree in family))


def test_complete_arrays_are_measured_inside_shard_map(family, merge_layer):
  anchor, *models = (tree['w'] for tree in family)
  for mesh in (_mesh(AUTO), _mesh(AUTO, devices=1)):
    spec = P() if mesh.size > 1 else P('data')  # one device has it all
    merge = jax.shard_map(
      lambda a, b, c: ms.model_stock(a, [b, c]).params,
      mesh=mesh,
      in_specs=spec,
      out_specs=spec,
    )
    expected = merge_layer(anchor, models)[0]
    np.testing.assert_allclose(merge(anchor, *models), expected, atol=1e-6)


def test_averages_of_shards(family):
  _, left, right = (tree['w'] for tree in family)
  average = jax.shard_map(
    lambda a, b: (ms.uniform_soup([a, b]), ms.ema(a, b, 0.5)),
    mesh=_mesh(AUTO),
    in_specs=P('data'),
    out_specs=P('data'),
  )
  for mean in average(left, right):
    expected = (np.float64(left) + right) / 2
    np.testing.assert_allclose(mean, expected, atol=1e-6)


# No leaf passes through the others.
@pytest.mark.parametrize(
  'function', [name for name in ALL if name not in ('gram', 'cosine')]
)
def test_donated_models_leave_what_was_made_of_them(family, function):
  donate = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), donate_argnums=0)
  trees = [jax.tree.map(jnp.array, tree) for tree in family]
  kept = ALL[function](*trees)
  before = jax.tree.map(np.array, kept)
  for tree in trees:
    donate(tree)
    assert tree['count'].is_deleted()
  jax.tree.map(np.testing.assert_array_equal, kept, before)


@pytest.mark.parametrize('function', ALL)
def test_transfer_guard(family, function):
  trees = [jax.tree.map(jnp.array, tree) for tree in family]
  with jax.transfer_guard('disallow'):
    ALL[function](*trees)


@pytest.mark.parametrize('function', ALL)
def test_arrays_in_host_memory(family, function):
  device = js.SingleDeviceSharding(jax.devices()[0])
  host = device.with_memory_kind('pinned_host')
  expected = ALL[function](*jax.device_put(family, device))
  anchor, *models = jax.device_put(family, host)
  for trees in ([anchor, *models], [anchor, *jax.device_put(models, device)]):
    jax.tree.map(np.testing.assert_array_equal, ALL[function](*trees), expected)


def test_merges_of_host_memory(family, merge_layer):
  host = js.NamedSharding(_mesh(AUTO), P(), memory_kind='pinned_host')
  anchor, *models = family
  expected = merge_layer(anchor['w'], [model['w'] for model in models])[0]
  merged = ms.model_stock(*jax.device_put((anchor, models), host)).params['w']
  np.testing.assert_allclose(merged, expected, atol=1e-6)
  stack = jax.device_put(ms.stack(models), host)
  stack = ms.merge_every(1, 1, anchor, stack)
  assert stack['w'].sharding.memory_kind == 'device'
  np.testing.assert_allclose(stack['w'], [expected] * 2, atol=1e-6)


@pytest.mark.parametrize('function', ALL)
def test_trees_on_other_devices(family, function):
  anchor, *models = zip(family, jax.devices(), strict=False)
  trees = [jax.device_put(*pair) for pair in (anchor, *models)]
  with pytest.raises(
    ValueError,
    match=r'(?s)bb: model \d is on the cpu devices \[\d\], not \[\d\] as bb of '
    r'.*w: model \d.*jax\.device_put\(model, sharding\)',
  ):
    ALL[function](*trees)


def test_devices_in_another_order():
  mesh = _mesh(AUTO)
  turned = js.Mesh(mesh.devices[::-1], ('data',))
  (anchor,), models = _place(mesh, P('data')), _place(turned, P(), P())
  with pytest.raises(
    ValueError, match=re.escape('[3, 2, 1, 0], not [0, 1, 2, 3] as ww of')
  ):
    ms.model_stock(anchor, models)


def test_counters_on_other_devices(family):
  # Compared on the host, they need not be together.
  trees = [
    tree | {'n': jax.device_put(1, device)}
    for tree, device in zip(family, jax.devices(), strict=False)
  ]
  assert ms.model_stock(trees[0], trees[1:]).params['n'] == 1


NUMBERS = {
  'strength': lambda a, b, c, x: ms.model_stock(a, [b, c], strength=x).params,
  'decay': lambda a, b, c, x: ms.ema(a, b, x),
  'alpha': lambda a, b, c, x: ms.wise_ft(a, b, x),
  'count': lambda a, b, c, x: ms.swa(a, b, x),
  'beta': lambda a, b, c, x: ms.lines(
    a, b, lambda path, leaf: len(path) - 1, beta=x
  ),
}


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_on_other_devices(family, name):
  """Such as a strength that was computed on the first device."""
  first, second = jax.devices()[:2]
  trees = [{'w': tree['w'], 'bb': tree['bb']} for tree in family]
  expected = NUMBERS[name](*trees, 1)
  for place in (second, js.NamedSharding(_mesh(AUTO), P())):
    placed = jax.device_put(trees, place)
    actual = NUMBERS[name](*placed, jax.device_put(jnp.float32(1), first))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
  ('function', 'jit'),
  [(name, False) for name in ALL]
  + [(name, True) for name in MEASURE | ELEMENTWISE],
)
def test_other_cuts_over_explicit_axes(function, jit):
  trees = _place(_mesh(EXPLICIT), P('data'), P(None, 'data'), P('data'))
  call = ALL[function]
  with pytest.raises(
    ValueError,
    match=r'(?s)ww: cut over explicit .*\[8,4@data\] on .*device_put',
  ):
    (jax.jit(call) if jit else call)(*trees)


def test_a_stack_cut_otherwise_over_explicit_axes():
  mesh = _mesh(EXPLICIT)
  (anchor,) = _place(mesh, P('data'))
  stack = jax.device_put(
    {'ww': np.ones((2, 8, 4))}, js.NamedSharding(mesh, P(None, None, 'data'))
  )
  with pytest.raises(ValueError, match=r'the stack is float32\[2,8,4@data\]'):
    ms.model_stock(anchor, stack, stacked=True)
  with pytest.raises(ValueError, match="axis 'data', which is Explicit"):
    ms.unstack(jax.device_put(np.ones(4), js.NamedSharding(mesh, P('data'))))


def test_singular_values_of_explicit_shards(family):
  anchor, model, _ = (tree['w'] for tree in family)
  place = js.NamedSharding(_mesh(EXPLICIT), P('data'))
  soup = ms.mono_soup(*jax.device_put((anchor, model), place))
  expected = ms.mono_soup(anchor, model)
  np.testing.assert_allclose(soup.params, expected.params, atol=1e-6)
  assert soup.params.sharding.spec == P('data', None)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_wide_averages_of_narrow_weights(dtype):
  rng = np.random.default_rng(0)
  steps = rng.normal(size=(50, 16)).astype(ml_dtypes.finfo(dtype).dtype)
  moving, expected = {'w': jnp.ones(16)}, np.ones(16)
  mean = moving
  for i, step in enumerate(steps):
    params = {'w': jnp.asarray(step)}
    moving, mean = ms.ema(moving, params, 0.99), ms.swa(mean, params, i)
    expected = 0.99 * expected + 0.01 * np.float64(step)
  assert moving['w'].dtype == mean['w'].dtype == jnp.float32
  np.testing.assert_allclose(moving['w'], expected, atol=1e-6)
  expected = np.mean(np.float64(steps), axis=0)
  np.testing.assert_allclose(mean['w'], expected, atol=1e-6)


def test_an_average_of_integers():
  with pytest.raises(ValueError, match=r'the average has float32.* has int32'):
    ms.ema({'w': jnp.ones(2)}, {'w': jnp.ones(2, jnp.int32)}, 0.5)


class Tied(eqx.Module):
  """A layer that is shared, and functions that each module makes anew."""

  both: eqx.nn.Shared
  function: object

  def __init__(self, key, function):
    keys = jax.random.split(key)
    embedding = eqx.nn.Embedding(5, 4, key=keys[0])
    head = eqx.nn.Linear(4, 5, use_bias=False, key=keys[1])
    self.both = eqx.nn.Shared(
      (embedding, head),
      lambda pair: pair[1].weight,
      lambda pair: pair[0].weight,
    )
    self.function = function


@pytest.mark.parametrize(
  'function',
  [
    lambda: lambda x: jax.nn.leaky_relu(x, 0.2),
    lambda: functools.partial(jax.nn.gelu, approximate=False),
  ],
)
def test_modules_that_were_built_one_by_one(function, merge_layer):
  keys = jax.random.split(jax.random.key(0), 3)
  modules = [Tied(key, function()) for key in keys]
  merged = ms.model_stock(modules[0], modules[1:]).params
  embedding, head = merged.both()
  weights = [module.both()[0].weight for module in modules]
  expected = merge_layer(weights[0], weights[1:])[0]
  np.testing.assert_allclose(embedding.weight, expected, atol=1e-6)
  assert head.weight is embedding.weight


@pytest.mark.parametrize(
  ('left', 'right'),
  [
    (lambda x: x + 1, lambda x: x + 2),
    (lambda x, y=1: x, lambda x, y=2: x),
    (*map(lambda n: lambda x: x + n, (1, 2)),),
    (functools.partial(max, 1), functools.partial(max, 2)),
    (functools.partial(max, 1), max),
    (re.compile('a'), re.compile('b')),
  ],
)
def test_functions_that_act_differently(left, right):
  trees = [{'w': jnp.ones(2), 'act': value} for value in (left, right)]
  with pytest.raises(
    ValueError, match=r'(?s)act: .* models disagree.*eqx\.partition\('
  ):
    ms.model_stock(trees[0], trees)


def test_describe_names_that_look_alike():
  anchor = {'a/b': jnp.zeros(2), 'a': {'b': jnp.zeros(2)}}
  model = {'a/b': jnp.ones(2), 'a': {'b': -jnp.ones(2)}}
  text = ms.describe(ms.model_stock(anchor, [model, model]))
  assert text.count('a/b    1.000  1.000') == 2


def test_a_score_that_is_no_number():
  with pytest.raises(
    ValueError, match=r'score: .*\[1\.\].* must be one finite'
  ):
    ms.greedy_soup([{'w': jnp.ones(2)}], lambda params: params['w'][:1])


@pytest.mark.hosts
def test_leaves_that_are_spread_over_processes(run_processes):
  script = pathlib.Path(__file__).with_name('spread_process.py')
  for printed in run_processes(script, 2, devices=2):
    assert 'all agree' in printed
