"""Compare anchors with Scenic's loaders and networks."""

import dataclasses
import importlib
import json

import flax
import jax
import numpy as np
import pytest

from modelstock_jax import clip

pytestmark = [
  pytest.mark.oracle,
  # Of flax's checkpoints, which Scenic uses.
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
]

# Of heads of 64, the only ones that Scenic's loader of OpenAI's files takes.
TINY = clip.CLIPConfig(
  embed_dim=32,
  vision=clip.VisionConfig(
    image_size=32, patch_size=8, width=128, depth=2, heads=2
  ),
  text=clip.TextConfig(
    width=64, depth=1, heads=1, vocab_size=49408, context_length=77
  ),
)


@pytest.fixture(scope='module')
def params():
  """A CLIP where no leaf is constant."""
  like = jax.eval_shape(clip.create(TINY).init, jax.random.key(0))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean = np.float32(path[-1].key == 'scale')
    noise = rng.standard_normal(leaf.shape, np.float32)
    return jax.numpy.asarray(mean + np.float32(0.1) * noise)

  return jax.tree.map_with_path(draw, like)


@pytest.fixture(scope='module')
def npy(params, tmp_path_factory):
  folder = tmp_path_factory.mktemp('npy')
  clip.save_pretrained(params, folder, format='scenic', config=TINY)
  return folder / 'clip.npy'


@pytest.fixture(scope='module')
def huggingface(params, tmp_path_factory):
  folder = tmp_path_factory.mktemp('huggingface') / 'clip'
  clip.save_pretrained(params, folder, config=TINY, format='huggingface')
  return folder


@pytest.fixture
def model(scenic, make_config):
  """Return a model of the sizes of `TINY`, with five classes."""
  vision = TINY.vision
  sizes = dict(
    patch_size=vision.patch_size,
    features=vision.width,
    num_layers=vision.depth,
    num_heads=vision.heads,
    out_features=TINY.embed_dim,
  )
  return scenic.models.CLIPClassificationModel(
    make_config(model=sizes), {'num_classes': 5, 'target_is_onehot': False}
  )


@pytest.fixture
def init(model):
  variables = model.flax_model.init(
    jax.random.PRNGKey(0), np.zeros((1, 32, 32, 3), np.float32), train=False
  )
  return flax.core.freeze(variables['params'])


def anchor(scenic, **keys):
  block = scenic.options.defaults().anchor
  values = {
    key: value if key == 'allow_pickle' else str(value)
    for key, value in keys.items()
  }
  return scenic.options.Anchor(**{**block.to_dict(), **values})


def same_bits(left, right):
  jax.tree.map(
    np.testing.assert_array_equal,
    flax.core.unfreeze(left),
    flax.core.unfreeze(right),
  )


@pytest.mark.parametrize('written', ['npy', 'huggingface'])
def test_clip_is_read_as_scenic_reads_it(
  scenic, npy, huggingface, init, written
):
  # Scenic's loader of the same weights is the oracle.
  theirs = importlib.import_module('scenic.projects.baselines.clip.model')
  expected = theirs._convert_vars(np.load(npy, allow_pickle=True).tolist())
  path = npy if written == 'npy' else huggingface
  source = anchor(scenic, path=path, head='init', allow_pickle=True)
  actual, model_state = scenic.anchors.load(source, init, {}, 32)
  assert isinstance(actual, flax.core.FrozenDict)
  assert model_state == {}
  same_bits(actual['visual'], expected['params']['visual'])
  same_bits(actual['head'], init['head'])


def test_pickles_take_trust(scenic, npy, init):
  with pytest.raises(ValueError, match='is a pickle'):
    scenic.anchors.load(anchor(scenic, path=npy, head='init'), init, {}, 32)


