"""Checkpoints of Orbax as each trainer keeps them: with stacked layers or not.

Each is merged by the command, restored as its owner does it, and compared with
float64 and with `ms.model_stock` on the same trees.
"""

import json
import re

from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
import pytest

import modelstock_jax as ms
from modelstock_jax.cli import main

STEP = 3


def _maxtext(make, stack=lambda shape: (shape[0], 3, *shape[1:])):
  """The tree of MaxText, whose `param_scan_axis` is 1."""
  layer = {
    'self_attention': {
      'query': {'kernel': make(stack((8, 2, 4)))},
      'out': {'kernel': make(stack((2, 4, 8)))},
    },
    'mlp': {'wi': {'kernel': make(stack((8, 12)))}},
    'norm': {'scale': make(stack((8,)))},
  }
  return layer, {'token_embedder': {'embedding': make((12, 8))}}


def _scanned(make):
  layers, tree = _maxtext(make)
  return {'params': {'params': {**tree, 'decoder': {'layers': layers}}}}


def _unrolled(make):
  layers = {
    f'layers_{i}': _maxtext(make, lambda shape: shape)[0] for i in range(2)
  }
  tree = _maxtext(make)[1]
  return {'params': {'params': {**tree, 'decoder': layers}}}


def _gemma(make, stacked=()):
  return {
    'attn': {
      'q_einsum': {'w': make((*stacked, 4, 8, 2))},
      'attn_vec_einsum': {'w': make((*stacked, 4, 2, 8))},
    },
    'mlp': {'linear': make((*stacked, 12, 8))},
    'pre_attention_norm': {'scale': make((*stacked, 8))},
  }


def _flat(tree, prefix):
  """Join the keys of modules by '/', as the released checkpoints have them."""
  modules = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *path, last = (key.key for key in keys)
    modules.setdefault('/'.join([prefix, *path]), {})[last] = leaf
  return modules


def _gemma_stacked(make):
  kinds = [
    _flat(
      _gemma(make, (count,)), f'transformer/stacked_layers/attention_type_{i}'
    )
    for i, count in enumerate((3, 2))
  ]
  embedder = {'transformer/embedder': {'input_embedding': make((12, 8))}}
  return {**kinds[0], **kinds[1], **embedder}


def _openpi(make):
  def value(shape):
    return {'value': make(shape)}

  vision = {
    'LayerNorm_0': {'scale': value((3, 8)), 'bias': value((3, 8))},
    'MlpBlock_0': {
      'Dense_0': {'kernel': value((3, 8, 12))},
      'Dense_1': {'kernel': value((3, 12, 8))},
    },
  }
  return {
    'params': {
      'PaliGemma': {
        'llm': {'layers': _gemma(value, (2,)), 'norm': value((8,))},
        'img': {'Transformer': {'encoderblock': vision}},
      }
    }
  }


class Model(nnx.Module):
  """A model of NNX, whose leaves have the key 'value' on disk."""

  def __init__(self, make):
    self.embedder = nnx.Param(make((12, 8)))
    self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0))])
    self.layers[0].kernel[...] = make((8, 8))
    self.layers[0].bias[...] = make((8,))


def _manager(save, restore=None):
  """Save and restore by a manager, of one item or of several by name."""

  def write(folder, tree):
    with ocp.CheckpointManager(folder) as manager:
      manager.save(STEP, args=save(tree))

  def read(folder, like):
    with ocp.CheckpointManager(folder) as manager:
      step = manager.latest_step()
      return manager.restore(step, args=(restore or save)(like))

  return write, read


def _trained(tree):
  return {**tree, 'opt_state': {'count': jnp.array(1)}, 'step': jnp.array(STEP)}


def _items(name, second=None, wrap=lambda tree: tree):
  """Return a manager of an item of weights, beside one of another state."""

  def save(tree):
    items = {name: ocp.args.PyTreeSave(wrap(tree))}
    if second:
      items[second] = ocp.args.PyTreeSave({'count': jnp.array(1)})
    return ocp.args.Composite(**items)

  def restore(like):
    arguments = ocp.checkpoint_utils.construct_restore_args(like)
    item = ocp.args.PyTreeRestore(like, restore_args=arguments)
    return ocp.args.Composite(**{name: item})

  write, read = _manager(save, restore)
  return write, lambda folder, like: read(folder, like)[name]


