"""CLIP checkpoints in and out against `transformers`, on random weights.

`transformers` writes what we load, and loads what we write. Embeddings are of
size one; two float32 programs that add in different orders part by 1e-6 over
24 blocks, a tensor in a wrong place by 0.01 and more (see the last test).
"""

import dataclasses
import json
import pathlib
import re
import tempfile

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers import initialization

from modelstock_jax import clip
from modelstock_jax.report import card
from modelstock_jax.report import models

pytestmark = pytest.mark.oracle
REAL = ['ViT-B/32', 'ViT-B/16', 'ViT-L/14']


def _config(size, **overrides):
  return transformers.CLIPConfig(
    projection_dim=size.embed_dim,
    vision_config={
      'projection_dim': size.embed_dim,
      'image_size': size.image_size,
      'patch_size': size.patch_size,
      'hidden_size': size.width,
      'intermediate_size': 4 * size.width,
      'num_hidden_layers': size.depth,
      'num_attention_heads': size.heads,
      **overrides,
    },
    text_config={
      'projection_dim': size.embed_dim,
      'max_position_embeddings': size.context_length,
      'vocab_size': size.vocab_size,
      'hidden_size': size.text_width,
      'intermediate_size': 4 * size.text_width,
      'num_hidden_layers': size.text_depth,
      'num_attention_heads': size.text_heads,
      'bos_token_id': size.vocab_size - 2,
      'eos_token_id': size.vocab_size - 1,
      **overrides,
    },
  )


def _create(size, **overrides):
  """A CLIPModel whose weights are to be filled: those it draws take seconds."""
  with initialization.no_init_weights():
    return transformers.CLIPModel(_config(size, **overrides))


def _image_features(model, images):
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  with torch.inference_mode():
    if isinstance(model, transformers.CLIPVisionModelWithProjection):
      return model(pixels).image_embeds
    return model.get_image_features(pixels).pooler_output


def _text_features(model, tokens):
  ids = torch.from_numpy(tokens.reshape(-1, tokens.shape[-1])).long()
  with torch.inference_mode():
    return model.get_text_features(ids).pooler_output


def _logits(images, texts):
  """Zero-shot logits: 100 x the cosine with the mean direction of a class."""
  texts = torch.nn.functional.normalize(texts.reshape(5, 3, -1), dim=-1)
  classes = torch.nn.functional.normalize(texts.mean(dim=1), dim=-1)
  return 100 * torch.nn.functional.normalize(images, dim=-1) @ classes.T


class Pair:
  """A model of transformers, and what we loaded of the files it wrote."""

  def __init__(self, name, size, theirs, directory, **save):
    theirs.save_pretrained(directory, **save)
    self.name, self.size = name, size
    self.theirs, self.directory = theirs, directory
    self.ours = clip.load_pretrained(directory)


@pytest.fixture(scope='module', params=['tiny', *REAL])
def pair(request, sizes, spread):
  name = request.param
  model = spread(_create(sizes[name]))
  if name == 'ViT-B/16':
    # what the configs of the hub say, for which the end is the highest id
    model.config.text_config.eos_token_id = 2
    model.text_model.eos_token_id = 2
  # B/32 in several files with an index
  save = {'max_shard_size': '200MB'} if name == 'ViT-B/32' else {}
  with tempfile.TemporaryDirectory() as folder:
    yield Pair(name, sizes[name], model, pathlib.Path(folder), **save)


@pytest.fixture(scope='module')
def features(pair, inputs):
  """Image and text features of transformers: float32[2, D], [15, D]."""
  images, tokens = inputs(pair.size)
  return _image_features(pair.theirs, images), _text_features(
    pair.theirs, tokens
  )


