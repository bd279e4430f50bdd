"""Measurements against float64, and verdicts on cases that are built for them.

Displacements are orthogonal directions of one tensor: d_i = l_i (sqrt(c) s +
sqrt(1 - c) e_i) have cosine c and norms l_i, up to the rounding of float32.
"""

import json

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax import files
from modelstock_jax.merging import options as options_lib

SIZE = 1000


def directions(seed, count):
  rng = np.random.default_rng(seed)
  return np.linalg.qr(rng.normal(size=(SIZE, count)))[0].T


def build(gram, seed=0):
  """Return w_0 of norm 3, and models; the Gram matrix is of norm 1."""
  factor = np.linalg.cholesky(np.asarray(gram, float))
  anchor, *axes = directions(seed, 1 + len(factor))
  steps = factor @ np.array(axes)
  return [np.float32(3 * anchor), *np.float32(3 * (anchor + steps))]


def equal(cosine, *lengths):
  """Return the Gram matrix of lengths and one cosine."""
  lengths = np.array(lengths)
  cosines = np.full((len(lengths),) * 2, cosine)
  np.fill_diagonal(cosines, 1)
  return cosines * np.outer(lengths, lengths)


@pytest.fixture
def judge(save):
  """Returns the verdicts on tensors that take shares of the parameters."""

  def run(*parts):
    names = [
      f'layers.{number}.{repeat}.weight'
      for number, (share, _) in enumerate(parts)
      for repeat in range(share)
    ]
    grams = [gram for share, gram in parts for _ in range(share)]
    columns = [build(gram, seed) for seed, gram in enumerate(grams)]
    trees = [
      dict(zip(names, column, strict=True))
      for column in zip(*columns, strict=True)
    ]
    anchor, models = save(trees, form='file')
    return files.inspect(anchor, models).verdicts

  return run


ALIKE, MIDDLE, APART = (equal(c, 0.1, 0.1) for c in (0.96, 0.5, 0.04))


@pytest.mark.parametrize(
  ('parts', 'words'),
  [
    # t = 2 c / (1 + c): 0.9796, 0.6667, 0.0769.
    ([(1, ALIKE)], {'average': 'A plain average will do (mean ratio 0.98).'}),
    # 0.9474, below 0.95
    ([(1, equal(0.9, 0.1, 0.1))], {'merge': 'Merge: the mean ratio is 0.95.'}),
    (
      [(3, APART), (2, MIDDLE)],
      {
        'base': 'The merge returns your base (60% of the parameters have a '
        'ratio below 0.1): these models share little.'
      },
    ),
    # (2 x 0.0769 + 3 x 0.6667) / 5
    ([(2, APART), (3, MIDDLE)], {'merge': 'Merge: the mean ratio is 0.43.'}),
    # t = 0.1071
    (
      [(1, equal(0.0566, 0.1, 0.1))],
      {'merge': 'Merge: the mean ratio is 0.11.'},
    ),
    (
      [(3, equal(0.5, 0.5, 1.01)), (2, MIDDLE)],
      {
        'foreign': 'Model 2 did not start from this anchor: in 60% of its '
        'parameters the displacement is larger than the weights.'
      },
    ),
    ([(3, equal(0.5, 0.5, 0.99)), (2, MIDDLE)], 'merge'),
    ([(2, equal(0.5, 0.5, 1.01)), (3, MIDDLE)], 'merge'),
    (
      [(1, equal(0.9, 1.4, 1.4))],
      {
        'foreign': 'Model 1 did not start from this anchor: in 100% of its '
        'parameters the displacement is larger than the weights. Model 2 did '
        'not start from this anchor: in 100% of its parameters the '
        'displacement is larger than the weights.'
      },
    ),
    # The third of three, whose mean cosine is -0.3; the others' is 0.1.
    (
      [(1, 0.01 * np.array([[1, 0.5, -0.3], [0.5, 1, -0.3], [-0.3, -0.3, 1]]))],
      {
        'foreign': 'Model 3 may not have started from this anchor: its mean '
        'cosine with the other models is -0.30.'
      },
    ),
    ([(1, equal(-0.09, 0.1, 0.1))], 'base'),
    (
      [(1, equal(0.5, 0.1, 0.031 * 10))],
      {
        'merge': 'Merge: the mean ratio is 0.67.',
        'uneven': 'The models are not on a thin shell: model 2 moved 3.1 times '
        'as far as model 1.',
      },
    ),
    ([(1, equal(0.5, 0.1, 0.29))], {'merge': 'Merge: the mean ratio is 0.67.'}),
  ],
)
def test_verdicts(judge, parts, words):
  actual = judge(*parts)
  if isinstance(words, str):
    assert actual.keys() - {'uneven'} == {words}
  else:
    assert actual == words


