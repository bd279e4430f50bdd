"""Sizes of a CLIP, from and to what other tools write beside the weights."""

from collections.abc import Mapping
import re
from typing import Any

from modelstock_jax.clip import config as clip_config

_HF_ACTIVATIONS = ('quick_gelu', 'gelu')


def from_huggingface(found: Mapping[str, Any]) -> clip_config.CLIPConfig:
  """Sizes from the `config.json` of a `transformers` CLIP.

  Args:
    found: the contents; `model_type` is 'clip' or 'clip_vision_model'. What
      is not there has the default of `transformers.CLIPConfig`.

  Raises:
    ValueError: it is another model, or one that our towers cannot be.

  >>> from_huggingface({'model_type': 'clip'}).vision.patch_size
  32
  """
  kind = found.get('model_type')
  if kind == 'clip':
    vision = dict(found.get('vision_config') or {})
    text = dict(found.get('text_config') or {})
    embed_dim = found.get('projection_dim', 512)
  elif kind == 'clip_vision_model':
    vision, text = dict(found), None
    embed_dim = found.get('projection_dim', 512)
  else:
    raise ValueError(
      f"model_type is {kind!r}; 'clip' and 'clip_vision_model' can be read."
    )
  problems = []
  activation = vision.get('hidden_act', 'quick_gelu')
  for tower, block, width in (
    ('vision', vision, vision.get('hidden_size', 768)),
    ('text', text, text.get('hidden_size', 512) if text is not None else 0),
  ):
    if block is None:
      continue
    fixed = {
      'hidden_act': (activation, 'quick_gelu'),
      'layer_norm_eps': (1e-5, 1e-5),
      'intermediate_size': (4 * width, {'vision': 3072, 'text': 2048}[tower]),
    }
    problems += [
      f'{tower}_config.{key} is {block.get(key, default)!r}, must be {ours!r}'
      for key, (ours, default) in fixed.items()
      if block.get(key, default) != ours
    ]
  if activation not in _HF_ACTIVATIONS:
    problems.append(
      f'hidden_act is {activation!r}, must be one of {_HF_ACTIVATIONS}'
    )
  if text is not None:
    vocab_size = text.get('vocab_size', 49408)
    # 2 stands in the configs of OpenAI's weights and means what we do: pool
    # at the highest id. Any other is found by its value.
    end = text.get('eos_token_id', 49407)
    if end not in (2, vocab_size - 1):
      problems.append(
        f'text_config.eos_token_id is {end!r}, must be 2 or the last id, '
        f'{vocab_size - 1}'
      )
  _raise(problems)
  return clip_config.CLIPConfig(
    embed_dim=embed_dim,
    vision=clip_config.VisionConfig(
      image_size=vision.get('image_size', 224),
      patch_size=vision.get('patch_size', 32),
      width=vision.get('hidden_size', 768),
      depth=vision.get('num_hidden_layers', 12),
      heads=vision.get('num_attention_heads', 12),
      channels=vision.get('num_channels', 3),
    ),
    text=None
    if text is None
    else clip_config.TextConfig(
      context_length=text.get('max_position_embeddings', 77),
      vocab_size=text.get('vocab_size', 49408),
      width=text.get('hidden_size', 512),
      depth=text.get('num_hidden_layers', 12),
      heads=text.get('num_attention_heads', 8),
    ),
    activation=activation,
  )


def to_huggingface(config: clip_config.CLIPConfig) -> dict[str, Any]:
  """The `config.json` that `transformers` reads: the inverse of the above."""
  vision = dict(
    model_type='clip_vision_model',
    hidden_act=config.activation,
    hidden_size=config.vision.width,
    image_size=config.vision.image_size,
    intermediate_size=4 * config.vision.width,
    layer_norm_eps=1e-5,
    num_attention_heads=config.vision.heads,
    num_channels=config.vision.channels,
    num_hidden_layers=config.vision.depth,
    patch_size=config.vision.patch_size,
    projection_dim=config.embed_dim,
  )
  if config.text is None:
    return dict(
      vision, architectures=['CLIPVisionModelWithProjection'], dtype='float32'
    )
  text = dict(
    model_type='clip_text_model',
    bos_token_id=config.text.vocab_size - 2,
    eos_token_id=config.text.vocab_size - 1,
    pad_token_id=0,
    hidden_act=config.activation,
    hidden_size=config.text.width,
    intermediate_size=4 * config.text.width,
    layer_norm_eps=1e-5,
    max_position_embeddings=config.text.context_length,
    num_attention_heads=config.text.heads,
    num_hidden_layers=config.text.depth,
    projection_dim=config.embed_dim,
    vocab_size=config.text.vocab_size,
  )
  return dict(
    architectures=['CLIPModel'],
    dtype='float32',
    model_type='clip',
    projection_dim=config.embed_dim,
    text_config=text,
    vision_config=vision,
  )


