"""Axes of stacked layers and of replicas."""

import json
import logging
import re

from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import modelstock_jax as ms
from modelstock_jax import files
from modelstock_jax.cli import main
from modelstock_jax.files import blocks
from modelstock_jax.files import match
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.merging import options as options_lib


def _tensor(array):
  flat = array.reshape(-1)
  return tensors_lib.Tensor(
    array.shape,
    array.dtype,
    array.copy,
    lambda start, stop: flat[start:stop],
  )


@pytest.mark.parametrize('block', [1, 4, 7, 30, 1000])
@pytest.mark.parametrize('shape', [(5, 3, 4), (6, 1, 5), (2, 7), (9,), (3, 0)])
def test_each_index_of_an_axis(shape, block, monkeypatch):
  """Pieces are small, and give the inner products and the merge of float64."""
  sizes = []
  einsum = np.einsum

  def watched(axes, left, right):
    sizes.append(left.size)
    return einsum(axes, left, right)

  monkeypatch.setattr(blocks, 'BLOCK', block)
  monkeypatch.setattr(np, 'einsum', watched)
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=shape) for _ in range(4)]
  stored = tuple(_tensor(array) for array in arrays)
  steps = np.stack(arrays[1:]) - arrays[0]
  for axis in (None, *range(len(shape))):
    count = 1 if axis is None else shape[axis]
    rows = steps if axis is None else np.moveaxis(steps, axis + 1, 1)
    rows = rows.reshape(3, count, -1 if steps.size else 0)
    expected = einsum('ikx,jkx->kij', rows, rows)
    expected = expected[0] if axis is None else expected
    matched = match.Matched('w', stored, shape, stored[0].dtype, True, axis)
    gram, square, unmoved = blocks.gram(matched)
    np.testing.assert_allclose(gram, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(square, np.sum(arrays[0] ** 2), rtol=1e-12)
    assert unmoved.tolist() == [0, 0, 0]

    ratio = np.asarray(rng.uniform(size=() if axis is None else count))
    other = tuple(a for a in range(len(shape)) if a != axis)
    spread = ratio if axis is None else np.expand_dims(ratio, other)
    merged = np.full(arrays[0].size, np.nan)
    for start, part in blocks.blend(matched, ratio[None]):
      merged[start : start + part.size] = part[0]
    expected = arrays[0] + spread * steps.mean(0)
    np.testing.assert_allclose(merged, expected.ravel(), atol=1e-12)
  assert max(sizes, default=0) <= block


SHAPES = {
  'layers/q/kernel': (4, 3, 6),
  'layers/k/kernel': (4, 3, 6),
  'layers/out/kernel': (6, 3, 4),
  'layers/scale': (4, 3),
  'head/kernel': (4, 5),
  'deep/kernel': (2, 3, 4, 5),
}


def _oracle(trees, axes, groups=()):
  """Equation 3 in float64, for each index of the axis that a tensor has."""
  center, *models = [
    {name: np.asarray(array, np.float64) for name, array in tree.items()}
    for tree in trees
  ]
  sums, merged = {}, {}
  for name, array in center.items():
    one, two = (model[name] - array for model in models)
    other = tuple(a for a in range(array.ndim) if a != axes.get(name))
    sums[name] = np.array(
      [np.sum(x, axis=other) for x in (one * two, one**2, two**2)]
    )
  for name, array in center.items():
    group = next((group for group in groups if name in group), [name])
    dot, left, right = sum(sums[member] for member in group)
    cosine = np.clip(dot / np.sqrt(left * right), 0, 1)
    ratio = 2 * cosine / (1 + cosine)
    if ratio.ndim:
      other = tuple(a for a in range(array.ndim) if a != axes[name])
      ratio = np.expand_dims(ratio, other)
    mean = (models[0][name] + models[1][name]) / 2
    merged[name] = array + ratio * (mean - array)
  return merged


def _check(actual, expected):
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    tolerance = 1e-6 * np.abs(array).max()
    np.testing.assert_allclose(actual[name], array, rtol=0, atol=tolerance)


STACK = {name: 1 for name in SHAPES if name.startswith('layers/')}


@pytest.mark.parametrize(
  ('flags', 'axes', 'stated'),
  [
    ([], STACK, {'layers/.*': 1}),
    (['--stacked', 'layers/.*=none'], {}, {'layers/.*': None}),
    (
      ['--stacked', 'deep/.*=-2', '--stacked', 'layers/s.*=0'],
      {**STACK, 'layers/scale': 0, 'deep/kernel': 2},
      {'deep/.*': -2, 'layers/s.*': 0, 'layers/.*': 1},
    ),
  ],
)
def test_stacked_layers(family, save, load, tmp_path, flags, axes, stated):
  trees = family(shapes=SHAPES)
  anchor, models = save(trees, form='file')
  out = tmp_path / 'out.safetensors'
  arguments = ['--anchor', anchor, '--models', *models, '--output', out, *flags]
  assert main.main(['merge', *map(str, arguments)]) == 0
  merged = load(out)
  _check(merged, _oracle(trees, axes))
  by_tree = ms.model_stock(
    trees[0],
    trees[1:],
    layers=lambda path, leaf: ms.Layer(
      axes=(axes[path],) if path in axes else ()
    ),
  )
  _check(merged, dict(by_tree.params))
  report = json.loads(out.with_suffix('.model_stock.json').read_text())
  assert report['stacked'] == stated
  for name, shape in SHAPES.items():
    count = shape[axes[name]] if name in axes else ()
    assert np.shape(report['tensors'][name]['cosine']) == np.shape(
      np.zeros(count)
    )


@pytest.mark.parametrize('alphas', [None, [0.25], [0.0, 0.5]])
@pytest.mark.parametrize('count', [1, 2])
def test_lines_of_stacked_layers(family, save, load, tmp_path, alphas, count):
  """They are LiNeS of the same layers that are not stacked."""
  trees = family(count, shapes={n: x for n, x in SHAPES.items() if n[0] != 'd'})
  anchor, models = save(trees, form='folder')
  out, method = tmp_path / 'out', files.Method('lines', alphas=alphas)
  merged = files.merge(anchor, models, out, method=method)
  assert merged.settings['stacked'] == {'layers/.*': 1}

  def unstacked(tree):
    layers = {
      f'{i}/{name}': np.take(array, i, 1)
      for name, array in tree.items()
      if name in STACK
      for i in range(3)
    }
    return {**layers, 'head/kernel': tree['head/kernel']}

  center, *others = map(unstacked, trees)
  mean = others[0] if count == 1 else dict(ms.uniform_soup(others))
  for alpha, folder in zip(
    alphas or [0.0],
    [''] if len(alphas or '1') == 1 else ['alpha_0', 'alpha_0.5'],
    strict=True,
  ):
    expected = ms.lines(
      center,
      mean,
      lambda path, _: int(path[0]) if path[0].isdigit() else None,
      alpha=alpha,
      beta=1 - alpha,
    )
    _check(unstacked(load(out / folder)), dict(expected))


def test_tensors_of_a_layer_share_the_cosine_of_each_index(
  family, save, load, tmp_path
):
  trees = family(shapes=SHAPES)
  anchor, models = save(trees)
  shared = r'(layers)/[qk]/(kernel)'
  files.merge(anchor, models, tmp_path / 'out', layers=shared)
  group = ['layers/q/kernel', 'layers/k/kernel']
  _check(load(tmp_path / 'out'), _oracle(trees, STACK, [group]))
  with pytest.raises(ValueError, match=r"layers/q/kernel'.* are \[1, 3\]"):
    files.merge(
      anchor,
      models,
      tmp_path / 'other',
      layers=shared,
      stacked={'layers/q/.*': None},
    )


KERNELS = {'layers/a/kernel': (3, 4, 6), 'layers/b/kernel': (3, 6, 4)}


@pytest.mark.parametrize(
  ('shapes', 'stated'),
  [
    ({**KERNELS, 'layers/bias': (3, 6)}, {'layers/.*': 0}),
    # Both axes agree; a scale is not stacked; no kernel is; nor is its name.
    ({'layers/a/kernel': (3, 4, 6)}, {}),
    ({**KERNELS, 'layers/bias': (3,)}, {}),
    ({'layers/a': (3, 4), 'layers/b': (3, 5)}, {}),
    ({'blocks/a': (3, 4, 6), 'blocks/b': (3, 6, 4)}, {}),
    # One layer under each number.
    ({'layers/0/a': (3, 4, 6), 'layers/0/b': (3, 6, 4)}, {}),
    (
      {'dense_layers/a': (4, 2, 6), 'dense_layers/b': (5, 2, 6)}
      | {f'moe_layers/{n}': s for n, s in KERNELS.items()},
      {'dense_layers/.*': 1, 'moe_layers/layers/.*': 0},
    ),
  ],
)
def test_what_is_recognised(family, save, tmp_path, caplog, shapes, stated):
  anchor, models = save(family(shapes=shapes))
  with caplog.at_level(logging.INFO):
    merged = files.merge(anchor, models, tmp_path / 'out')
  assert json.loads(merged.report.read_text())['stacked'] == stated
  stacks = {n for n in shapes if re.match(r'layers/\D', n)}
  if stacks and not stated:
    assert "If it is one, --stacked 'layers/.*=AXIS'" in caplog.text
  assert len(caplog.messages) == max(len(stated), bool(stacks))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      {'stacked': {'head/.*': 2}},
      r'head/kernel: stacked names axis 2, but the',
    ),
    ({'stacked': {'head/.*': -3}}, r'axis -3, but the shape is \[4, 5\]'),
    ({'stacked': {'body/.*': 0}}, r"stacked: 'body/\.\*' matches none of"),
    ({'stacked': {'(': 0}}, r"stacked: '\(' is no regular expression"),
    (
      {
        'stacked': {'head/.*': 0},
        'options': options_lib.StockOptions('filter'),
      },
      "stacked is for unit 'layer', not 'filter'",
    ),
  ],
)
def test_wrong_axes(family, save, tmp_path, arguments, message):
  anchor, models = save(family(shapes=SHAPES))
  with pytest.raises(ValueError, match=message):
    files.merge(anchor, models, tmp_path / 'out', **arguments)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('value', ['head', '=1', 'head=', 'head=first'])
