"""Scenic's CLIP on the weights that we write for it.

Scenic is not on PyPI (the package of that name there is another project).
The tests run where `scenic.projects.baselines.clip` can be imported, or where
MODELSTOCK_SCENIC names the folder of a checkout that holds the package
`scenic`; else they are skipped, or with MODELSTOCK_REQUIRE_SCENIC=1 fail.
"""

import importlib
import os

import jax
import numpy as np
import pytest

from modelstock_jax import clip

pytestmark = pytest.mark.oracle
NAMES = {'ViT-B/32': 'vit_b32', 'ViT-L/14': 'vit_l14'}


@pytest.fixture(scope='module')
def scenic():
  """Scenic's module `model`, which reads checkpoints."""
  with pytest.MonkeyPatch.context() as patch:
    if 'MODELSTOCK_SCENIC' in os.environ:
      patch.syspath_prepend(os.environ['MODELSTOCK_SCENIC'])
    try:
      return importlib.import_module('scenic.projects.baselines.clip.model')
    except ImportError as error:
      if os.environ.get('MODELSTOCK_REQUIRE_SCENIC') == '1':
        raise
      pytest.skip(
        f'no Scenic ({error}). Set MODELSTOCK_SCENIC to the folder of a '
        'checkout of google-research/scenic.'
      )


def _random(config):
  """Parameters where no bias is 0, no scale 1, no attention uniform."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    mean, std = 0.0, 0.1
    if path[-1].key == 'scale':
      mean = 1.0
    elif path[-1].key == 'kernel':
      std = leaf.shape[0] ** -0.5
    value = rng.standard_normal(leaf.shape, np.float32)
    return jax.numpy.asarray(np.float32(mean) + np.float32(std) * value)

  like = jax.eval_shape(clip.create(config).init, jax.random.key(0))
  return jax.tree.map_with_path(draw, like)


@pytest.mark.parametrize('name', NAMES)
def test_scenic_computes_the_same(scenic, sizes, inputs, tmp_path, name):
  config = clip.SIZES[name]
  params = _random(config)
  clip.save_pretrained(params, tmp_path, format='scenic', config=config)
  path = str(tmp_path / 'clip.npy')
  theirs = getattr(scenic, NAMES[name])()
  loaded = scenic.load_model_vars(NAMES[name], path)
  model = clip.create(config)

  images, tokens = inputs(sizes[name])
  tokens = tokens.reshape(15, -1)
  for tower, x in (('image', images), ('text', tokens)):
    expected = np.asarray(
      jax.jit(
        lambda variables, x, method=f'encode_{tower}': theirs.apply(
          variables, x, normalize=False, method=method
        )
      )(loaded, x)
    )
    got = np.asarray(jax.jit(getattr(model, f'encode_{tower}'))(params, x))
    assert got.shape == expected.shape == (len(x), config.embed_dim)
    # Of embeddings brought to length one, as Scenic gives them by default.
    length = np.linalg.norm(expected, axis=-1, keepdims=True)
    difference = np.max(np.abs(got - expected) / length)
    print(
      f'{name} {tower}: max abs difference {difference:.2e} at length one, '
      f'{np.max(np.abs(got - expected)):.2e} at length {length.mean():.1f}'
    )
    assert np.max(np.std(expected / length, axis=0)) > 1e-3
    assert difference < 1e-6


def test_checkpoints_of_scenic_load(scenic, same_bits, tmp_path):
  # The dictionary that Scenic writes when it has downloaded OpenAI's weights,
  # with the constants of the archive among the tensors.
  config = clip.SIZES['ViT-B/32']
  params = _random(config)
  clip.save_pretrained(params, tmp_path, format='scenic', config=config)
  state = np.load(tmp_path / 'clip.npy', allow_pickle=True).tolist()
  state['input_resolution'] = np.array(224)
  state['context_length'] = np.array(77)
  state['vocab_size'] = np.array(49408)
  path = tmp_path / 'vit_b32.npy'
  with path.open('wb') as file:
    np.save(file, state)
  loaded = scenic.load_model_vars('vit_b32', str(path))
  assert loaded['params'].keys() == {'logit_scale', 'text', 'visual'}
  again = clip.load_pretrained(path, allow_pickle=True)
  assert again.model.config == config
  same_bits(again.params, params)
