"""State dicts of OpenAI's names: of Model Soups, WiSE-FT and open_clip."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import clip

SIZES = clip.CLIPConfig(
  embed_dim=10,
  vision=clip.VisionConfig(
    image_size=6, patch_size=2, width=64, depth=2, heads=1
  ),
  text=clip.TextConfig(
    context_length=7, vocab_size=19, width=64, depth=1, heads=1
  ),
)
CLASSES = 4
# What classifiers keep of the text tower.
REST = {
  'positional_embedding': (7, 64),
  'text_projection': (64, 10),
  'logit_scale': (),
  'token_embedding.weight': (19, 64),
  'ln_final.weight': (64,),
  'ln_final.bias': (64,),
}


@pytest.fixture(scope='module')
def params(randomize):
  model = clip.create(SIZES)
  return randomize(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(scope='module')
def state(params, tmp_path_factory):
  """The CLIP as a state dict, with a text tower."""
  folder = tmp_path_factory.mktemp('state') / 'clip'
  clip.save_pretrained(params, folder, 'open_clip', config=SIZES)
  return safetensors.numpy.load_file(folder / 'open_clip_model.safetensors')


@pytest.fixture(scope='module')
def head():
  rng = np.random.default_rng(1)
  shapes = {'weight': (CLASSES, 10), 'bias': (CLASSES,)}
  return {
    f'classification_head.{name}': rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


@pytest.fixture(scope='module')
def soup(state, head):
  """A classifier of Model Soups: `ModelWrapper.state_dict()`."""
  tower = {
    f'model.{name}': x
    for name, x in state.items()
    if name.startswith('visual.') or name in REST
  }
  return tower | head


def _wrapped(arrays, prefix):
  return {prefix + name: x for name, x in arrays.items()}


def _wise_ft(arrays):
  return {
    name.replace('model.', 'image_encoder.model.', 1): x
    for name, x in arrays.items()
  }


@pytest.mark.parametrize(
  'wrap',
  [
    lambda arrays: arrays,
    lambda arrays: _wrapped(arrays, 'module.'),
    lambda arrays: _wrapped(arrays, '_orig_mod.module.'),
    _wise_ft,
    lambda arrays: _wrapped(_wise_ft(arrays), 'module._orig_mod.'),
  ],
  ids=['soup', 'ddp', 'compiled', 'wise_ft', 'wise_ft_compiled_ddp'],
)
def test_classifiers(wrap, soup, head, params, save_torch, tmp_path, caplog):
  assert soup.keys() >= {f'model.{name}' for name in REST}
  save_torch(tmp_path / 'model_1.pt', wrap(soup))
  model, actual = clip.load_pretrained(tmp_path / 'model_1.pt')
  assert model.config == dataclasses.replace(SIZES, text=None)
  kernel = head['classification_head.weight'].T
  bias = head['classification_head.bias']
  expected = {
    'image': params['image'],
    'head': {'kernel': kernel, 'bias': bias},
  }
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  guess, rest = (record.getMessage() for record in caplog.records)
  assert 'QuickGELU' in guess
  assert rest.endswith('are of no text tower, and ignored.')


def test_a_classifier_with_its_text_tower(state, head, save_torch, tmp_path):
  save_torch(tmp_path / 'all.pt', _wrapped(state, 'model.') | head)
  model, params = clip.load_pretrained(tmp_path / 'all.pt', activation='gelu')
  assert model.config == dataclasses.replace(SIZES, activation='gelu')
  assert params.keys() == {'image', 'text', 'logit_scale', 'head'}


@pytest.mark.parametrize('form', ['.pt', '.safetensors'])
def test_a_state_dict_does_not_state_its_activation(
  form, state, save_torch, tmp_path
):
  path = tmp_path / f'epoch_3{form}'
  write = save_torch if form == '.pt' else _write_safetensors
  write(path, _wrapped(state, 'module.'))
  with pytest.raises(
    ValueError, match=r'neither the activation .*--activation'
  ):
    clip.load_pretrained(path)
  for activation in ('gelu', 'quick_gelu'):
    config = clip.load_pretrained(path, activation=activation).model.config
    assert config == dataclasses.replace(SIZES, activation=activation)


def _write_safetensors(path, arrays):
  safetensors.numpy.save_file(arrays, path)


def test_wide_towers_need_a_config(save_torch, tmp_path):
  """ViT-H has heads of 80 features, which no tensor shows."""
  config = dataclasses.replace(
    SIZES, vision=dataclasses.replace(SIZES.vision, width=1280, heads=16)
  )
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    jax.eval_shape(clip.create(config).init, jax.random.key(0)),
  )
  clip.save_pretrained(params, tmp_path / 'h', 'open_clip', config=config)
  [file] = (tmp_path / 'h').glob('*.safetensors')
  assert clip.load_pretrained(file).model.config.vision.heads == 16
  with pytest.raises(ValueError, match='up to width 1024'):
    clip.load_pretrained(
      file.rename(tmp_path / 'lone.safetensors'), activation='gelu'
    )


def test_constants_are_of_openai(state, save_torch, tmp_path):
  constant = {'input_resolution': np.array(6, np.int64)}
  save_torch(tmp_path / 'openai.pt', state | constant)
  assert clip.load_pretrained(tmp_path / 'openai.pt').model.config == SIZES


def test_a_head_of_another_size(soup, save_torch, tmp_path):
  wrong = {'classification_head.weight': np.zeros((CLASSES, 9), np.float32)}
  save_torch(tmp_path / 'wrong.pt', soup | wrong)
  with pytest.raises(
    ValueError, match=r'classification_head\.weight: file has \[4, 9\]'
  ):
    clip.load_pretrained(tmp_path / 'wrong.pt')