def test_a_flag_without_an_axis(value, capsys):
  arguments = ['--anchor=a', '--models', 'b', 'c', '--output=d']
  assert main.main(['merge', *arguments, '--stacked', value]) == 1
  assert f'--stacked {value}: must be REGEX=AXIS' in capsys.readouterr().err


def _diloco(folder, params, replicas):
  """A checkpoint of MaxText's DiLoCo: replicas, and what they started from."""
  tree = {
    'inner_state': {
      'params': {'params': replicas},
      'opt_state': {'count': jnp.zeros(2, jnp.int32)},
    },
    'params': {'params': params},
    'outer_opt_state': [{'trace': jnp.zeros(3)}],
    'step': jnp.array(5),
  }
  with ocp.CheckpointManager(folder) as manager:
    items = ocp.args.Composite(items=ocp.args.PyTreeSave(tree))
    manager.save(5, args=items)


def test_replicas(family, tmp_path, caplog):
  """One checkpoint is enough, which may be the anchor as well."""
  trees = [
    {name: array for name, array in tree.items() if name != 'deep/kernel'}
    for tree in family(shapes=SHAPES)
  ]
  replicas = {name: np.stack([t[name] for t in trees[1:]]) for name in trees[0]}
  _diloco(tmp_path / 'run', trees[0], replicas)
  run, out = str(tmp_path / 'run'), tmp_path / 'out'
  arguments = ['--anchor', run, '--models', run, '--output', str(out)]
  with caplog.at_level(logging.INFO):
    assert main.main(['merge', *arguments]) == 0
  assert f'{run}: 2 replicas, each of which is a model.' in caplog.messages
  with ocp.CheckpointManager(out) as manager:
    items = ocp.args.Composite(items=ocp.args.PyTreeRestore())
    restored = manager.restore(5, args=items)['items']
  assert restored.keys() == {'params'}
  _check(restored['params']['params'], _oracle(trees, STACK))
  report = json.loads((out / 'model_stock.json').read_text())
  assert report['models'] == [f'{run} (replica {i})' for i in range(2)]
  assert report['stacked'] == {'params/params/layers/.*': 1}