def test_the_model_is_scenics_clip(scenic, npy, model, init):
  layers = importlib.import_module('scenic.projects.baselines.clip.layers')
  source = anchor(scenic, path=npy, head='init', allow_pickle=True)
  actual = scenic.anchors.load(source, init, {}, 32)[0].unfreeze()
  rng = np.random.default_rng(1)
  kernel = rng.standard_normal((32, 5)).astype(np.float32)
  bias = rng.standard_normal(5).astype(np.float32)
  actual['head'] = {'kernel': kernel, 'bias': bias}
  images = rng.standard_normal((4, 32, 32, 3)).astype(np.float32)
  theirs = layers.CLIP(
    vocab_size=49408,
    embed_dim=32,
    text_features=64,
    text_num_layers=1,
    text_num_heads=1,
    vision_features=128,
    vision_num_layers=2,
    vision_patch_size=8,
  )
  embeddings = theirs.apply(
    {'params': {'visual': actual['visual'], 'logit_scale': np.float32(1)}},
    images,
    method='encode_image',
  )
  expected = np.float64(embeddings) @ np.float64(kernel) + bias
  logits = model.flax_model.apply({'params': actual}, images, train=False)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_zero_shot_head(scenic, npy, init, tmp_path):
  # By Scenic's text tower: 100 x the mean of normalised embeddings.
  loader = importlib.import_module('scenic.projects.baselines.clip.model')
  layers = importlib.import_module('scenic.projects.baselines.clip.layers')
  names = ['tench', 'goldfish', 'shark', 'ray', 'hen']
  templates = ['a photo of a {}.', 'a drawing of a {}.']
  prompts = tmp_path / 'prompts.json'
  prompts.write_text(json.dumps({'names': names, 'templates': templates}))
  source = anchor(
    scenic, path=npy, head='zero_shot', prompts=prompts, allow_pickle=True
  )
  head = scenic.anchors.load(source, init, {}, 32)[0]['head']
  variables = loader._convert_vars(np.load(npy, allow_pickle=True).tolist())
  theirs = layers.CLIP(
    vocab_size=49408,
    embed_dim=32,
    text_features=64,
    text_num_layers=1,
    text_num_heads=1,
    vision_features=128,
    vision_num_layers=2,
    vision_patch_size=8,
  )
  tokenize = clip.load_tokenizer()
  for k, name in enumerate(names):
    tokens = tokenize([template.replace('{}', name) for template in templates])
    embeddings = theirs.apply(variables, tokens, method='encode_text')
    mean = np.float64(embeddings).mean(0)
    expected = 100 * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(head['kernel'][:, k], expected, atol=1e-4)
  np.testing.assert_array_equal(head['bias'], np.zeros(5))


def test_a_head_of_a_user(scenic, huggingface, init, tmp_path):
  head = {'kernel': np.ones((32, 5), np.float32), 'bias': np.ones(5)}
  np.savez(tmp_path / 'head.npz', **head)
  source = anchor(scenic, path=huggingface, head=tmp_path / 'head.npz')
  actual, _ = scenic.anchors.load(source, init, {}, 32)
  np.testing.assert_array_equal(actual['head']['kernel'], head['kernel'])
  head['kernel'] = head['kernel'][:, :3]
  np.savez(tmp_path / 'head.npz', **head)
  with pytest.raises(ValueError, match=r'head/kernel: file has \[32, 3\]'):
    scenic.anchors.load(source, init, {}, 32)
  np.savez(tmp_path / 'head.npz', weight=np.ones(3))
  with pytest.raises(ValueError, match='extra head/weight'):
    scenic.anchors.load(source, init, {}, 32)


def test_clip_has_no_head(scenic, huggingface, init):
  with pytest.raises(ValueError, match='missing head/kernel'):
    scenic.anchors.load(anchor(scenic, path=huggingface), init, {}, 32)


def test_clip_with_gelu_is_refused(scenic, params, init, tmp_path):
  config = dataclasses.replace(TINY, activation='gelu')
  clip.save_pretrained(params, tmp_path / 'c', 'huggingface', config=config)
  source = anchor(scenic, path=tmp_path / 'c', head='init')
  with pytest.raises(ValueError, match='quick_gelu only'):
    scenic.anchors.load(source, init, {}, 32)


def test_no_zero_shot_head_without_a_text_tower(scenic, vit, tmp_path):
  params, _ = vit(8)
  path = tmp_path / 'R_Ti-tiny.npz'
  write_augreg(path, params)
  with pytest.raises(ValueError, match="'zero_shot' takes a text tower"):
    scenic.anchors.load(
      anchor(scenic, path=path, head='zero_shot', prompts='p'), params, {}, 8
    )


@pytest.fixture
def vit(scenic, make_config):
  """A ViT of Scenic's with a class token: params for images of `pixels`."""

  def make(pixels, classes=3):
    config = make_config()
    config.model.classifier = 'token'
    model = scenic.models.ViTClassificationModel(
      config, {'num_classes': classes, 'target_is_onehot': False}
    )
    variables = model.flax_model.init(
      jax.random.PRNGKey(pixels),
      np.zeros((1, pixels, pixels, 3), np.float32),
      train=False,
    )
    return flax.core.freeze(variables['params']), config

  return make


