"""Displacements whose squares leave float32, parity modes, and bad leaves."""

import functools
import types

import jax
from jax import numpy as jnp
from jax import sharding as js
import numpy as np
import pytest

import modelstock_jax as ms
from modelstock_jax.merging import geometry

SIZES = [1e-25, 1e-19, 1e19, 1e25]
FORMS = ['list', 'stack', 'jit', 'vmap', 'shards']


def _steps(num_models, shape=(1000,)):
  """Displacements with cosines of about 0.5, float32[N, ...]."""
  rng = np.random.default_rng(0)
  steps = rng.normal(size=shape) + rng.normal(size=(num_models, *shape))
  return steps.astype(np.float32)


def _merge(anchor, models, form, **options):
  if form == 'list':
    return ms.model_stock(anchor, models, **options)
  stack = ms.stack(models)
  merge = functools.partial(ms.model_stock, stacked=True, **options)
  if form == 'vmap':
    trees = jax.tree.map(lambda x: jnp.stack([x, x]), (anchor, stack))
    return jax.tree.map(lambda x: x[0], jax.vmap(merge)(*trees))
  if form == 'shards':
    mesh = js.Mesh(np.array(jax.devices()[:4]), ('data',))
    spec = {name: js.PartitionSpec('data') for name in anchor}
    lead = {name: js.PartitionSpec(None, 'data') for name in anchor}
    anchor, stack = (
      {k: jax.device_put(x, js.NamedSharding(mesh, s[k])) for k, x in t.items()}
      for t, s in ((anchor, spec), (stack, lead))
    )
  return (merge if form == 'stack' else jax.jit(merge))(anchor, stack)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', SIZES)
def test_squares_out_of_range(merge_layer, size, form):
  anchor = {'w': np.zeros(1000, np.float32), 'normal': np.ones(8, np.float32)}
  models = [
    {'w': step * np.float32(size), 'normal': anchor['normal'] + step[:8]}
    for step in _steps(2)
  ]
  merged = _merge(anchor, models, form)
  for name in anchor:
    params, cosine, t = merge_layer(anchor[name], [m[name] for m in models])
    np.testing.assert_allclose(merged.cosine[name], cosine, rtol=1e-5)
    np.testing.assert_allclose(merged.ratio[name], t, rtol=1e-5)
    np.testing.assert_allclose(
      merged.params[name], params, rtol=1e-5, atol=1e-5 * np.abs(params).max()
    )


