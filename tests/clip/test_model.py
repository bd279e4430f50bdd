"""The towers against a float64 numpy forward pass written from the paper."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def oracle_norm(p, x):
  mean = x.mean(axis=-1, keepdims=True)
  deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
  return (x - mean) / deviation * p['scale'] + p['bias']


def oracle_affine(p, x):
  return x @ p['kernel'] + p['bias']


def oracle_blocks(p, x, depth, heads, causal):
  """One sequence [T, W]; one head, one query token at a time."""
  size = x.shape[1] // heads
  for i in range(depth):
    block = p[f'block_{i}']
    y = oracle_norm(block['ln_1'], x)
    query, key, value = (
      oracle_affine(block['attention'][name], y)
      for name in ('query', 'key', 'value')
    )
    mixed = np.zeros_like(x)
    for head in range(heads):
      part = slice(head * size, (head + 1) * size)
      for t in range(len(x)):
        seen = t + 1 if causal else len(x)
        score = key[:seen, part] @ query[t, part] / math.sqrt(size)
        weight = np.exp(score)
        mixed[t, part] = (weight / weight.sum()) @ value[:seen, part]
    x = x + oracle_affine(block['attention']['out'], mixed)
    y = oracle_affine(block['mlp']['fc'], oracle_norm(block['ln_2'], x))
    y = y / (1 + np.exp(-1.702 * y))
    x = x + oracle_affine(block['mlp']['proj'], y)
  return x


def oracle_image(p, image, config):
  size, grid = config.patch_size, config.image_size // config.patch_size
  rows = [p['class_embedding']]
  for y in range(grid):
    for x in range(grid):
      patch = image[y * size : (y + 1) * size, x * size : (x + 1) * size]
      rows.append(patch.ravel() @ p['patch_embedding']['kernel'])
  x = oracle_norm(p['ln_pre'], np.stack(rows) + p['positional_embedding'])
  x = oracle_blocks(p, x, config.depth, config.heads, causal=False)
  return oracle_norm(p['ln_post'], x[0]) @ p['projection']['kernel']


def oracle_text(p, tokens, config):
  x = p['token_embedding'][tokens] + p['positional_embedding'][: len(tokens)]
  x = oracle_blocks(p, x, config.depth, config.heads, causal=True)
  x = oracle_norm(p['ln_final'], x)[np.argmax(tokens)]
  return x @ p['projection']['kernel']


@pytest.fixture(scope='module')
def images(tiny):
  size = tiny.vision.image_size
  shape = (4, size, size, tiny.vision.channels)
  return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.fixture(scope='module')
def tokens():
  # The highest id, 18, ends each text; what follows is padding.
  return np.array(
    [[3, 1, 18, 0, 0, 0, 0], [18, 2, 2, 2, 2, 2, 2], [5, 4, 3, 2, 1, 0, 18]],
    np.int32,
  )


@pytest.fixture(scope='module')
def model(tiny):
  return clip.create(tiny)


@pytest.fixture(scope='module')
def encode_image(model):
  return jax.jit(model.encode_image)


@pytest.fixture(scope='module')
def encode_text(model):
  return jax.jit(model.encode_text)


@pytest.fixture(scope='module')
def params(model, randomize):
  return randomize(jax.eval_shape(model.init, jax.random.key(0)))


def test_image_tower_is_the_papers(encode_image, params, images, tiny):
  ours = encode_image(params, images)
  p = float64(params['image'])
  expected = [oracle_image(p, image, tiny.vision) for image in images]
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_text_tower_is_the_papers(encode_text, params, tokens, tiny):
  ours = encode_text(params, tokens)
  p = float64(params['text'])
  expected = [oracle_text(p, row, tiny.text) for row in tokens]
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_classifier_is_normalised_embedding_times_head(tiny, randomize, images):
  model = clip.classifier(tiny, num_classes=6)
  params = randomize(jax.eval_shape(model.init, jax.random.key(0)), seed=1)
  ours = jax.jit(model.apply)(params, images)
  p = float64(params)
  embeddings = np.stack(
    [oracle_image(p['image'], image, tiny.vision) for image in images]
  )
  unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  expected = unit @ p['head']['kernel'] + p['head']['bias']
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_pretrained_tower_drops_into_the_classifier(tiny, model):
  key = jax.random.key(0)
  tower = jax.eval_shape(model.init, key)['image']
  ours = jax.eval_shape(clip.classifier(tiny, 6).init, key)
  assert jax.tree.structure(ours['image']) == jax.tree.structure(tower)
  assert ours['image'] == tower
  assert ours['head']['kernel'].shape == (tiny.embed_dim, 6)
  assert ours['head']['bias'].shape == (6,)


def test_text_after_its_end_and_padding_do_not_matter(encode_text, params):
  text = [3, 1, 18, 0, 0, 0, 0]
  after = [3, 1, 18, 7, 9, 2, 11]
  before = [3, 2, 18, 0, 0, 0, 0]
  rows = encode_text(params, np.array([text, after, before], np.int32))
  np.testing.assert_array_equal(rows[0], rows[1])
  assert np.abs(rows[0] - rows[2]).max() > 1e-2
  short = encode_text(params, np.array([text[:3]], np.int32))
  np.testing.assert_allclose(short[0], rows[0], rtol=1e-5, atol=1e-5)


def test_token_outside_the_vocabulary_is_not_silent(
  encode_text, params, tokens, tiny
):
  wrong = tokens.copy()
  wrong[1, 3] = tiny.text.vocab_size
  rows = encode_text(params, wrong)
  np.testing.assert_array_equal(
    np.isnan(rows).all(axis=1), [False, True, False]
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_vmapped_models_are_separate_models(tiny, randomize, images, dtype):
  vision = dataclasses.replace(tiny.vision, depth=1)
  config = dataclasses.replace(tiny, vision=vision)
  model = clip.classifier(config, num_classes=6, dtype=dtype)
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  both = [randomize(abstract, seed) for seed in (1, 2)]
  batches = jnp.stack([images, images[::-1] * 0.5])

  def loss(params, images):
    return -jax.nn.log_softmax(model.apply(params, images))[:, 3].mean()

  step = jax.value_and_grad(loss)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
  together = jax.jit(jax.vmap(step, spmd_axis_name='stock'))
  values, grads = together(stacked, batches)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  alone = jax.jit(step)
  for i, params in enumerate(both):
    value, grad = alone(params, batches[i])
    np.testing.assert_allclose(values[i], value, rtol=tolerance)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grad))
    for ours, leaf in zip(
      jax.tree.leaves(grads), jax.tree.leaves(grad), strict=True
    ):
      np.testing.assert_allclose(ours[i], leaf, atol=tolerance * scale)


def test_gradient_reaches_every_parameter(tiny, randomize, images):
  model = clip.classifier(tiny, num_classes=6)
  params = randomize(jax.eval_shape(model.init, jax.random.key(0)))
  gradient = jax.jit(jax.grad(lambda p: model.apply(p, images)[:, 0].sum()))
  grads = gradient(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    assert np.isfinite(leaf).all(), name
    # Softmax does not see the key bias: its gradient is zero but for rounding.
    if "['key']['bias']" in name:
      assert np.abs(leaf).max() < 1e-5, name
    else:
      assert np.abs(leaf).max() > 1e-4, name


@pytest.mark.parametrize('remat', ['block', 'dots'])
def test_what_is_computed_again_is_the_same(tiny, randomize, images, remat):
  def gradient(**options):
    model = clip.classifier(tiny, 3, **options)
    params = randomize(model.init(jax.random.key(0)))

    def loss(params):
      return jnp.sum(jnp.square(model.apply(params, images)))

    program = jax.jit(jax.grad(loss)).lower(params).compile()
    return program(params), program.cost_analysis()['flops']

  expected, flops = gradient()
  actual, more_flops = gradient(remat=remat)
  assert more_flops > flops
  for one, other in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_what_to_compute_again_is_a_word_that_is_known(tiny):
  with pytest.raises(ValueError, match=r"remat='all' .*'none', 'dots'"):
    clip.classifier(tiny, 3, remat='all')


def test_bfloat16_computes_with_float32_masters(
  tiny, encode_image, encode_text, params, images, tokens
):
  half = clip.create(tiny, dtype=jnp.bfloat16)
  masters = jax.eval_shape(half.init, jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(masters)} == {np.dtype('float32')}
  for encode, exact, inputs in [
    (half.encode_image, encode_image, images),
    (half.encode_text, encode_text, tokens),
  ]:
    ours = jax.jit(encode)(params, inputs)
    expected = exact(params, inputs)
    assert ours.dtype == jnp.float32
    # bfloat16 keeps 8 bits: about 0.4 % a product, a few per cent in all.
    error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 5e-2


def test_init_is_openais():
  # Published: clip/model.py of OpenAI, initialize_parameters and __init__.
  config = clip.CLIPConfig(
    embed_dim=256,
    vision=clip.VisionConfig(32, 8, width=128, depth=1, heads=2),
    text=clip.TextConfig(50, 100, width=64, depth=2, heads=2),
  )
  model = clip.create(config)
  params = model.init(jax.random.key(0))
  image, text = params['image'], params['text']
  for leaf, std in [
    # Uniform within +- 192**-0.5 has this standard deviation.
    (image['patch_embedding']['kernel'], (3 * 8 * 8 * 3) ** -0.5),
    (image['class_embedding'], 128**-0.5),
    (image['positional_embedding'], 128**-0.5),
    (image['block_0']['attention']['query']['kernel'], 128**-0.5),
    (image['block_0']['attention']['out']['kernel'], (128 * 2) ** -0.5),
    (image['projection']['kernel'], 128**-0.5),
    (text['token_embedding'], 0.02),
    (text['positional_embedding'], 0.01),
    (text['block_1']['attention']['value']['kernel'], 64**-0.5),
    (text['block_1']['mlp']['fc']['kernel'], (2 * 64) ** -0.5),
    (text['block_1']['mlp']['proj']['kernel'], (64 * 4) ** -0.5),
    (text['projection']['kernel'], 64**-0.5),
  ]:
    # The relative error of a std from n draws is about 1 / sqrt(2 n).
    assert np.std(leaf) == pytest.approx(std, rel=4 / (2 * leaf.size) ** 0.5)
    assert abs(np.mean(leaf)) < 4 * std / leaf.size**0.5
  assert not np.any(text['block_0']['attention']['key']['bias'])
  assert np.all(text['block_0']['ln_1']['scale'] == 1)
  assert float(params['logit_scale']) == pytest.approx(math.log(1 / 0.07))

  again = model.init(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, again)
  other = model.init(jax.random.key(1))
  assert np.any(other['image']['class_embedding'] != image['class_embedding'])


def count(config):
  """Parameters of a CLIP, counted by hand from the paper's description."""
  v, t, e = config.vision, config.text, config.embed_dim

  def blocks(width, depth):
    attention = 4 * (width * width + width)
    mlp = (width * 4 * width + 4 * width) + (4 * width * width + width)
    return depth * (attention + mlp + 2 * 2 * width)

  patches = (v.image_size // v.patch_size) ** 2
  vision = 3 * v.patch_size**2 * v.width + v.width + (patches + 1) * v.width
  vision += 2 * 2 * v.width + blocks(v.width, v.depth) + v.width * e
  text = t.vocab_size * t.width + t.context_length * t.width
  text += blocks(t.width, t.depth) + 2 * t.width + t.width * e
  return vision + text + 1


@pytest.mark.parametrize(
  ('size', 'published'),
  [
    ('ViT-B/32', 151_277_313),
    ('ViT-B/16', 149_620_737),
    ('ViT-L/14', 427_616_513),
    ('ViT-L/14@336', 427_944_193),
  ],
)
def test_published_sizes(size, published):
  config = clip.SIZES[size]
  params = jax.eval_shape(clip.create(config).init, jax.random.key(0))
  assert count(config) == published
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


def test_wrong_inputs_are_named(tiny, model, params):
  with pytest.raises(ValueError, match=r'\(2, 6, 6, 3\).*\(batch, 6, 6, 2\)'):
    model.encode_image(params, jnp.zeros((2, 6, 6, 3)))
  with pytest.raises(ValueError, match=r'images are uint8.*floats'):
    model.encode_image(params, jnp.zeros((2, 6, 6, 2), jnp.uint8))
  with pytest.raises(ValueError, match=r'\(1, 8\).*1\.\.7'):
    model.encode_text(params, jnp.zeros((1, 8), jnp.int32))
  with pytest.raises(ValueError, match='tokens are float32'):
    model.encode_text(params, jnp.zeros((1, 7)))
  with pytest.raises(ValueError, match='num_classes=0'):
    clip.classifier(tiny, 0)


def test_one_config_serves_any_square_grid(tiny):
  # The demo's shape: 8x8 digits, one channel, patch 2.
  config = dataclasses.replace(
    tiny, vision=clip.VisionConfig(8, 2, 48, 3, 3, channels=1)
  )
  model = clip.classifier(config, 10)
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert params['image']['positional_embedding'].shape == (17, 48)
  logits = jax.eval_shape(model.apply, params, jnp.zeros((50, 8, 8, 1)))
  assert logits.shape == (50, 10)