def write_augreg(path, params):
  """The same weights under AugReg's names, with another task's head."""
  before_linen = {
    'LayerNorm_1': 'LayerNorm_2',
    'MlpBlock_0': 'MlpBlock_3',
    'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
  }
  flat = {
    '/'.join(before_linen.get(part, part) for part in name): np.asarray(leaf)
    for name, leaf in flax.traverse_util.flatten_dict(
      flax.core.unfreeze(params)
    ).items()
    if name[0] != 'output_projection'
  }
  flat['head/kernel'] = np.ones((16, 7), np.float32)
  flat['head/bias'] = np.ones(7, np.float32)
  flat['pre_logits/kernel'] = np.ones((16, 16), np.float32)
  flat['pre_logits/bias'] = np.ones(16, np.float32)
  np.savez(path, **flat)


@pytest.mark.parametrize('pixels', [8, 16, 12])
def test_augreg_is_read_as_scenic_reads_it(scenic, vit, tmp_path, pixels):
  theirs = importlib.import_module('scenic.projects.baselines.vit')
  stored, config = vit(8)
  like, _ = vit(pixels)
  path = tmp_path / 'R_Ti-tiny.npz'
  write_augreg(path, stored)
  actual, _ = scenic.anchors.load(
    anchor(scenic, path=path, head='init'), like, {}, pixels
  )
  expected = like.unfreeze()
  theirs._merge_params(expected, stored.unfreeze(), config, config)
  same_bits(actual, expected)


def test_augreg_heads(scenic, vit, tmp_path):
  stored, _ = vit(8)
  path = tmp_path / 'tiny.npz'
  write_augreg(path, stored)
  with pytest.raises(ValueError, match="head to 'init'") as caught:
    scenic.anchors.load(anchor(scenic, path=path), stored, {}, 8)
  assert 'output_projection/kernel: file has [16, 7]' in str(caught.value)
  like, _ = vit(8, classes=7)
  actual, _ = scenic.anchors.load(anchor(scenic, path=path), like, {}, 8)
  assert (actual['output_projection']['kernel'] == 1).all()


def test_scenic_checkpoints(scenic, write_checkpoint, vit, tmp_path):
  stored, _ = vit(8)
  statistics = {'batch_stats': {'norm': {'mean': np.ones(3, np.float32)}}}
  file = write_checkpoint(
    tmp_path, stored.unfreeze(), step=7, model_state=statistics
  )
  zeros = jax.tree.map(np.zeros_like, (stored, statistics))
  for path in (tmp_path, file):
    actual, model_state = scenic.anchors.load(
      anchor(scenic, path=path), *zeros, 8
    )
    same_bits(actual, stored)
    same_bits(model_state, statistics)


def test_files_that_are_no_anchors(
  scenic, write_checkpoint, vit, init, tmp_path
):
  like, _ = vit(8)

  def load(path):
    scenic.anchors.load(anchor(scenic, path=path), like, {}, 8)

  with pytest.raises(FileNotFoundError, match='checkpoint_3'):
    load(tmp_path / 'checkpoint_3')
  (tmp_path / 'checkpoint_3').write_bytes(b'\x81\xa6par')
  with pytest.raises(ValueError, match='not a whole checkpoint'):
    load(tmp_path / 'checkpoint_3')
  (tmp_path / 'broken.npz').write_bytes(b'PK\x03\x04')
  with pytest.raises(ValueError, match=r'not a complete \.npz'):
    load(tmp_path / 'broken.npz')
  np.savez(tmp_path / 'other.npz', x=np.ones(3))
  with pytest.raises(ValueError, match=r"no AugReg ViT.*\['x'\]"):
    load(tmp_path / 'other.npz')
  with pytest.raises(ValueError, match='CLIP is read into'):
    load('openai/clip-vit-base-patch32')
  write_checkpoint(tmp_path / 'clip', init, step=1)
  with pytest.raises(ValueError, match='not of this model') as caught:
    load(tmp_path / 'clip')
  assert 'extra head/kernel' in str(caught.value)
  assert 'missing embedding/kernel' in str(caught.value)