@pytest.mark.parametrize('num_models', [3, 7])
@pytest.mark.parametrize('unit', ['filter', 'model'])
@pytest.mark.parametrize('size', [1e-25, 1e25])
def test_units_out_of_range(merge_layer, size, unit, num_models):
  # one filter in range beside those that are not
  steps = _steps(num_models, (16, 4)) * np.float32([size, size, size, 1])
  merged = ms.model_stock(np.zeros((16, 4), np.float32), list(steps), unit=unit)
  if unit == 'model':
    assert float(merged.cosine) == pytest.approx(
      merge_layer(np.zeros((16, 4)), steps)[1], rel=1e-5
    )
    return
  for i in range(4):
    _, cosine, _ = merge_layer(np.zeros(16), steps[..., i])
    np.testing.assert_allclose(merged.cosine[i], cosine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('sizes', [(1e-25, 1), (1e-25, 1e25), (1, 1e25)])
def test_models_of_unequal_sizes(merge_layer, sizes):
  steps = _steps(2) * np.float32(sizes)[:, None]
  cosine = ms.displacement_cosine(np.zeros(1000, np.float32), list(steps))
  _, expected, _ = merge_layer(np.zeros(1000), steps)
  assert float(cosine) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('size', [1e-25, 1e25])
def test_yoyo_out_of_range(size):
  # its coefficients do not depend on the size
  anchor, steps = np.zeros(1000, np.float32), _steps(3)
  expected = ms.yoyo_scale(anchor, list(steps)).coefficients
  actual = ms.yoyo_scale(anchor, list(steps * np.float32(size))).coefficients
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_gram_is_that_of_the_displacements():
  steps = np.float32(1e-15) * _steps(2)  # squares of 1e-30, their sum 1e-27
  gram = ms.displacement_gram(np.zeros(1000, np.float32), list(steps))
  expected = np.float64(steps) @ np.float64(steps).T
  np.testing.assert_allclose(gram, expected, rtol=1e-5)


@pytest.mark.parametrize('average', ['cosine', 'angle'])
@pytest.mark.parametrize('shape', [(300,), (128, 512)], ids=str)
def test_normal_displacements_have_the_bits_of_the_formula(shape, average):
  anchor = np.random.default_rng(1).normal(size=shape).astype(np.float32)
  models = [anchor + np.float32(1e-3) * step for step in _steps(3, shape)]

  @jax.jit
  def plain(anchor, models):
    gram = geometry.gram(anchor, models, num_models=3)
    return geometry.mean_cosine(gram, average)

  actual = ms.displacement_cosine(anchor, models, average=average)
  assert float(actual) == float(plain(anchor, models))


def test_gradient_out_of_range():
  # of the cosine, which does not depend on the size: 1 / size times as large
  anchor, steps = jnp.zeros(100), jnp.asarray(_steps(2, (100,)))
  grad = jax.grad(lambda m: ms.displacement_cosine(anchor, [m, steps[1]]))
  np.testing.assert_allclose(
    grad(steps[0] * 1e-25) * 1e-25, grad(steps[0]), rtol=1e-4, atol=1e-8
  )


def _parity(anchor, models, clip):
  """The notebook's and mergekit's merge of a layer, in float64."""
  anchor, *models = np.float64([anchor, *models])
  steps = [model - anchor for model in models]
  cosines = []
  for i, left in enumerate(steps):
    for right in steps[i + 1 :]:
      norms = np.linalg.norm(left) * np.linalg.norm(right)
      norms = norms + 1e-8 if clip == 'authors' else max(norms, 1e-6)
      cosines.append(np.clip(left @ right / norms, -1, 1))
  c, N = np.mean(cosines), len(models)
  t = N * c / (1 + (N - 1) * c)
  return t * np.mean(models, axis=0) + (1 - t) * anchor, c


@pytest.mark.parametrize('num_models', [2, 3, 7])
@pytest.mark.parametrize('size', [1e-25, 1e-6, 1e-5, 1e-4, 1.0, -1.0])
@pytest.mark.parametrize('clip', ['authors', 'mergekit'])
def test_parity(clip, size, num_models):
  steps = np.float32(abs(size)) * _steps(num_models, (50,))
  if size < 0:  # a negative cosine, which neither takes for 0
    steps[0] *= -0.3
  anchor = np.zeros(50, np.float32)
  merged = ms.model_stock(anchor, list(steps), clip=clip)
  params, cosine = _parity(anchor, steps, clip)
  np.testing.assert_allclose(merged.cosine, cosine, rtol=1e-5, atol=1e-30)
  scale = np.abs(steps).max()
  np.testing.assert_allclose(
    merged.params / scale, params / scale, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('clip', ['authors', 'mergekit'])
def test_parity_of_layers_that_did_not_move(clip):
  anchor = jnp.array([1.0, 2.0])

  def loss(model):
    return jnp.sum(ms.model_stock(anchor, [model, model], clip=clip).params)

  merged = ms.model_stock(anchor, [anchor, anchor], clip=clip)
  assert merged.params.tolist() == [1.0, 2.0]
  assert merged.cosine == 0
  assert jnp.all(jnp.isfinite(jax.grad(loss)(anchor)))


@pytest.mark.parametrize('strength', [-0.5, np.float32(-1), jnp.float32(-1)])
def test_negative_strength(strength):
  tree = {'w': jnp.ones(2)}
  with pytest.raises(ValueError, match='strength: must be at least 0, got -'):
    ms.model_stock(tree, [tree, tree], strength=strength)


class _Tensor:
  """A torch tensor, as far as a merge looks at it."""

  shape, dtype, __module__ = (2,), 'torch.float32', 'torch'


@pytest.mark.parametrize('name', ['the anchor', 'model 1'])
def test_torch_tensors(name):
  trees = {'the anchor': {'w': jnp.ones(2)}}
  trees |= {f'model {i}': {'w': jnp.ones(2)} for i in range(2)}
  trees[name] = {'w': _Tensor()}
  anchor, *models = trees.values()
  with pytest.raises(ValueError, match=rf'(?s)w of {name}.*\.numpy\(\)'):
    ms.model_stock(anchor, models)


MERGES = types.MappingProxyType(
  {
    'model_stock': lambda a, b: ms.model_stock(a, [b, b]),
    'stacked': lambda a, b: ms.model_stock(
      a, {'w': np.stack([b['w']] * 2)}, stacked=True
    ),
    'stack': lambda a, b: ms.stack([a, b]),
    'wise_ft': ms.wise_ft,
    'uniform_soup': lambda a, b: ms.uniform_soup([a, b]),
  }
)


@pytest.mark.parametrize('merge', MERGES)
def test_float64_is_never_narrowed(merge):
  tree = {'w': np.ones(2)}
  with pytest.raises(ValueError, match=r'(?s)float64.*w of .*jax_enable_x64'):
    MERGES[merge](tree, tree)


def test_a_float64_anchor_of_float32_models():
  models = [{'w': np.ones(2, np.float32)}] * 2
  with pytest.raises(ValueError, match=r"(?s)w of the anchor.*astype\('float3"):
    ms.model_stock({'w': np.ones(2)}, models)


def test_a_float64_anchor_of_float32_models_with_x64(x64):
  models = [{'w': np.ones(2, np.float32)}] * 2
  with pytest.raises(ValueError, match=r'w: the anchor has float64.*float32'):
    ms.model_stock({'w': np.ones(2)}, models)
