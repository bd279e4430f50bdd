import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax.clip import layouts


def by_name(config, layout):
  return {entry.name: entry for entry in layouts.entries(config, layout)}


def test_names_and_shapes_of_openai():
  # Of the ViT-B/32 archive, as Scenic's and open_clip's converters list them.
  actual = by_name(clip.SIZES['ViT-B/32'], 'openai')
  block = 'resblocks.11'
  expected = {
    'logit_scale': (),
    'visual.conv1.weight': (768, 3, 32, 32),
    'visual.class_embedding': (768,),
    'visual.positional_embedding': (50, 768),
    'visual.ln_pre.weight': (768,),
    'visual.ln_post.bias': (768,),
    'visual.proj': (768, 512),
    f'visual.transformer.{block}.attn.in_proj_weight': (2304, 768),
    f'visual.transformer.{block}.attn.in_proj_bias': (2304,),
    f'visual.transformer.{block}.attn.out_proj.weight': (768, 768),
    f'visual.transformer.{block}.ln_2.weight': (768,),
    f'visual.transformer.{block}.mlp.c_fc.weight': (3072, 768),
    f'visual.transformer.{block}.mlp.c_proj.weight': (768, 3072),
    'token_embedding.weight': (49408, 512),
    'positional_embedding': (77, 512),
    'ln_final.weight': (512,),
    'text_projection': (512, 512),
    f'transformer.{block}.attn.in_proj_weight': (1536, 512),
  }
  assert {name: actual[name].shape for name in expected} == expected


def test_names_and_shapes_of_hugging_face():
  actual = by_name(clip.SIZES['ViT-L/14'], 'huggingface')
  vision, text = 'vision_model.encoder.layers.23', 'text_model.encoder.layers.0'
  expected = {
    'logit_scale': (),
    'visual_projection.weight': (768, 1024),
    'text_projection.weight': (768, 768),
    'vision_model.embeddings.class_embedding': (1024,),
    'vision_model.embeddings.patch_embedding.weight': (1024, 3, 14, 14),
    'vision_model.embeddings.position_embedding.weight': (257, 1024),
    'vision_model.pre_layrnorm.weight': (1024,),
    'vision_model.post_layernorm.bias': (1024,),
    f'{vision}.layer_norm1.weight': (1024,),
    f'{vision}.self_attn.q_proj.weight': (1024, 1024),
    f'{vision}.self_attn.out_proj.bias': (1024,),
    f'{vision}.mlp.fc1.weight': (4096, 1024),
    f'{vision}.mlp.fc2.weight': (1024, 4096),
    'text_model.embeddings.token_embedding.weight': (49408, 768),
    'text_model.embeddings.position_embedding.weight': (77, 768),
    'text_model.final_layer_norm.weight': (768,),
    f'{text}.self_attn.v_proj.bias': (768,),
  }
  assert {name: actual[name].shape for name in expected} == expected


@pytest.mark.parametrize(
  ('size', 'blocks'), [('ViT-B/32', 12), ('ViT-B/16', 12), ('ViT-L/14', 24)]
)
def test_how_many_tensors(size, blocks):
  # 16 tensors a block with q, k, v apart, 12 with them in one; the towers
  # have 8 and 5 besides, and there is the scale.
  huggingface = by_name(clip.SIZES[size], 'huggingface')
  openai = by_name(clip.SIZES[size], 'openai')
  assert len(huggingface) == 16 * (blocks + 12) + 8 + 5 + 1
  assert len(openai) == 12 * (blocks + 12) + 8 + 5 + 1
  # The paper's units: the image tower of OpenAI, and a head of two.
  image = [name for name in openai if name.startswith('visual.')]
  assert len(image) + 2 == {12: 154, 24: 298}[blocks]


def test_every_leaf_is_in_one_tensor(tiny):
  for layout in ('openai', 'huggingface'):
    leaves = [p for e in layouts.entries(tiny, layout) for p in e.leaves]
    assert len(leaves) == len(set(leaves)) == 16 * 4 + 8 + 5 + 1


def test_where_each_number_goes(tiny):
  """Leaf by leaf, from what PyTorch's modules compute with their tensors."""
  rng = np.random.default_rng(0)
  entries = by_name(tiny, 'openai')

  convolution = entries['visual.conv1.weight']
  theirs = rng.normal(size=convolution.shape)  # [out, channel, y, x]
  [ours] = layouts.split(convolution, theirs)
  for (out, channel, y, x), value in np.ndenumerate(theirs):
    # A patch is flattened in reading order, its channels last.
    assert ours[(y * 2 + x) * 2 + channel, out] == value

  fused = entries['transformer.resblocks.1.attn.in_proj_weight']
  theirs = rng.normal(size=(24, 8))  # x @ theirs.T is q, k, v side by side
  query, key, value = layouts.split(fused, theirs)
  assert [path.split('/')[-2] for path in fused.leaves] == [
    'query',
    'key',
    'value',
  ]
  x = rng.normal(size=8)
  np.testing.assert_allclose(
    np.concatenate([x @ query, x @ key, x @ value]), theirs @ x
  )

  projection = entries['visual.proj']
  [ours] = layouts.split(projection, theirs[:12])
  np.testing.assert_array_equal(ours, theirs[:12])  # x @ proj in both


@pytest.mark.parametrize('layout', ['openai', 'huggingface'])
def test_join_undoes_split(tiny, layout):
  rng = np.random.default_rng(0)
  for entry in layouts.entries(tiny, layout):
    tensor = np.asarray(rng.normal(size=entry.shape))
    joined = layouts.join(entry, layouts.split(entry, tensor))
    np.testing.assert_array_equal(joined, tensor, err_msg=entry.name)
    assert joined.flags.c_contiguous, entry.name  # files hold its memory