def from_open_clip(found: Mapping[str, Any]) -> clip_config.CLIPConfig:
  """Sizes from the `model_cfg` of an `open_clip_config.json`.

  Raises:
    ValueError: it asks for what our towers cannot be, such as a timm model.

  >>> vision = dict(image_size=224, layers=12, width=768, patch_size=32)
  >>> from_open_clip(dict(embed_dim=512, vision_cfg=vision, text_cfg={})).text
  TextConfig(context_length=77, vocab_size=49408, width=512, depth=12, heads=8)
  """
  vision = dict(found.get('vision_cfg') or {})
  text = dict(found.get('text_cfg') or {})
  problems = [
    *_foreign('', found, _OPEN_CLIP),
    *_foreign('vision_cfg.', vision, _OPEN_CLIP_VISION),
    *_foreign('text_cfg.', text, _OPEN_CLIP_TEXT),
  ]
  if not isinstance(vision.get('layers', 12), int):
    problems.append(
      f'vision_cfg.layers is {vision["layers"]!r}, a ResNet; only vision '
      'transformers can be read'
    )
  _raise(problems)
  width = vision.get('width', 768)
  return clip_config.CLIPConfig(
    embed_dim=found.get('embed_dim', 512),
    vision=clip_config.VisionConfig(
      image_size=vision.get('image_size', 224),
      patch_size=vision.get('patch_size', 16),
      width=width,
      depth=vision.get('layers', 12),
      heads=width // vision.get('head_width', 64),
    ),
    text=clip_config.TextConfig(
      context_length=text.get('context_length', 77),
      vocab_size=text.get('vocab_size', 49408),
      width=text.get('width', 512),
      depth=text.get('layers', 12),
      heads=text.get('heads', 8),
    ),
    activation='quick_gelu' if found.get('quick_gelu') else 'gelu',
  )


def to_open_clip(config: clip_config.CLIPConfig) -> dict[str, Any]:
  """The `model_cfg` that open_clip reads: the inverse of the above.

  Raises:
    ValueError: open_clip cannot be told of such a CLIP.
  """
  vision, text = config.vision, config.text
  problems = []
  if vision.channels != 3:
    problems.append(f'it takes images of 3 channels, not {vision.channels}')
  if text is None:
    problems.append('it takes both towers, and there is no text tower')
  _raise(problems, 'open_clip cannot hold this CLIP: ')
  assert text is not None
  return dict(
    embed_dim=config.embed_dim,
    quick_gelu=config.activation == 'quick_gelu',
    vision_cfg=dict(
      image_size=vision.image_size,
      layers=vision.depth,
      width=vision.width,
      head_width=vision.width // vision.heads,
      patch_size=vision.patch_size,
    ),
    text_cfg=dict(
      context_length=text.context_length,
      vocab_size=text.vocab_size,
      width=text.width,
      heads=text.heads,
      layers=text.depth,
    ),
  )


def from_openai_shapes(
  shapes: Mapping[str, tuple[int, ...]],
) -> clip_config.CLIPConfig:
  """Sizes from the tensors of an OpenAI archive, which states them nowhere.

  Heads have 64 features, the activation is QuickGELU, as in all of OpenAI's.

  Args:
    shapes: by name. Without text tensors there is no text tower.

  Raises:
    ValueError: these are not the tensors of a vision transformer.
  """
  needed = [
    'visual.conv1.weight',
    'visual.positional_embedding',
    'visual.proj',
  ]
  text_needed = ['token_embedding.weight', 'positional_embedding']
  has_text = any(name in shapes for name in text_needed)
  missing = [n for n in needed + text_needed * has_text if n not in shapes]
  if missing:
    some = ', '.join(sorted(shapes)[:3])
    raise ValueError(
      f"there is no {missing}: not the tensors of one of OpenAI's vision "
      f'transformers. It holds {len(shapes)} tensors ({some}, ...).'
    )
  width, channels, _, patch_size = shapes['visual.conv1.weight']
  patches = shapes['visual.positional_embedding'][0] - 1
  text = None
  if has_text:
    vocab_size, text_width = shapes['token_embedding.weight']
    text = clip_config.TextConfig(
      context_length=shapes['positional_embedding'][0],
      vocab_size=vocab_size,
      width=text_width,
      depth=_depth(shapes, 'transformer.resblocks.'),
      heads=max(text_width // 64, 1),
    )
  return clip_config.CLIPConfig(
    embed_dim=shapes['visual.proj'][1],
    vision=clip_config.VisionConfig(
      image_size=round(patches**0.5) * patch_size,
      patch_size=patch_size,
      width=width,
      depth=_depth(shapes, 'visual.transformer.resblocks.'),
      heads=max(width // 64, 1),
      channels=channels,
    ),
    text=text,
  )


def _depth(names: Mapping[str, Any], prefix: str) -> int:
  pattern = re.compile(re.escape(prefix) + r'(\d+)\.')
  return len({m[1] for m in map(pattern.match, names) if m})


# Keys that we read, whatever their value, and others with the only value that
# our towers have.
_OPEN_CLIP = dict(
  embed_dim=None, vision_cfg=None, text_cfg=None, quick_gelu=None
)
_OPEN_CLIP_VISION = dict(
  image_size=None,
  layers=None,
  width=None,
  head_width=None,
  patch_size=None,
  mlp_ratio=4.0,
  pool_type='tok',
)
_OPEN_CLIP_TEXT = dict(
  context_length=None,
  vocab_size=None,
  width=None,
  heads=None,
  layers=None,
  mlp_ratio=4.0,
  pool_type='argmax',
  proj_type='linear',
)


def _foreign(
  prefix: str, found: Mapping[str, Any], known: Mapping[str, Any]
) -> list[str]:
  """Complaints about settings that are not ours and not switched off."""
  return [
    f'{prefix}{key}={value!r} cannot be read'
    for key, value in found.items()
    if value and (key not in known or known[key] not in (None, value))
  ]


def _raise(problems: list[str], what: str = '') -> None:
  if problems:
    raise ValueError(what + '; '.join(problems) + '.')
