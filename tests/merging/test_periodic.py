"""Merging every so many steps, against `model_stock` called by hand."""

import equinox as eqx
from flax import core
import jax
from jax import numpy as jnp
from jax import sharding as js
import numpy as np
import pytest

import modelstock_jax as ms

P = js.PartitionSpec
SHAPES = {'kernel': (8, 4), 'bias': (8,)}


@pytest.fixture
def family(make_family):
  anchor, models = make_family(SHAPES)
  return jax.tree.map(jnp.asarray, anchor), ms.stack(models)


def _equal(got, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
    got,
    expected,
  )


def _both(merged):
  """Two models, each the merge."""
  return ms.stack([merged, merged])


@pytest.mark.parametrize('step', [3, 6, 300])
def test_merges_at_multiples(family, merge_layer, step):
  anchor, stack = family
  got = ms.merge_every(3, step, anchor, stack)
  for name in SHAPES:
    expected, _, _ = merge_layer(anchor[name], stack[name])
    for model in got[name]:
      np.testing.assert_allclose(model, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('step', [-3, 0, 1, 2, 4, 299])
def test_returns_the_stack_at_others(family, step):
  anchor, stack = family
  assert ms.merge_every(3, step, anchor, stack) is stack
  jitted = jax.jit(lambda t, s: ms.merge_every(3, t, anchor, s))
  jax.tree.map(np.testing.assert_array_equal, jitted(step, stack), stack)


@pytest.mark.parametrize(
  'options',
  [
    {'unit': 'filter'},
    {'unit': 'model'},
    {'average': 'angle', 'strength': 0.5},
    {'layers': lambda path, leaf: ms.Layer(group='all', axes=(0,))},
  ],
)
@pytest.mark.parametrize('traced', [False, True])
def test_options_are_those_of_the_merge(make_family, options, traced):
  anchor, models = make_family(SHAPES, 3, agreement=0.2)
  stack = ms.stack(models)
  expected = ms.model_stock(anchor, models, **options).params

  def merge(step):
    return ms.merge_every(5, step, anchor, stack, **options)

  got = (jax.jit(merge) if traced else merge)(10)
  _equal(got, ms.stack([expected] * 3))


@pytest.mark.parametrize('traced', [False, True])
def test_clip(make_family, merge_layer, traced):
  anchor, models = make_family({'w': (8, 4)})
  models[1]['w'] = 1.5 * anchor['w'] - 0.5 * models[1]['w']  # turned around
  stack = ms.stack(models)

  def merge(step, clip):
    return ms.merge_every(1, step, anchor, stack, clip=clip)

  merge = jax.jit(merge, static_argnames='clip') if traced else merge
  expected, cosine, _ = merge_layer(anchor['w'], stack['w'], clip=False)
  assert cosine < -0.1
  _equal(merge(1, clip=False), {'w': np.stack([expected, expected])})
  _equal(merge(1, clip=True), {'w': np.stack([anchor['w'], anchor['w']])})


def _train(stack, key):
  """A step that pulls models apart."""
  leaves, treedef = jax.tree.flatten(stack)
  keys = jax.random.split(key, len(leaves))
  moved = [
    leaf + 0.1 * jax.random.normal(k, leaf.shape)
    for leaf, k in zip(leaves, keys, strict=True)
  ]
  return treedef.unflatten(moved)


def test_scan(family):
  anchor, start = family
  keys = jax.random.split(jax.random.key(1), 7)

  def body(carry, key):
    step, stack = carry
    stack = ms.merge_every(3, step + 1, anchor, _train(stack, key))
    return (step + 1, stack), stack

  _, history = jax.lax.scan(body, (jnp.int32(0), start), keys)

  stack = start  # the same by hand
  for i, key in enumerate(keys):
    stack = _train(stack, key)
    if i in (2, 5):
      stack = _both(ms.model_stock(anchor, stack, stacked=True).params)
    _equal(jax.tree.map(lambda x, i=i: x[i], history), stack)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('traced', [False, True])
def test_dtypes_are_kept(family, dtype, traced):
  anchor, stack = jax.tree.map(lambda x: x.astype(dtype), family)

  def merge(step):
    return ms.merge_every(1, step, anchor, stack)

  got = (jax.jit(merge) if traced else merge)(1)
  assert {x.dtype for x in got.values()} == {jnp.dtype(dtype)}
  merged = ms.model_stock(anchor, stack, stacked=True).params
  for name in SHAPES:
    for model in got[name]:
      difference = np.float64(model) - np.float64(merged[name])
      # One rounding apart at most: XLA may fuse what it compiles together.
      largest = np.abs(np.float64(merged[name])).max()
      assert np.abs(difference).max() <= jnp.finfo(dtype).eps * largest


@pytest.mark.parametrize('lead', ['stock', None])
@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('step', [1, 2])
def test_shardings_are_kept(family, lead, traced, step):
  auto = js.AxisType.Auto
  devices = np.array(jax.devices()).reshape(2, 4)
  mesh = js.Mesh(devices, ('stock', 'data'), axis_types=(auto, auto))

  def put(tree, *lead):
    sharding = js.NamedSharding(mesh, P(*lead, 'data'))
    return jax.device_put(tree, sharding)

  anchor, stack = put(family[0]), put(family[1], lead)

  def merge(step, anchor, stack):
    return ms.merge_every(2, step, anchor, stack)

  got = (jax.jit(merge) if traced else merge)(step, anchor, stack)
  merged = ms.model_stock(*family, stacked=True).params
  _equal(got, _both(merged) if step == 2 else family[1])
  for name, leaf in got.items():
    assert leaf.sharding.is_equivalent_to(stack[name].sharding, leaf.ndim)


@pytest.mark.parametrize('traced', [False, True])
def test_leaves_that_are_not_floating_stay(traced):
  def tree(value):
    return {
      'w': jnp.full(2, value),
      'count': jnp.int32(7),
      'mask': np.array([True, False]),
      'key': jax.random.key(1),
      'rate': 0.5,
      'name': 'dense',
      'activation': jax.nn.gelu,
    }

  stack = ms.stack([tree(2.0), tree(3.0)])
  arrays = {k: v for k, v in stack.items() if hasattr(v, 'shape')}
  rest = {k: v for k, v in stack.items() if k not in arrays}
  actual = {}  # what jit cannot return

  def merge(step, arrays):
    new = ms.merge_every(4, step, tree(1.0), arrays | rest)
    actual.update({k: new[k] for k in rest})
    return {k: new[k] for k in arrays}

  got = (jax.jit(merge) if traced else merge)(8, arrays)
  # One direction: t = 1, the mean of 2 and 3.
  np.testing.assert_array_equal(got['w'], np.full((2, 2), 2.5, np.float32))
  for name in ('count', 'mask', 'key'):
    assert got[name].dtype == stack[name].dtype
    assert jnp.array_equal(got[name], stack[name])
  assert actual == rest


def test_equinox_module_in_a_jitted_loop():
  anchor, *models = [
    eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(i)) for i in range(3)
  ]
  merge = eqx.filter_jit(lambda t, s: ms.merge_every(2, t, anchor, s))
  got = merge(jnp.int32(2), ms.stack(models))
  assert isinstance(got, eqx.nn.MLP)
  merged = ms.model_stock(anchor, models).params
  for model in got.layers[0].weight:
    np.testing.assert_allclose(
      model, merged.layers[0].weight, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize('traced', [False, True])
def test_the_stacks_container_is_kept(family, traced):
  anchor, stack = family
  stack = core.freeze(stack)

  def merge(step):
    return ms.merge_every(1, step, anchor, stack)

  got = (jax.jit(merge) if traced else merge)(1)
  assert isinstance(got, core.FrozenDict)


def test_the_program_merges_only_when_it_is_time(family):
  # a conditional, not a selection between two results that both are computed
  anchor, stack = family
  merge = jax.jit(lambda t, s: ms.merge_every(2, t, anchor, s))
  text = merge.lower(1, stack).compile().as_text()
  assert ' conditional(' in text


@pytest.mark.parametrize('every', [0, -1, 2.0, None, '2'])
@pytest.mark.parametrize('step', [1, 2])
def test_bad_every(family, every, step):
  with pytest.raises(ValueError, match=rf'every: .* >= 1.*{every!r}'):
    ms.merge_every(every, step, *family)


def test_traced_every(family):
  with pytest.raises(ValueError, match=r'every: .* the same in every call'):
    jax.jit(lambda every: ms.merge_every(every, 2, *family))(2)


@pytest.mark.parametrize('step', [1.0, None, '3', [1, 2], np.ones(2, int)])
def test_bad_step(family, step):
  with pytest.raises(ValueError, match='step: must be a whole number'):
    ms.merge_every(2, step, *family)


@pytest.mark.parametrize('step', [jnp.float32(2), jnp.ones(2, jnp.int32)])
def test_bad_traced_step(family, step):
  with pytest.raises(ValueError, match='step: must be a whole number'):
    jax.jit(lambda t: ms.merge_every(2, t, *family))(step)


def test_numbers_are_refused_together(family):
  with pytest.raises(ValueError, match=r'every: (.|\n)*step: '):
    ms.merge_every(0, 1.5, *family)


@pytest.mark.parametrize('step', [np.int64(4), jnp.int32(4)])
def test_numbers_of_numpy_and_jax(family, step):
  anchor, stack = family
  merged = ms.model_stock(anchor, stack, stacked=True).params
  _equal(ms.merge_every(np.int32(2), step, anchor, stack), _both(merged))


@pytest.mark.parametrize('step', [1, 2])
@pytest.mark.parametrize(
  ('break_it', 'message'),
  [
    (lambda a, s: (a, ms.unstack(s)), 'no such leaf'),
    (lambda a, s: (a, {'kernel': s['kernel']}), 'bias: .* no such leaf'),
    (lambda a, s: (s, s), 'kernel: the anchor has .*, not '),
    (lambda a, s: (a, s | {'bias': s['bias'].astype('bfloat16')}), 'bfloat16'),
  ],
)
def test_trees_are_checked_from_the_first_step(family, break_it, message, step):
  with pytest.raises(ValueError, match=message):
    ms.merge_every(2, step, *break_it(*family))


@pytest.mark.parametrize('step', [1, 2])
@pytest.mark.parametrize('option', [{'unit': 'row'}, {'average': 'mean'}])
def test_options_are_checked_from_the_first_step(family, option, step):
  with pytest.raises(ValueError, match='must be one of'):
    ms.merge_every(2, step, *family, **option)