@pytest.mark.parametrize(('share', 'rounded'), [(0.16, True), (0.36, False)])
def test_displacements_that_are_rounding(save, share, rounded):
  """Move a share s of ones by one step of bfloat16: |d| = sqrt(s) eps |w_0|."""
  count = int(share * SIZE)
  trees = [{'w': np.ones(SIZE, ml_dtypes.bfloat16)} for _ in range(3)]
  for tree in trees[1:]:
    tree['w'][:count] = 1 + 2**-7
  trees[2]['w'][0] = 1  # or they would be the same
  anchor, models = save(trees, form='file')
  merged = files.inspect(anchor, models)
  assert ('rounding' in merged.verdicts) == rounded
  assert merged.groups['all']['unmoved'] == pytest.approx(
    1 - share + 0.5 / SIZE
  )
  assert merged.groups['all']['rounded'] == rounded
  if rounded:
    assert merged.verdicts['rounding'].startswith(
      '100% of the parameters moved by no more than their dtype rounds'
    )


@pytest.mark.parametrize('unit', ['layer', 'filter', 'model'])
def test_groups(save, unit):
  """Kinds and blocks, in the order of the depth, means over parameters."""
  rng = np.random.default_rng(0)
  shapes = {
    'embed.weight': (30, 4),
    'layers.2.mlp.fc1.weight': (9, 4),
    'layers.10.mlp.fc1.weight': (5, 4),
    'layers.10.norm.weight': (7,),
  }
  shared = {name: rng.normal(size=shape) for name, shape in shapes.items()}
  trees = [{n: rng.normal(size=shape) for n, shape in shapes.items()}]
  for scale in (0.1, 0.2, 0.3):
    trees.append(
      {
        name: trees[0][name] + scale * (shared[name] + rng.normal(size=shape))
        for name, shape in shapes.items()
      }
    )
  trees[1]['embed.weight'][:3] = trees[0]['embed.weight'][:3]  # 12 of 3 x 120
  anchor, models = save(trees, form='file')
  options = options_lib.StockOptions(unit)
  merged = files.inspect(anchor, models, options=options)
  assert list(merged.groups) == [
    *('all', 'embedding', 'mlp', 'norm', 'block 2', 'block 10')
  ]
  steps = {
    name: np.array([tree[name] - trees[0][name] for tree in trees[1:]])
    for name in shapes
  }
  sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
  for group, names in (
    ('all', list(shapes)),
    ('mlp', ['layers.2.mlp.fc1.weight', 'layers.10.mlp.fc1.weight']),
    ('block 10', ['layers.10.mlp.fc1.weight', 'layers.10.norm.weight']),
  ):
    line = merged.groups[group]
    assert line['layers'] == len(names)
    assert line['parameters'] == sum(sizes[name] for name in names)
    weights = [sizes[name] for name in names]
    for key, values in (('cosine', merged.cosine), ('ratio', merged.ratio)):
      means = [np.mean(values[name]) for name in names]
      assert line[key] == pytest.approx(np.average(means, weights=weights))
    squares = np.array(
      [np.sum(steps[name].reshape(3, -1) ** 2, axis=1) for name in names]
    )
    center = sum(np.sum(trees[0][name] ** 2) for name in names)
    expected = np.sqrt(squares.sum(0) / center)
    np.testing.assert_allclose(line['norms'], expected)
    norms = np.sqrt(squares)
    spread = np.std(norms, axis=1) / np.mean(norms, axis=1)
    assert line['spread'] == pytest.approx(np.average(spread, weights=weights))
    returned = [np.mean(np.array(merged.ratio[n]) < 0.1) for n in names]
    assert line['returned'] == pytest.approx(
      np.average(returned, weights=weights)
    )
    unmoved = 4 / sum(weights) if group == 'all' else 0
    assert line['unmoved'] == pytest.approx(unmoved)


def test_an_anchor_of_zeros_has_no_relative_norm(save):
  trees = [{'w': np.zeros(4, np.float32)}]
  for step in ([1, 0, 0, 1], [0, 1, 0, 1]):
    trees.append({'w': np.array(step, np.float32)})
  anchor, models = save(trees, form='file')
  merged = files.inspect(anchor, models)
  assert merged.groups['all']['norms'] is None
  assert list(merged.verdicts) == ['merge']
  assert json.loads(merged.json())['groups']['all']['norms'] is None


def test_inspecting_is_merging_without_the_output(family, save, tmp_path):
  anchor, models = save(family(3))
  before = sorted(tmp_path.rglob('*'))
  inspected = files.inspect(anchor, models, layers=r'(.*)[.][qkv]_proj[.](.*)')
  assert sorted(tmp_path.rglob('*')) == before
  assert inspected.output is None
  merged = files.merge(
    anchor, models, tmp_path / 'out', layers=r'(.*)[.][qkv]_proj[.](.*)'
  )
  assert inspected.json() == merged.report.read_bytes()


def test_what_is_refused(family, save):
  trees = family()
  trees[2] = trees[0]
  anchor, models = save(trees)
  with pytest.raises(ValueError, match='is equal to the anchor in every tens'):
    files.inspect(anchor, models)
