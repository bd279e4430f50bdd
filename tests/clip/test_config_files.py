import pytest

from modelstock_jax import clip
from modelstock_jax.clip import config_files
from modelstock_jax.clip import layouts

# Of openai/clip-vit-large-patch14's config.json on the hub.
L14 = {
  'model_type': 'clip',
  'projection_dim': 768,
  'text_config': {
    'eos_token_id': 2,
    'hidden_size': 768,
    'intermediate_size': 3072,
    'num_attention_heads': 12,
  },
  'vision_config': {
    'hidden_size': 1024,
    'intermediate_size': 4096,
    'num_attention_heads': 16,
    'num_hidden_layers': 24,
    'patch_size': 14,
  },
}
# The ViT-B-32 of open_clip's model_configs.
B32 = {
  'embed_dim': 512,
  'vision_cfg': {
    'image_size': 224,
    'layers': 12,
    'width': 768,
    'patch_size': 32,
  },
  'text_cfg': {
    'context_length': 77,
    'vocab_size': 49408,
    'width': 512,
    'heads': 8,
    'layers': 12,
  },
}


def with_(config, tower, **values):
  return {**config, tower: {**config[tower], **values}}


def test_published_configs():
  assert config_files.from_huggingface(L14) == clip.SIZES['ViT-L/14']
  quick = {**B32, 'quick_gelu': True}
  assert config_files.from_open_clip(quick) == clip.SIZES['ViT-B/32']
  # Without the flag open_clip computes the exact GELU.
  assert config_files.from_open_clip(B32).activation == 'gelu'


@pytest.mark.parametrize('size', clip.SIZES)
def test_what_is_written_is_read(size):
  config = clip.SIZES[size]
  written = config_files.to_huggingface(config)
  assert config_files.from_huggingface(written) == config
  written = config_files.to_open_clip(config)
  assert config_files.from_open_clip(written) == config


def test_image_tower_alone(tiny):
  alone = clip.CLIPConfig(tiny.embed_dim, tiny.vision, None, 'gelu')
  written = config_files.to_huggingface(alone)
  assert written['architectures'] == ['CLIPVisionModelWithProjection']
  assert config_files.from_huggingface(written) == alone
  with pytest.raises(ValueError, match=r'(?s)3 channels, not 2.*no text tower'):
    config_files.to_open_clip(alone)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ({'model_type': 'siglip'}, "'siglip'; 'clip' and 'clip_vision_model'"),
    (with_(L14, 'vision_config', hidden_act='relu'), "'relu' must be one of"),
    (
      with_(L14, 'text_config', hidden_act='gelu'),
      "text_config.hidden_act is 'gelu', must be 'quick_gelu'",
    ),
    (
      with_(L14, 'text_config', eos_token_id=7),
      'eos_token_id is 7, must be 49407',
    ),
    (
      with_(L14, 'vision_config', intermediate_size=1, layer_norm_eps=1e-6),
      r'(?s)layer_norm_eps is 1e-06, must be 1e-05.*size is 1, must be 4096',
    ),
    (
      with_(L14, 'vision_config', num_attention_heads=7),
      'heads=7 does not divide width=1024',
    ),
  ],
)
def test_what_hugging_face_has_and_we_cannot(content, message):
  with pytest.raises(ValueError, match=message):
    config_files.from_huggingface(content)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ({**B32, 'custom_text': True}, 'custom_text=True cannot be read'),
    (
      with_(B32, 'vision_cfg', timm_model_name='vit', patch_dropout=0.5),
      r"(?s)timm_model_name='vit' cannot be read.*patch_dropout=0.5",
    ),
    (with_(B32, 'vision_cfg', layers=[3, 4, 6, 3]), r'depth=\[3, 4, 6, 3\]'),
    (with_(B32, 'text_cfg', mlp_ratio=2.0), 'text_cfg.mlp_ratio=2.0'),
  ],
)
def test_what_open_clip_has_and_we_cannot(content, message):
  with pytest.raises(ValueError, match=message):
    config_files.from_open_clip(content)


def test_switched_off_settings_are_no_obstacle():
  content = with_(B32, 'vision_cfg', ls_init_value=None, patch_dropout=0.0)
  assert config_files.from_open_clip(content) == config_files.from_open_clip(
    B32
  )


@pytest.mark.parametrize('size', clip.SIZES)
def test_openai_sizes_follow_from_the_shapes(size):

  config = clip.SIZES[size]
  shapes = {e.name: e.shape for e in layouts.entries(config, 'openai')}
  assert config_files.from_openai_shapes(shapes) == config


def test_shapes_of_something_else():
  with pytest.raises(ValueError, match=r"'visual.conv1.weight'.*are 1: fc"):
    config_files.from_openai_shapes({'fc.weight': (2, 3)})


def test_configs_of_older_transformers():
  """What stands under *_dict counts, as in transformers; alone, too."""
  tower = {'hidden_size': 128, 'num_attention_heads': 2, 'hidden_act': 'gelu'}
  tower['intermediate_size'] = 512
  stated = {f'{name}_config_dict': tower for name in ('text', 'vision')}
  other = {f'{name}_config': {'hidden_size': 64} for name in ('text', 'vision')}
  empty = dict.fromkeys(('text_config', 'vision_config'))
  for rest in ({}, other, empty):
    content = {'model_type': 'clip', **stated, **rest}
    config = config_files.from_huggingface(content)
    assert config.activation == 'gelu'
    assert config.vision.width == config.text.width == 128
