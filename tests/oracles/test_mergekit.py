"""Our merge against mergekit's `model_stock`, in memory, in float32.

mergekit works on PyTorch tensors, one at a time, with neither clipping nor
groups. Its filters are the rows of the last axis of `[out, in]` weights: axis
0 is the filter axis there, the last one in the transposed Flax kernel.

Tolerance: both sides compute displacements of 0.1 from weights of size 1 in
float32, so a cosine carries about 1e-7 / sqrt(elements) of noise, and w_H an
error of a few roundings of its own size: 1e-6 absolute. t divides the cosine
by 1 + (N-1) cos, which the families here keep above 0.5.
"""

import jax
from jax import numpy as jnp
from mergekit import merge_methods
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import modelstock_jax as ms
from modelstock_jax import files
from modelstock_jax.merging import options as options_lib

pytestmark = pytest.mark.oracle
SHAPES = {
  'dense': (64, 48),
  'wide': (10, 3000),
  'bias': (97,),
  'row': (1, 30),
  'column': (30, 1),
}


def _family(num_models, agreement, *, scale=0.1, seed=0):
  """An anchor and models whose cosines lie near `agreement`, as numpy."""
  rng = np.random.default_rng(seed)

  def draw(shape):
    shared = agreement**0.5 * rng.normal(size=shape)
    individual = (1 - agreement) ** 0.5 * rng.normal(size=(num_models, *shape))
    anchor = rng.normal(size=shape)
    models = anchor + scale * (shared + individual)
    return anchor.astype(np.float32), models.astype(np.float32)

  leaves = {name: draw(shape) for name, shape in SHAPES.items()}
  anchor = {name: leaf for name, (leaf, _) in leaves.items()}
  return anchor, [
    {name: models[i] for name, (_, models) in leaves.items()}
    for i in range(num_models)
  ]