def test_config(pair):
  config, size = pair.ours.model.config, pair.size
  assert config.vision.tokens == (size.image_size // size.patch_size) ** 2 + 1
  assert (config.vision.heads, config.text.heads) == (
    size.heads,
    size.text_heads,
  )
  if pair.name in REAL:
    assert config == clip.SIZES[pair.name]
  sharded = (pair.directory / 'model.safetensors.index.json').exists()
  assert sharded == (pair.name == 'ViT-B/32')


def test_embeddings_and_logits(pair, features, inputs, close):
  images, tokens = inputs(pair.size)
  model, params = pair.ours
  image = jax.jit(model.encode_image)(params, images)
  text = jax.jit(model.encode_text)(params, tokens.reshape(15, -1))
  close(f'{pair.name} image embeddings', image, features[0], 1e-5)
  close(f'{pair.name} text embeddings', text, features[1], 1e-5)
  assert float(params['logit_scale']) == pair.theirs.logit_scale.item()

  head = clip.zero_shot_head(text.reshape(5, 3, -1))
  logits = clip.heads.classify(head, image)
  close(f'{pair.name} zero-shot logits', logits, _logits(*features), 1e-4)


def _load(kind, directory):
  """Loads with transformers, which must know every key of the files."""
  model, info = kind.from_pretrained(directory, output_loading_info=True)
  assert not any(info.values()), info
  return model.eval()


def test_transformers_loads_what_we_save(
  pair, features, inputs, close, tmp_path
):
  (model, params), name = pair.ours, pair.name
  images, tokens = inputs(pair.size)
  clip.save_pretrained(params, tmp_path / 'both', config=model.config)
  both = _load(transformers.CLIPModel, tmp_path / 'both')
  state = both.state_dict()
  for key, value in pair.theirs.state_dict().items():
    assert torch.equal(state[key], value), key
  close(
    f'{name} saved, image', _image_features(both, images), features[0], 1e-6
  )
  close(f'{name} saved, text', _text_features(both, tokens), features[1], 1e-6)
  del both, state

  # what a merge of image towers is
  tower = {'image': params['image']}
  clip.save_pretrained(tower, tmp_path / 'tower', config=model.config)
  kind = transformers.CLIPVisionModelWithProjection
  got = _image_features(_load(kind, tmp_path / 'tower'), images)
  close(f'{name} saved tower', got, features[0], 1e-6)


@pytest.fixture
def tiny(sizes, spread):
  return spread(_create(sizes['tiny']))


def test_vision_tower_of_transformers(tiny, sizes, inputs, close, tmp_path):
  tiny.config.vision_config.projection_dim = sizes['tiny'].embed_dim
  tower = transformers.CLIPVisionModelWithProjection(tiny.config.vision_config)
  state = tiny.state_dict()
  tower.load_state_dict({key: state[key] for key in tower.state_dict()})
  tower.eval().save_pretrained(tmp_path)
  model, params = clip.load_pretrained(tmp_path)
  assert params.keys() == {'image'}
  assert model.config.text is None
  images, _ = inputs(sizes['tiny'])
  expected = _image_features(tiny, images)
  close('tower', model.encode_image(params, images), expected, 1e-5)


def test_sharded_files_of_a_tiny_model(tiny, same_bits, tmp_path):
  tiny.save_pretrained(tmp_path / 'one')
  tiny.save_pretrained(tmp_path / 'many', max_shard_size='200KB')
  assert len(list((tmp_path / 'many').glob('model-*.safetensors'))) > 2
  same_bits(
    clip.load_pretrained(tmp_path / 'many').params,
    clip.load_pretrained(tmp_path / 'one').params,
  )


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_files_of_older_versions(tiny, same_bits, tmp_path, name):
  # with a constant of each tower among the weights; before safetensors, pickles
  (tmp_path / 'older').mkdir()
  tiny.config.architectures = ['CLIPModel']
  tiny.config.save_pretrained(tmp_path / 'older')
  state = {key: x.clone() for key, x in tiny.state_dict().items()}
  for tower in (tiny.text_model, tiny.vision_model):
    prefix = 'text' if tower is tiny.text_model else 'vision'
    ids = tower.embeddings.position_ids.clone()
    state[f'{prefix}_model.embeddings.position_ids'] = ids
  save = torch.save if name.endswith('bin') else safetensors.torch.save_file
  save(state, tmp_path / 'older' / name)
  tiny.save_pretrained(tmp_path / 'newer')
  same_bits(
    clip.load_pretrained(tmp_path / 'older').params,
    clip.load_pretrained(tmp_path / 'newer').params,
  )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tiny, same_bits, tmp_path, dtype):
  tiny.to(dtype).save_pretrained(tmp_path / 'half')
  expected = tiny.vision_model.post_layernorm.weight.float().detach().numpy()
  tiny.float().save_pretrained(tmp_path / 'whole')
  half = clip.load_pretrained(tmp_path / 'half').params
  same_bits(half, clip.load_pretrained(tmp_path / 'whole').params)
  same_bits(half['image']['ln_post']['scale'], expected)


