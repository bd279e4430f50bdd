"""The merge on the trees that people have: Flax, Equinox, Haiku, plain."""

import collections
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import equinox as eqx
from flax import core
from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np
import pytest

import modelstock_jax as ms

SHAPES = {'kernel': (4, 5), 'bias': (5,)}


class Pair(NamedTuple):
  kernel: Any
  bias: Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['kernel', 'bias'],
  meta_fields=['name'],
)
@dataclasses.dataclass
class Record:
  kernel: Any
  bias: Any
  name: str = 'dense'


CONTAINERS = {
  'nested': lambda d: {'block': {'dense': d}, 'none': None},
  'list': lambda d: [d['bias'], [d['kernel']]],
  'tuple': lambda d: (d['kernel'], (d['bias'],)),
  'named_tuple': lambda d: Pair(**d),
  'dataclass': lambda d: Record(**d),
  'ordered': lambda d: collections.OrderedDict(reversed(d.items())),
  'frozen': lambda d: core.freeze({'dense': d}),
  'haiku': lambda d: {'mlp/~/linear_0': {'w': d['kernel'], 'b': d['bias']}},
  'array': lambda d: d['kernel'],
}


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('container', CONTAINERS)
def test_containers(make_family, merge_layer, container, stacked):
  wrap = CONTAINERS[container]
  anchor, models = make_family(SHAPES)
  wrapped = [wrap(m) for m in models]
  if stacked:
    wrapped = ms.stack(wrapped)
  merged = ms.model_stock(wrap(anchor), wrapped, stacked=stacked)
  layers = {k: merge_layer(anchor[k], [m[k] for m in models]) for k in SHAPES}
  for got, i in ((merged.params, 0), (merged.cosine, 1), (merged.ratio, 2)):
    expected = wrap({k: layer[i] for k, layer in layers.items()})
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      got,
      expected,
    )


def test_the_anchors_container_is_kept(make_family):
  anchor, models = make_family(SHAPES)
  merged = ms.model_stock(core.freeze(anchor), models)
  assert isinstance(merged.params, core.FrozenDict)
  assert isinstance(merged.cosine, core.FrozenDict)


@pytest.mark.parametrize('stacked', [False, True])
def test_leaves_that_are_not_floating_pass_through(stacked):
  def tree(value):
    return {
      'w': jnp.full(2, value),
      'count': jnp.int32(7),
      'mask': jnp.array([True, False]),
      'bytes': np.arange(3, dtype=np.uint8),
      'key': jax.random.key(1),
      'old_key': jax.random.PRNGKey(2),
      'phase': jnp.complex64(1j),
      'rate': 0.5,
      'name': 'dense',
      'activation': jax.nn.gelu,
    }

  models = [tree(2.0), tree(3.0)]
  if stacked:
    models = ms.stack(models)
  merged = ms.model_stock(tree(1.0), models, stacked=stacked)
  expected = tree(2.5)  # one direction: t = 1, the mean of 2 and 3
  for name in ('w', 'count', 'mask', 'bytes', 'old_key', 'phase'):
    np.testing.assert_array_equal(merged.params[name], expected[name])
    assert merged.params[name].dtype == expected[name].dtype
  for name in ('key', 'rate', 'name', 'activation'):
    assert merged.params[name] == expected[name]
  assert [k for k, c in merged.cosine.items() if c is not None] == ['w']
  assert [k for k, t in merged.ratio.items() if t is not None] == ['w']
  assert ms.not_finite(merged) == []
  assert len(ms.describe(merged).split('\n')) == 2


@pytest.mark.parametrize(
  'merge',
  [
    lambda a, b, c: ms.model_stock(a, [b, c]).params,
    lambda a, b, c: ms.ema(a, b, 0.5),
    lambda a, b, c: ms.uniform_soup([b, c]),
  ],
)
def test_leaves_of_gradients_pass_through(merge):
  """Those of integers are of dtype float0, or None."""
  empty = np.zeros(3, jax.dtypes.float0)
  trees = [{'w': jnp.ones(2) * i, 'g': empty, 'n': None} for i in range(3)]
  merged = merge(*trees)
  assert (merged['g'].dtype, merged['n']) == (jax.dtypes.float0, None)
  assert np.isfinite(merged['w']).all()