def _mergekit(anchor, models, filter_wise):
  """mergekit's merge of each leaf."""
  return {
    name: merge_methods.merge_tensors(
      [torch.from_numpy(tree[name].copy()) for tree in (anchor, *models)],
      'model_stock',
      base_index=0,
      parameters={'filter_wise': filter_wise},
    ).numpy()
    for name in anchor
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('filter_wise', [False, True])
@pytest.mark.parametrize('num_models', [2, 3])
def test_files(tmp_path, num_models, filter_wise, dtype):
  """mergekit computes in float64 here; in float32 its sums are off.

  Both results are rounded once, so they differ by at most one unit in the last
  place, where a value lies in the middle between two.
  """
  anchor, models = _family(num_models, 0.6)
  names = [f'{name}.safetensors' for name in 'abcd'[: 1 + num_models]]
  trees = []
  for name, tree in zip(names, (anchor, *models), strict=True):
    del tree['column']  # see `test_filters`
    tree = {k: np.ascontiguousarray(v.astype(dtype)) for k, v in tree.items()}
    safetensors.numpy.save_file(tree, tmp_path / name)
    trees.append({k: v.astype(np.float64) for k, v in tree.items()})
  paths = [tmp_path / name for name in names]
  out = tmp_path / 'out.safetensors'
  unit = 'filter' if filter_wise else 'layer'
  options = options_lib.StockOptions(unit, clip=False)
  files.merge(paths[0], paths[1:], out, options=options)
  expected = _mergekit(trees[0], trees[1:], filter_wise)
  for name, array in safetensors.numpy.load_file(out).items():
    assert array.dtype == dtype
    wanted = expected[name].astype(dtype)
    apart = np.abs(array.astype(np.float64) - wanted.astype(np.float64))
    ulp = np.float64(ml_dtypes.finfo(dtype).eps) * np.abs(expected[name])
    assert np.all(apart <= ulp), name
    assert np.mean(apart > 0) < 0.001


def test_files_below_the_floor_of_mergekit(tmp_path):
  """Displacements whose norms multiply to less than 1e-6: only these differ."""
  rng = np.random.default_rng(0)
  trees = [{}, {}, {}]
  for name, size in (('far', 1e-2), ('near', 1e-5)):
    center, shared = rng.normal(size=(2, 50))
    trees[0][name] = center
    for tree in trees[1:]:
      tree[name] = center + size * (shared + rng.normal(size=50))
  paths = [tmp_path / f'{name}.safetensors' for name in 'abc']
  for path, tree in zip(paths, trees, strict=True):
    safetensors.numpy.save_file(tree, path)
  out = tmp_path / 'out.safetensors'
  options = options_lib.StockOptions(clip=False)
  merged = files.merge(paths[0], paths[1:], out, options=options)
  actual = safetensors.numpy.load_file(out)
  expected = _mergekit(trees[0], trees[1:], filter_wise=False)
  np.testing.assert_allclose(actual['far'], expected['far'], rtol=1e-12)
  assert merged.ratio['near'] > 0.4
  steps = [tree['near'] - trees[0]['near'] for tree in trees[1:]]
  # it takes 1e-6 for the product of the norms
  cosine = steps[0] @ steps[1] / 1e-6
  t = 2 * cosine / (1 + cosine)
  np.testing.assert_allclose(
    expected['near'], trees[0]['near'] + t * (steps[0] + steps[1]) / 2
  )
  assert t < 0.02


def _close(got, expected):
  assert got.dtype == expected.dtype == np.float32
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('form', ['list', 'stack', 'jit'])
@pytest.mark.parametrize('agreement', [0.2, 0.6, 0.95])
@pytest.mark.parametrize('num_models', [2, 3, 5])
def test_layers(num_models, agreement, form):
  anchor, models = _family(num_models, agreement)
  expected = _mergekit(anchor, models, filter_wise=False)
  stacked = form != 'list'

  def merge(anchor, models):
    return ms.model_stock(anchor, models, stacked=stacked, clip=False).params

  if form == 'jit':
    merge = jax.jit(merge)
  got = merge(anchor, ms.stack(models) if stacked else models)
  for name in SHAPES:
    _close(np.asarray(got[name]), expected[name])


@pytest.mark.parametrize('agreement', [0.6, 0.95])
@pytest.mark.parametrize('num_models', [2, 3, 5])
def test_filters(num_models, agreement):
  anchor, models = _family(num_models, agreement)
  # A filter of one weight has cosines of -1 and 1, whose mean may be the
  # pole of t, where both sides amplify rounding without bound.
  for tree in (anchor, *models):
    del tree['column']
  expected = _mergekit(anchor, models, filter_wise=True)
  rows = ms.model_stock(
    anchor,
    models,
    unit='filter',
    layers=lambda path, leaf: ms.Layer(filter_axis=0),
    clip=False,
  ).params
  # and as Flax holds them, where the output axis is the last, our default
  turned_anchor, turned_models = jax.tree.map(
    lambda x: jnp.asarray(x.T), (anchor, models)
  )
  columns = ms.model_stock(
    turned_anchor, turned_models, unit='filter', clip=False
  ).params
  for name in expected:
    _close(np.asarray(rows[name]), expected[name])
    _close(np.asarray(columns[name]).T, expected[name])


@pytest.mark.parametrize('filter_wise', [False, True])
def test_short_filters_turn_apart(filter_wise):
  # negative cosines, which neither side clips
  rng = np.random.default_rng(3)
  anchor = {'w': rng.normal(size=(8, 40)).astype(np.float32)}
  step = 0.1 * rng.normal(size=(8, 40))
  turned = -0.8 * step + 0.1 * rng.normal(size=(8, 40))
  models = [{'w': (anchor['w'] + s).astype(np.float32)} for s in (step, turned)]
  merged = ms.model_stock(
    anchor,
    models,
    unit='filter' if filter_wise else 'layer',
    layers=lambda path, leaf: ms.Layer(filter_axis=0),
    clip=False,
  )
  assert np.max(merged.cosine['w']) < -0.2
  expected = _mergekit(anchor, models, filter_wise)
  _close(np.asarray(merged.params['w']), expected['w'])


def test_mergekit_floors_short_displacements():
  # Why the families above move far: below norms of 1e-3 mergekit takes a
  # layer for one that hardly moved. Ours has no floor.
  anchor = {'w': np.zeros(4, np.float32)}
  model = {'w': np.full(4, 1e-5, np.float32)}
  expected = _mergekit(anchor, [model, model], filter_wise=False)
  merged = ms.model_stock(anchor, [model, model])
  np.testing.assert_allclose(merged.params['w'], model['w'], rtol=1e-6)
  # its cosine is 4e-10 / 1e-6, so its t is 8e-4
  np.testing.assert_allclose(expected['w'], 8e-4 * model['w'], rtol=1e-3)


@pytest.mark.parametrize('scale', [1e-5, 1e-4, 0.1])
@pytest.mark.parametrize('filter_wise', [False, True])
def test_parity_has_the_floor_of_mergekit(tmp_path, filter_wise, scale):
  # anchors of 0, in which short displacements are not rounded
  _, models = _family(3, 0.6, scale=1.0)
  models = [{k: np.float32(scale) * x for k, x in m.items()} for m in models]
  for model in models:
    del model['column']  # see `test_filters`
  anchor = {name: np.zeros_like(leaf) for name, leaf in models[0].items()}
  expected = _mergekit(anchor, models, filter_wise)
  unit = 'filter' if filter_wise else 'layer'
  merged = ms.model_stock(
    anchor,
    models,
    unit=unit,
    layers=lambda path, leaf: ms.Layer(filter_axis=0),
    clip='mergekit',
  )
  paths = [tmp_path / f'{name}.safetensors' for name in 'abcd']
  for path, tree in zip(paths, (anchor, *models), strict=True):
    safetensors.numpy.save_file(tree, path)
  out = tmp_path / 'out.safetensors'
  options = options_lib.StockOptions(unit, clip='mergekit')
  files.merge(paths[0], paths[1:], out, options=options)
  written = safetensors.numpy.load_file(out)
  for name, leaf in expected.items():
    tree = np.asarray(merged.params[name])
    np.testing.assert_allclose(tree / scale, leaf / scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      written[name] / scale, leaf / scale, rtol=1e-4, atol=1e-5
    )


def test_torch_tensors_are_not_merged_as_trees():
  tree = {'w': torch.ones(2)}
  with pytest.raises(ValueError, match=r'w of the anchor.*(?s:.*)\.numpy\(\)'):
    ms.model_stock(tree, [tree, tree])
