import collections
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms
from modelstock_jax.merging import leaves
from modelstock_jax.merging import trees


def test_stack_and_unstack():
  models = [
    {'a': [jnp.full((2, 3), float(i)), jnp.int32(7)], 'b': jnp.ones(1) * i}
    for i in range(3)
  ]
  stack = ms.stack(models)
  assert jax.tree.map(jnp.shape, stack) == {'a': [(3, 2, 3), (3,)], 'b': (3, 1)}
  assert stack['a'][0][:, 0, 0].tolist() == [0.0, 1.0, 2.0]
  for model, again in zip(models, ms.unstack(stack), strict=True):
    assert jax.tree.structure(model) == jax.tree.structure(again)
    for x, y in zip(
      jax.tree.leaves(model), jax.tree.leaves(again), strict=True
    ):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8, jnp.bool_]
)
def test_stack_keeps_dtypes(dtype):
  stack = ms.stack([{'w': jnp.zeros(2, dtype)}] * 2)
  assert stack['w'].dtype == dtype


def test_stack_keeps_what_is_no_array():
  stack = ms.stack([{'act': jax.nn.relu, 'w': jnp.zeros(2), 'n': 3}] * 2)
  assert stack['act'] is jax.nn.relu
  assert stack['n'] == 3
  assert [m['act'] for m in ms.unstack(stack)] == [jax.nn.relu] * 2


def test_stack_and_unstack_random_keys():
  keys = jax.random.split(jax.random.key(0), 2)
  stack = ms.stack([{'key': keys[0]}, {'key': keys[0]}])
  assert stack['key'].shape == (2,)
  assert stack['key'].dtype == keys.dtype
  assert ms.unstack(stack)[1]['key'] == keys[0]


def test_stack_under_jit():
  models = [{'w': jnp.arange(3.0)}, {'w': jnp.ones(3)}]
  stack = jax.jit(ms.stack)(models)
  np.testing.assert_array_equal(stack['w'], [[0, 1, 2], [1, 1, 1]])


def test_unstack_of_differing_sizes():
  stack = {'a': jnp.zeros((2, 3)), 'b': {'c': jnp.zeros((4, 3))}}
  with pytest.raises(ValueError, match=r'(?s)a: \(2, 3\).*b/c: \(4, 3\)'):
    ms.unstack(stack)


@pytest.mark.parametrize('stack', [{}, {'f': jax.nn.relu}, {'s': jnp.ones(())}])
def test_unstack_of_what_is_no_stack(stack):
  with pytest.raises(ValueError, match='stack'):
    ms.unstack(stack)


def test_differences_are_listed_at_once():
  anchor = {
    'head': {'kernel': jnp.zeros((4, 10)), 'bias': jnp.zeros(10)},
    'norm': {'scale': jnp.ones(4)},
    'old': jnp.zeros(3),
    'same': jnp.zeros(2),
  }
  first = {
    'head': {'kernel': jnp.zeros((4, 7)), 'bias': jnp.zeros(7)},
    'norm': {'scale': jnp.ones(4, jnp.bfloat16)},
    'old': jnp.zeros(3),
    'same': jnp.zeros(2),
  }
  second = {
    'head': {'kernel': jnp.zeros((4, 10)), 'bias': jnp.zeros(10)},
    'norm': {'scale': jnp.ones(4), 'extra': jnp.zeros((5, 6))},
    'same': jnp.zeros(2),
  }
  with pytest.raises(ValueError, match='differ in 5 places') as error:
    ms.model_stock(anchor, [first, second])
  text = str(error.value)
  for line in (
    'head/kernel: the anchor has float32[4, 10], model 0 has float32[4, 7]',
    'head/bias: the anchor has float32[10], model 0 has float32[7]',
    'norm/scale: the anchor has float32[4], model 0 has bfloat16[4]',
    'norm/extra: the anchor has no such leaf, model 1 has float32[5, 6]',
    'old: the anchor has float32[3], model 1 has no such leaf',
  ):
    assert line in text
  assert 'same' not in text.replace('the same', '')


def test_differences_of_a_stack():
  anchor = {'a': jnp.zeros(3), 'b': jnp.zeros((2, 3)), 'c': jnp.zeros(1)}
  stack = {
    'a': jnp.zeros((2, 4)),
    'b': jnp.zeros((2, 2, 3), jnp.float16),
    'd': jnp.zeros((2, 1)),
  }
  with pytest.raises(ValueError, match='differ in 4 places') as error:
    ms.model_stock(anchor, stack, stacked=True)
  text = str(error.value)
  for line in (
    'a: the anchor has float32[3], the stack has float32[2, 4], not '
    'float32[2, 3]',
    'b: the anchor has float32[2, 3], the stack has float16[2, 2, 3], not '
    'float32[2, 2, 3]',
    'c: the anchor has float32[1], the stack has no such leaf',
    'd: the anchor has no such leaf, the stack has float32[2, 1]',
  ):
    assert line in text