@pytest.mark.parametrize('suffix', ['.safetensors', '.npz'])
def test_replicas_beside_another_model(family, tmp_path, suffix):
  """Each is a model of its own; arrays of some formats are read as a whole."""
  trees = family(4, shapes={'w': (4, 6), 'b': (6,)})
  stacked = {name: np.stack([t[name] for t in trees[1:4]]) for name in 'wb'}
  paths = [tmp_path / f'{name}{suffix}' for name in 'abc']
  for path, tree in zip(paths, (trees[0], stacked, trees[4]), strict=True):
    if suffix == '.npz':
      np.savez_compressed(path, **tree)
    else:
      safetensors.numpy.save_file(tree, path)
  singly = [tmp_path / f'{i}.safetensors' for i in range(5)]
  for path, tree in zip(singly, trees, strict=True):
    safetensors.numpy.save_file(tree, path)
  outputs = [tmp_path / f'out{i}.safetensors' for i in range(2)]
  files.merge(paths[0], paths[1:], outputs[0])
  files.merge(singly[0], singly[1:], outputs[1])
  one, two = map(safetensors.numpy.load_file, outputs)
  assert {name: array.tobytes() for name, array in one.items()} == {
    name: array.tobytes() for name, array in two.items()
  }


def test_replicas_of_unequal_lengths_are_none(family, tmp_path):
  trees = family(1, shapes={'w': (4, 6), 'b': (6,)})
  paths = [tmp_path / f'{name}.safetensors' for name in 'ab']
  safetensors.numpy.save_file(trees[0], paths[0])
  unequal = {'w': np.stack([trees[1]['w']] * 2), 'b': trees[1]['b']}
  safetensors.numpy.save_file(unequal, paths[1])
  with pytest.raises(ValueError, match='and at least two models'):
    files.merge(paths[0], paths[1:], tmp_path / 'out')