def test_a_tree_without_floating_leaves():
  tree = {'count': jnp.int32(7)}
  merged = ms.model_stock(tree, [tree, tree])
  assert merged.params == {'count': 7}
  assert merged.cosine == {'count': None}
  assert ms.not_finite(merged) == []


class Network(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(self.dense(x)))


@pytest.mark.parametrize('form', ['list', 'stack', 'jit'])
def test_nnx_state(form, merge_layer):
  def move(seed):
    return jax.tree.map(
      lambda x: (
        x + jax.random.normal(jax.random.key(seed), x.shape)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else x
      ),
      anchor,
    )

  graph, anchor = nnx.split(Network(nnx.Rngs(0)))
  models = [move(1), move(2)]
  stacked = form != 'list'
  merge = functools.partial(ms.model_stock, stacked=stacked)
  merge = jax.jit(merge) if form == 'jit' else merge
  merged = merge(anchor, ms.stack(models) if stacked else models)
  assert isinstance(merged.params, nnx.State)
  assert jax.tree.structure(merged.params) == jax.tree.structure(anchor)

  kernels = [m['dense']['kernel'][...] for m in (anchor, *models)]
  params, cosine, _ = merge_layer(kernels[0], kernels[1:])
  network = nnx.merge(graph, merged.params)
  np.testing.assert_allclose(network.dense.kernel[...], params, rtol=1e-5)
  np.testing.assert_allclose(
    merged.cosine['dense']['kernel'][...], cosine, rtol=1e-5
  )
  network.eval()
  assert network(jnp.ones((2, 3))).shape == (2, 4)


def test_a_tie_of_an_nnx_module_is_in_its_state():
  """As the guide says, a module that is merged itself would lose it."""

  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(3, 3, rngs=rngs)
      self.second = nnx.Linear(3, 3, rngs=rngs)
      self.second.kernel = self.first.kernel

  anchor, *models = (nnx.split(Tied(nnx.Rngs(seed))) for seed in range(3))
  merged = ms.model_stock(anchor[1], [state for _, state in models]).params
  assert len(jax.tree.leaves(merged)) == 3
  network = nnx.merge(anchor[0], merged)
  assert network.first.kernel is network.second.kernel


@pytest.mark.parametrize('stacked', [False, True])
def test_equinox_module(stacked, merge_layer):
  networks = [
    eqx.nn.MLP(3, 2, 8, 2, activation=jax.nn.gelu, key=jax.random.key(i))
    for i in range(3)
  ]
  models = ms.stack(networks[1:]) if stacked else networks[1:]
  merged = ms.model_stock(networks[0], models, stacked=stacked)
  assert isinstance(merged.params, eqx.nn.MLP)
  weights = [n.layers[1].weight for n in networks]
  params, cosine, _ = merge_layer(weights[0], weights[1:])
  np.testing.assert_allclose(
    merged.params.layers[1].weight, params, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    merged.cosine.layers[1].weight, cosine, rtol=1e-5, atol=1e-6
  )
  assert merged.params(jnp.ones(3)).shape == (2,)


def test_equinox_module_under_jit():
  networks = [eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(i)) for i in range(3)]
  eager = ms.model_stock(networks[0], networks[1:]).params
  jitted = eqx.filter_jit(ms.model_stock)(networks[0], networks[1:]).params
  np.testing.assert_allclose(
    jitted.layers[0].weight, eager.layers[0].weight, rtol=1e-5, atol=1e-6
  )


def test_inputs_are_left_alone(make_family):
  anchor, models = make_family(SHAPES)
  before = jax.tree.map(np.copy, (anchor, models))
  ms.model_stock(anchor, models)
  jax.tree.map(np.testing.assert_array_equal, (anchor, models), before)