@pytest.mark.parametrize('activation', ['gelu', 'quick_gelu'])
def test_activations(sizes, spread, inputs, close, tmp_path, activation):
  theirs = spread(_create(sizes['tiny'], hidden_act=activation))
  theirs.save_pretrained(tmp_path / 'theirs')
  images, tokens = inputs(sizes['tiny'])
  expected = _image_features(theirs, images), _text_features(theirs, tokens)
  model, params = clip.load_pretrained(tmp_path / 'theirs')
  assert model.config.activation == activation
  image = model.encode_image(params, images)
  text = model.encode_text(params, tokens.reshape(15, -1))
  close(f'{activation} image', image, expected[0], 1e-5)
  close(f'{activation} text', text, expected[1], 1e-5)
  clip.save_pretrained(params, tmp_path / 'ours', config=model.config)
  again = _load(transformers.CLIPModel, tmp_path / 'ours')
  close('saved image', _image_features(again, images), expected[0], 1e-6)
  close('saved text', _text_features(again, tokens), expected[1], 1e-6)


def test_nothing_of_the_config_needs_to_be_written(sizes, tiny, tmp_path):
  # what older configs leave out is what transformers has by default
  tiny.save_pretrained(tmp_path)
  path = tmp_path / 'config.json'
  config = json.loads(path.read_text())
  expected = clip.load_pretrained(tmp_path).model.config
  defaults = transformers.CLIPConfig().to_dict()
  for tower in ('vision_config', 'text_config'):
    config[tower] = {
      key: value
      for key, value in config[tower].items()
      if key == 'eos_token_id' or value != defaults[tower].get(key)
    }
  path.write_text(json.dumps(config))
  assert 'hidden_act' not in config['vision_config']
  assert clip.load_pretrained(tmp_path).model.config == expected


@pytest.fixture(scope='module', params=['tiny', 'ViT-B/32'])
def loaded(request, sizes, spread):
  with tempfile.TemporaryDirectory() as folder:
    spread(_create(sizes[request.param])).save_pretrained(folder)
    return clip.load_pretrained(folder)


@pytest.mark.parametrize('layout', ['huggingface', 'open_clip', 'scenic'])
def test_round_trip(loaded, same_bits, tmp_path, layout):
  model, params = loaded
  folder = tmp_path / 'ours'
  clip.save_pretrained(params, folder, format=layout, config=model.config)
  path = folder / 'clip.npy' if layout == 'scenic' else folder
  again = clip.load_pretrained(path, allow_pickle=layout == 'scenic')
  same_bits(again.params, params)
  assert again.model.config == model.config


