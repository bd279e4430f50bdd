import jax
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import merging


def leaf_paths(tree):
  return [
    '/'.join(key.key for key in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


@pytest.fixture(scope='module')
def clip_paths(tiny):
  model = clip.create(tiny)
  return leaf_paths(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize(
  ('size', 'units'), [('ViT-B/32', 154), ('ViT-B/16', 154), ('ViT-L/14', 298)]
)
def test_units_of_the_paper(size, units):
  model = clip.classifier(clip.SIZES[size], num_classes=1000)
  paths = leaf_paths(jax.eval_shape(model.init, jax.random.key(0)))
  groups = {clip.clip_layers(path, None).group or path for path in paths}
  assert len(groups) == units


def test_groups_hold_query_key_and_value_alone(clip_paths):
  groups = {}
  for path in clip_paths:
    layer = clip.clip_layers(path, None)
    assert layer.axes == ()
    if layer.group is not None:
      groups.setdefault(layer.group, []).append(path)
  # Two blocks in each tower, a kernel and a bias group in each.
  assert len(groups) == 2 * (2 + 2)
  for members in groups.values():
    parts = [path.rsplit('/', 2) for path in members]
    assert sorted(part[1] for part in parts) == ['key', 'query', 'value']
    assert len({(part[0], part[2]) for part in parts}) == 1


def test_merge_gives_query_key_and_value_one_cosine(tiny, randomize):
  model = clip.classifier(tiny, num_classes=4)
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  anchor, first, second = (randomize(abstract, seed) for seed in range(3))
  merged = merging.model_stock(
    anchor, [first, second], layers=clip.clip_layers, clip=False
  )
  for kind in ('kernel', 'bias'):
    # Fused as OpenAI stores them, in float64.
    displacements = []
    for params in (first, second):
      moved, start = (
        tree['image']['block_1']['attention'] for tree in (params, anchor)
      )
      parts = [
        np.asarray(moved[name][kind], np.float64)
        - np.asarray(start[name][kind], np.float64)
        for name in ('query', 'key', 'value')
      ]
      displacements.append(np.concatenate([part.ravel() for part in parts]))
    a, b = displacements
    expected = a @ b / np.sqrt(a @ a * (b @ b))
    for name in ('query', 'key', 'value'):
      cosine = merged.cosine['image']['block_1']['attention'][name][kind]
      np.testing.assert_allclose(cosine, expected, atol=1e-6)


@pytest.mark.parametrize(
  ('path', 'depth'),
  [
    ('image/block_11/attention/key/kernel', 11),
    ('text/block_0/attention/out/bias', 0),
    ('image/block_3/mlp/proj/kernel', 3),
    ('image/block_3/ln_2/bias', 3),
    ('image/ln_pre/scale', None),
    ('head/bias', None),
  ],
)
def test_depth(path, depth):
  assert clip.layer_depth(path) == depth