@pytest.mark.parametrize('form', ['list', 'stack', 'soup', 'wise_ft'])
def test_every_entry_checks_the_trees(form):
  good, bad = {'w': jnp.zeros((2, 3))}, {'w': jnp.zeros((2, 4))}
  calls = {
    'list': lambda: ms.displacement_cosine(good, [good, bad]),
    'stack': lambda: ms.stack([good, bad]),
    'soup': lambda: ms.uniform_soup([good, bad]),
    'wise_ft': lambda: ms.wise_ft(good, bad, alpha=0.5),
  }
  with pytest.raises(ValueError, match=r'w: .*\[2, 3\].*\[2, 4\]'):
    calls[form]()


@pytest.mark.parametrize('models', [[], [{'w': jnp.zeros(2)}]])
def test_fewer_than_two_models(models):
  with pytest.raises(ValueError, match=f'at least 2 .*not {len(models)}'):
    ms.model_stock({'w': jnp.zeros(2)}, models)


def test_a_stack_of_one():
  with pytest.raises(ValueError, match=r'at least 2 .*not 1.*wise_ft'):
    ms.model_stock({'w': jnp.zeros(2)}, {'w': jnp.zeros((1, 2))}, stacked=True)


@pytest.mark.parametrize('tree', [{}, [], None, {'a': {}}])
def test_empty_tree(tree):
  with pytest.raises(ValueError, match='no leaves'):
    ms.model_stock(tree, [tree, tree])


@pytest.mark.parametrize(
  'models', [{'w': jnp.zeros((2, 3))}, 'ab', 3, iter([])]
)
def test_models_that_are_no_sequence(models):
  with pytest.raises(ValueError, match=r'sequence of N >= 2 .*stacked=True'):
    ms.model_stock({'w': jnp.zeros(3)}, models)


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize(
  ('left', 'right', 'kind'),
  [
    (jnp.int32([1, 2]), jnp.int32([1, 3]), 'int32'),
    (jnp.array([True]), jnp.array([False]), 'bool'),
    (jax.random.key(0), jax.random.key(1), 'key<fry>'),
  ],
)
def test_leaves_that_are_not_averaged_must_agree(left, right, kind, stacked):
  models = [
    {'steps': {'count': value}, 'w': jnp.zeros(2)} for value in (left, right)
  ]
  if stacked:
    models = jax.tree.map(lambda *x: jnp.stack(x), *models)
  anchor = {'steps': {'count': left}, 'w': jnp.zeros(2)}
  with pytest.raises(
    ValueError, match=f'steps/count: {kind} .*models disagree'
  ):
    ms.model_stock(anchor, models, stacked=stacked)


def test_values_that_are_no_arrays_must_agree():
  anchor = {'act': 'relu', 'w': jnp.zeros(2)}
  other = {'act': 'gelu', 'w': jnp.zeros(2)}
  with pytest.raises(ValueError, match=r'act: str .*relu.* and .*gelu'):
    ms.model_stock(anchor, [anchor, other])


def test_an_array_where_the_anchor_has_none():
  anchor = {'rate': 0.5, 'w': jnp.zeros(2)}
  other = {'rate': jnp.float32(0.5), 'w': jnp.zeros(2)}
  with pytest.raises(
    ValueError, match=r'rate: the anchor has float 0.5, model 0 has float32\[\]'
  ):
    ms.model_stock(anchor, [other, other])


def test_leaves_are_matched_by_name_not_by_order():
  anchor = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  model = collections.OrderedDict(b=jnp.full(1, 2.0), a=jnp.full(1, 1.0))
  merged = ms.model_stock(anchor, [model, model]).params
  assert type(merged) is dict
  assert (merged['a'][0], merged['b'][0]) == (1.0, 2.0)


def test_names_that_look_alike_stay_apart():
  # both read 'a/b' in a message
  anchor = {'a/b': jnp.zeros(1), 'a': {'b': jnp.zeros(1)}}
  model = {'a/b': jnp.full(1, 1.0), 'a': {'b': jnp.full(1, 2.0)}}
  merged = ms.model_stock(anchor, [model, model]).params
  assert (merged['a/b'][0], merged['a']['b'][0]) == (1.0, 2.0)


def test_path_name():
  tree = {'block_0': [{'kernel': 0}, {'kernel': 1}]}
  paths = [leaves.path_name(p) for p, _ in jax.tree.leaves_with_path(tree)]
  assert paths == ['block_0/0/kernel', 'block_0/1/kernel']


def test_mean_is_taken_in_float32():
  # 1/256 is lost beside 1 in bfloat16, not in the sum of four
  column = jnp.asarray([1, 1 / 256, 1 / 256, 1 / 256], jnp.bfloat16)
  mean = trees.mean(column, 4)
  assert mean.dtype == jnp.float32
  assert float(mean) == (1 + 3 / 256) / 4


def test_the_remedy_is_named():
  with pytest.raises(ValueError, match=re.escape('x.astype(...)')):
    ms.model_stock(jnp.zeros(2), [jnp.zeros(2, jnp.bfloat16)] * 2)