def test_code_of_the_model_card(sizes, tiny, inputs, close, tmp_path):
  # The card of a fine-tuned classifier says how to load it in transformers
  # and torch, and in JAX; what it says is what runs here.
  size = sizes['tiny']
  tiny.save_pretrained(tmp_path / 'theirs')
  model, params = clip.load_pretrained(tmp_path / 'theirs')
  images, tokens = inputs(size)
  text = model.encode_text(params, tokens.reshape(15, -1))
  head = clip.zero_shot_head(text.reshape(5, 3, -1))
  rng = np.random.default_rng(0)
  head['bias'] = jax.numpy.asarray(rng.normal(size=5).astype(np.float32))
  config = dataclasses.replace(model.config, text=None)
  half = (0.5, 0.5, 0.5)
  model = models.Model(config, {'head': head}, mean=half, std=half)
  clip.save_pretrained(
    {'image': params['image'], 'head': head},
    tmp_path / 'ours',
    config=config,
    labels=['cat', 'dog', 'bird', 'cow', 'fish'],
    card=card.card(model, 'huggingface', 'a test'),
  )
  written = (tmp_path / 'ours' / 'README.md').read_text('utf-8')
  blocks = re.findall(r'```python\n(.*?)```', written, re.DOTALL)
  [code] = [block for block in blocks if 'classifier.safetensors' in block]
  assert len(code.splitlines()) == 10
  names = {
    'directory': str(tmp_path / 'ours'),
    'pixel_values': torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
  }
  with torch.inference_mode():
    for block in blocks:
      exec(block, names)
    embeds = names['tower'](names['pixel_values']).image_embeds
  assert names['labels'] == ['cat', 'dog', 'bird', 'cow', 'fish']
  close('tower', embeds, _image_features(tiny, images), 1e-6)
  # by hand: the cosine with the mean direction of a class, and the bias
  expected = _logits(embeds, _text_features(tiny, tokens))
  expected = expected.numpy() + np.asarray(head['bias'])
  close('logits in torch', names['logits'], expected, 1e-4)
  apply = clip.classifier(names['model'].config, num_classes=5).apply
  loaded = {**names['params'], 'head': names['head']}
  close('logits in JAX', apply(loaded, images), expected, 1e-4)


def test_image_processor(tiny, tmp_path):
  # Pillow's: that on torch needs torchvision.
  tiny.save_pretrained(tmp_path / 'theirs')
  model, params = clip.load_pretrained(tmp_path / 'theirs')
  mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
  clip.save_pretrained(
    params, tmp_path / 'ours', config=model.config, mean=mean, std=std
  )
  actual = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / 'ours')
  size = tiny.config.vision_config.image_size
  photo = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
  got = actual(photo, return_tensors='np', input_data_format='channels_last')
  expected = ((photo / 255 - mean) / std).transpose(2, 0, 1)
  np.testing.assert_allclose(got['pixel_values'][0], expected, atol=1e-5)
  assert actual.size == {'shortest_edge': size}
  assert actual.crop_size == {'height': size, 'width': size}
  assert actual.resample == 3


# The tensors that look alike: which one is which shows in the embeddings.
ALIKE = [
  ('self_attn.q_proj.weight', 'self_attn.k_proj.weight'),
  ('self_attn.k_proj.weight', 'self_attn.v_proj.weight'),
  ('self_attn.q_proj.bias', 'self_attn.v_proj.bias'),
  ('self_attn.q_proj.weight', 'self_attn.out_proj.weight'),
  ('layer_norm1.weight', 'layer_norm2.weight'),
  ('layer_norm1.bias', 'layer_norm2.bias'),
]


@pytest.mark.parametrize(('one', 'other'), ALIKE)
def test_a_swap_would_show(sizes, tiny, inputs, one, other):
  images, tokens = inputs(sizes['tiny'])
  before = _image_features(tiny, images), _text_features(tiny, tokens)
  for tower in (tiny.vision_model, tiny.text_model):
    block = tower.encoder.layers[0]
    a, b = block.get_parameter(one), block.get_parameter(other)
    a.data, b.data = b.data, a.data
  after = _image_features(tiny, images), _text_features(tiny, tokens)
  for x, y in zip(before, after, strict=True):
    assert (x - y).abs().max() > 1e-2