def _standard_write(folder, tree):
  with ocp.StandardCheckpointer() as writer:
    writer.save(folder, tree)


def _standard_read(folder, like):
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(folder, like)


STANDARD = (_standard_write, _standard_read)
FORMS = {
  'maxtext': (_scanned, *_items('items', wrap=_trained), {'.*/layers/.*': 1}),
  'maxtext v1': (_scanned, v1.save, v1.load, {'.*/layers/.*': 1}),
  'maxtext unrolled': (_unrolled, *_items('items', wrap=_trained), {}),
  'tunix': (
    lambda make: nnx.state(Model(make)),
    *_items('model_params', 'optimizer_state'),
    {},
  ),
  'gemma nested': (lambda make: {'layer_0': _gemma(make)}, *STANDARD, {}),
  'gemma flat': (
    lambda make: _flat(_gemma(make), 'transformer/layer_0'),
    *STANDARD,
    {},
  ),
  'gemma stacked': (_gemma_stacked, *STANDARD, {'.*/stacked_layers/.*': 0}),
  'kauldron': (
    lambda make: {'params': {'layer_0': _gemma(make)}},
    *_manager(
      lambda tree: ocp.args.StandardSave(_trained(tree)),
      ocp.args.StandardRestore,
    ),
    {},
  ),
  'openpi': (
    _openpi,
    *_items('params', 'train_state'),
    {'.*/(layers|encoderblock)/.*': 0},
  ),
}


def _random(seed, dtype=jnp.float32):
  """Make leaves: near the anchor's, and nearer to those of the next seeds."""
  numbers = np.random.default_rng(0)
  rng = np.random.default_rng(1 + seed)

  def make(shape):
    center, shared = numbers.normal(size=(2, *shape))
    # Layers agree unequally, so that one cosine for all would be seen.
    step = shared * np.linspace(0, 2, center.size).reshape(shape)
    step += rng.normal(size=shape)
    return jnp.asarray(center + (0.1 * step if seed else 0), dtype)

  return make


def _oracle(center, one, two, axis):
  """Equation 3 of two models in float64, for each index of the axis."""
  center, one, two = (np.asarray(x, np.float64) for x in (center, one, two))
  axes = tuple(a for a in range(center.ndim) if a != axis)
  left, right = one - center, two - center
  dot, *squares = (
    np.sum(x, axis=axes, keepdims=True)
    for x in (left * right, left**2, right**2)
  )
  cosine = np.clip(dot / np.sqrt(squares[0] * squares[1]), 0, 1)
  return center + 2 * cosine / (1 + cosine) * (left + right) / 2


def _merge(paths, out, *flags):
  anchor, *models = map(str, paths)
  arguments = ['--anchor', anchor, '--models', *models, '--output', str(out)]
  assert main.main(['merge', *arguments, *flags]) == 0
  return json.loads((out / 'model_stock.json').read_text())


def _layer(axes):
  def layer(path, leaf):
    name = f'{path}/'.replace('.value', '')
    matched = (a for p, a in axes.items() if re.fullmatch(p, name))
    return ms.Layer(axes=tuple(matched))

  return layer


@pytest.mark.parametrize('form', FORMS)
def test_a_trainers_checkpoints(form, tmp_path):
  tree, write, read, axes = FORMS[form]
  trees = [tree(_random(seed)) for seed in range(3)]
  paths = [tmp_path / str(seed) for seed in range(3)]
  for path, values in zip(paths, trees, strict=True):
    write(path, values)
  report = _merge(paths, tmp_path / 'out')
  assert {*report['stacked'].values()} == {*axes.values()}

  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    trees[0],
  )
  restored = read(tmp_path / 'out', like)
  by_tree = ms.model_stock(trees[0], trees[1:], layers=_layer(axes)).params
  paths = [
    '/'.join(str(getattr(key, 'key', key)) for key in keys) + '/'
    for keys, _ in jax.tree_util.tree_leaves_with_path(trees[0])
  ]
  columns = zip(*map(jax.tree.leaves, (restored, by_tree, *trees)), strict=True)
  for path, (actual, other, *values) in zip(paths, columns, strict=True):
    axis = next((a for p, a in axes.items() if re.fullmatch(p, path)), None)
    expected = _oracle(*values, axis)
    tolerance = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(other, expected, rtol=0, atol=tolerance)
