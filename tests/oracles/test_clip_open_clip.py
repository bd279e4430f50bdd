"""open_clip reads the directories that we write, and we read its own.

open_clip imports torchvision and timm, for models that are not ours. `make`
keeps them in a folder of their own, `open_clip` in the environment: beside
the CPU build of torch, torchvision's compiled operators do not load, and then
`transformers` cannot be imported where it finds torchvision. Nothing here
calls an operator of torchvision; see `_import_torchvision`.
"""

import importlib
import json
import pathlib
import sys
import warnings

import jax
import numpy as np
import pytest
import torch

from modelstock_jax import clip

pytestmark = pytest.mark.oracle


def _import_torchvision():
  """Imports it with or without its operators."""
  try:
    importlib.import_module('torchvision')
  except RuntimeError:
    # 'operator torchvision::nms does not exist': it registers shapes for two
    # operators before it looks whether they are there. Declare them.
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
      library.define(f'{name}(Tensor a, Tensor b, float c) -> Tensor')
    for name in [x for x in sys.modules if x.split('.')[0] == 'torchvision']:
      del sys.modules[name]
    importlib.import_module('torchvision')
    return library  # its declarations go when it does
  return None


@pytest.fixture(scope='module')
def open_clip(undrawn):
  """open_clip, whose models draw no weights: they are filled, or loaded."""
  folder = pathlib.Path(sys.prefix) / 'open_clip'
  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter('ignore')
    patch.syspath_prepend(folder)
    library = _import_torchvision()
    module = importlib.import_module('open_clip')
    with undrawn():
      yield module
    del library


def _model_config(size, quick_gelu=True):
  return {
    'embed_dim': size.embed_dim,
    'quick_gelu': quick_gelu,
    'vision_cfg': {
      'image_size': size.image_size,
      'patch_size': size.patch_size,
      'width': size.width,
      'layers': size.depth,
    },
    'text_cfg': {
      'context_length': size.context_length,
      'vocab_size': size.vocab_size,
      'width': size.text_width,
      'heads': size.text_heads,
      'layers': size.text_depth,
    },
  }


class _NoTokenizer:
  """open_clip saves one along; its default is on the hub."""

  def save_pretrained(self, directory):
    del directory


def _saved(open_clip, config, spread, folder):
  """A random model of open_clip, and the folder it writes for the hub."""
  folder.mkdir()
  path = folder / 'open_clip_config.json'
  path.write_text(json.dumps({'model_cfg': config}))
  model = spread(open_clip.create_model(f'local-dir:{folder}'))
  saving = importlib.import_module('open_clip.push_to_hf_hub')
  saving.save_for_hf(
    model, _NoTokenizer(), config, folder, safe_serialization=True
  )
  return model


def _load(open_clip, folder, **options):
  """Loads strictly: open_clip refuses a missing and an unexpected key."""
  return open_clip.create_model(
    f'local-dir:{folder}', require_pretrained=True, **options
  ).eval()


def _features(model, images, tokens):
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  ids = torch.from_numpy(tokens.reshape(15, -1)).long()
  with torch.inference_mode():
    return model.encode_image(pixels), model.encode_text(ids)


@pytest.mark.parametrize(
  ('name', 'activation'),
  [('tiny', 'quick_gelu'), ('tiny', 'gelu'), ('ViT-B/32', 'quick_gelu')],
)
def test_both_ways(
  open_clip, sizes, spread, inputs, close, tmp_path, name, activation
):
  size = sizes[name]
  config = _model_config(size, activation == 'quick_gelu')
  theirs = _saved(open_clip, config, spread, tmp_path / 'theirs')
  images, tokens = inputs(size)
  expected = _features(theirs, images, tokens)

  model, params = clip.load_pretrained(tmp_path / 'theirs')
  assert model.config.activation == activation
  if name == 'ViT-B/32':
    assert model.config == clip.SIZES[name]
  image = jax.jit(model.encode_image)(params, images)
  text = jax.jit(model.encode_text)(params, tokens.reshape(15, -1))
  close(f'{name} {activation} image', image, expected[0], 1e-5)
  close(f'{name} {activation} text', text, expected[1], 1e-5)

  folder = tmp_path / 'ours'
  clip.save_pretrained(params, folder, format='open_clip', config=model.config)
  again = _load(open_clip, folder)
  state = theirs.state_dict()
  for key, value in again.state_dict().items():
    assert torch.equal(value, state[key]), key
  got = _features(again, images, tokens)
  close(f'{name} {activation} saved image', got[0], expected[0], 1e-6)
  close(f'{name} {activation} saved text', got[1], expected[1], 1e-6)


def test_its_configs_of_openai_sizes_are_ours(open_clip):
  files = clip.config_files
  for name, config in clip.SIZES.items():
    theirs = name.replace('/', '-').replace('@', '-') + '-quickgelu'
    assert files.from_open_clip(open_clip.get_model_config(theirs)) == config


def test_its_names_are_those_of_the_archives(open_clip, sizes):
  # open_clip reads OpenAI's archives without renaming, so one layout will do
  with torch.device('meta'):
    model = open_clip.CLIP(**_model_config(sizes['ViT-B/32']))
  shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
  entries = clip.layouts.entries(clip.SIZES['ViT-B/32'], 'openai')
  assert {entry.name: entry.shape for entry in entries} == shapes


def test_preprocessing_and_a_head_next_to_it(
  open_clip, sizes, spread, tmp_path
):
  size = sizes['tiny']
  theirs = _saved(open_clip, _model_config(size), spread, tmp_path / 'theirs')
  model, params = clip.load_pretrained(tmp_path / 'theirs')
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
  kernel = jax.numpy.ones((size.embed_dim, 3))
  head = {'kernel': kernel, 'bias': jax.numpy.zeros(3)}
  clip.save_pretrained(
    {**params, 'head': head},
    tmp_path / 'ours',
    format='open_clip',
    config=model.config,
    labels=['a', 'b', 'c'],
    mean=mean,
    std=std,
  )
  # open_clip takes the folder's weights, not the head's
  again = _load(open_clip, tmp_path / 'ours')
  assert torch.equal(again.visual.proj, theirs.visual.proj)
  np.testing.assert_allclose(again.visual.image_mean, mean)
  np.testing.assert_allclose(again.visual.image_std, std)


@pytest.mark.parametrize('image_size', [24, 56])
def test_resized_positions(
  open_clip, sizes, spread, inputs, close, tmp_path, image_size
):
  # from a grid of 4 x 4 to 3 x 3 (antialiased) and 7 x 7
  size, folder = sizes['tiny'], tmp_path / 'theirs'
  _saved(open_clip, _model_config(size), spread, folder)
  resized = _load(open_clip, folder, force_image_size=image_size)
  model, params = clip.load_pretrained(folder, image_size=image_size)
  expected = resized.visual.positional_embedding.detach().numpy()
  assert len(expected) == (image_size // size.patch_size) ** 2 + 1
  got = params['image']['positional_embedding']
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
  images, tokens = inputs(size._replace(image_size=image_size))
  features, _ = _features(resized, images, tokens)
  got = model.encode_image(params, images)
  close(f'{image_size} pixels', got, features, 1e-5)
