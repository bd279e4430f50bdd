"""Checkpoints of which a part would be lost in silence, or refused for nothing.

Each after a public report about a merge or a checkpoint.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import files
from modelstock_jax.merging import options as options_lib


def test_shards_without_their_index(family, save, tmp_path):
  """As sglang's PR 32279 has it: one shard of two is half a model."""
  anchor, models = save(family(), form='sharded')
  for path in (anchor, *models):
    (path / 'model.safetensors.index.json').unlink()
  with pytest.raises(
    ValueError, match=r'b holds 3 of 3 shards, and no \*\.saf'
  ):
    files.merge(anchor, models, tmp_path / 'out')
  for path in (anchor, *models):
    for number in (2, 3):
      (path / f'model-0000{number}-of-00003.safetensors').unlink()
  with pytest.raises(ValueError, match=r'1 of 3 shards.* Copy the whole check'):
    files.merge(anchor, models, tmp_path / 'out')


def _add_modules(folder, *, dense):
  (folder / 'modules.json').write_text('[{"path": "1_Pooling"}]')
  for name in ('1_Pooling', *(['2_Dense'] if dense else [])):
    (folder / name).mkdir()
    (folder / name / 'config.json').write_text(json.dumps({'of': name}))
  if dense:
    weights = {'linear.weight': np.ones((2, 2), np.float32)}
    path = folder / '2_Dense' / 'model.safetensors'
    safetensors.numpy.save_file(weights, path)


def test_modules_of_sentence_transformers(family, save, tmp_path):
  """Of sentence-transformers' PR 3776: a folder for each module."""
  anchor, models = save(family())
  _add_modules(anchor, dense=False)
  files.merge(anchor, models, tmp_path / 'out')
  copied = tmp_path / 'out' / '1_Pooling' / 'config.json'
  assert json.loads(copied.read_text()) == {'of': '1_Pooling'}
  _add_modules(models[0], dense=True)
  with pytest.raises(ValueError, match=r'2_Dense/model\.safetensors would not'):
    files.merge(anchor, models, tmp_path / 'again')


@pytest.mark.parametrize('shape', [(0,), (0, 8)])
def test_empty_tensors_of_zero_3(family, save, tmp_path, shape):
  """DeepSpeed's issue 2413: saved before they were gathered."""
  trees = family()
  trees[1]['embed.weight'] = np.zeros(shape, np.float32)
  anchor, models = save(trees)
  for common in (False, True):
    with pytest.raises(
      ValueError, match=r'embed\.weight: empty in some, which'
    ):
      files.merge(anchor, models, tmp_path / 'out', common=common)


@pytest.mark.parametrize(
  'name',
  [
    'blocks.0.attn.k_proj.weight',
    'classifier.weight',
    'vision_model.embeddings.position_embedding.weight',
    'layers.0.attn.relative_position_bias_table',
  ],
)
def test_only_what_grows_is_cut(family, save, tmp_path, name):
  """Mergekit's issue 324: fewer heads or classes are another network."""
  shapes = {'embed.weight': (40, 8), name: (8, 8)}
  trees = family(shapes=shapes)
  trees[2][name] = trees[2][name][:2]
  anchor, models = save(trees)
  for common in (False, True):
    with pytest.raises(ValueError, match='shapes differ') as caught:
      files.merge(anchor, models, tmp_path / 'out', common=common)
    assert '--common' not in str(caught.value)


@pytest.mark.parametrize('tied', [True, False])
def test_a_head_of_the_anchor_alone(family, save, load, tmp_path, tied):
  """Mergekit's issue 424: an untied model would get a random head."""
  trees = family()
  trees[0]['lm_head.weight'] = trees[0]['embed.weight']
  anchor, models = save(trees)
  config = {'tie_word_embeddings': tied, 'vocab_size': 40}
  (anchor / 'config.json').write_text(json.dumps(config))
  out = tmp_path / 'out'
  if tied:
    assert files.merge(anchor, models, out, common=True).left_out == [
      'lm_head.weight'
    ]
    assert load(out).keys() == trees[1].keys()
  else:
    with pytest.raises(
      ValueError, match=r'lm_head\.weight: not in all, and no'
    ):
      files.merge(anchor, models, out, common=True)
    files.merge(anchor / 'model.safetensors', models, out, common=True)


@pytest.mark.parametrize('unit', ['layer', 'filter', 'model'])
@pytest.mark.parametrize('dtype', [None, 'float32'])
def test_masks_that_are_equal_in_all(family, save, load, tmp_path, unit, dtype):
  """Old language models keep a causal mask of -inf as a tensor."""
  trees = family(dtype='float16')
  mask = np.triu(np.full((4, 4), -np.inf, np.float16), k=1)
  mask[3, 0] = np.nan
  for tree in trees:
    tree['attn.causal'] = mask
  anchor, models = save(trees)
  out = tmp_path / 'out'
  options = options_lib.StockOptions(unit)
  merged = files.merge(anchor, models, out, options=options, dtype=dtype)
  written = load(out)['attn.causal']
  assert written.dtype == (dtype or 'float16')
  np.testing.assert_array_equal(written, mask.astype(written.dtype))
  cosine = np.mean(merged.cosine['attn.causal'])
  assert cosine > 0.3 if unit == 'model' else cosine == 0


def test_zeros_that_differ_in_their_sign(family, save, load, tmp_path):
  """Training may leave -0.0 in a bias that stayed 0, which is no difference."""
  trees = family()
  for tree, sign in zip(trees, (1, -1, 1), strict=True):
    tree['fc.bias'] = np.full(4, 0.0 * sign, np.float32)
  anchor, models = save(trees)
  merged = files.merge(anchor, models, tmp_path / 'out')
  assert merged.cosine['fc.bias'] == 0
  np.testing.assert_array_equal(load(tmp_path / 'out')['fc.bias'], np.zeros(4))


def test_the_half_of_a_folder_that_is_complete(family, save, load, tmp_path):
  """Hub folders hold a CLIP of open_clip next to timm's image tower."""
  paths = []
  trees = family()
  for number, tree in enumerate(trees):
    path = tmp_path / f'hub_{number}'
    path.mkdir()
    paths.append(path)
    safetensors.numpy.save_file(tree, path / 'open_clip_model.safetensors')
    tower = {'cls_token': np.zeros((1, 1, 8), np.float32)}
    safetensors.numpy.save_file(tower, path / 'model.safetensors')
    (path / 'open_clip_config.json').write_text('{"model_cfg": {}}')
    (path / 'config.json').write_text('{"pretrained_cfg": {}}')
  files.merge(paths[0], paths[1:], tmp_path / 'out')
  assert (tmp_path / 'out' / 'open_clip_config.json').is_file()
  written = tmp_path / 'out' / 'open_clip_model.safetensors'
  assert safetensors.numpy.load_file(written).keys() == trees[0].keys()
