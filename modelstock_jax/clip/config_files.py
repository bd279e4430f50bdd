"""Sizes of a CLIP in the config files that other tools keep by the weights."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

from flax import traverse_util

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import layouts
from modelstock_jax.formats import text as text_lib

_Keys = Mapping[str, tuple[str, Any]]

_HUGGING_FACE: _Keys = layouts.FORMATS['huggingface']['config']
_OPEN_CLIP: _Keys = layouts.FORMATS['open_clip']['config']
_OPEN_CLIP_FIXED = layouts.FORMATS['open_clip']['fixed']


def from_huggingface(content: Mapping[str, Any]) -> clip_config.CLIPConfig:
  """Read the sizes from the `config.json` of a `transformers` CLIP.

  Args:
    content: of the file; `model_type` is 'clip' or 'clip_vision_model'. What
      is missing has the default of `transformers.CLIPConfig`.

  Raises:
    ValueError: it is another model, or one that our towers cannot be.

  >>> from_huggingface({'model_type': 'clip'}).vision.patch_size
  32
  """
  kind, keys = content.get('model_type'), _HUGGING_FACE
  # As transformers: what older versions wrote under another key comes first.
  content = dict(content)
  for name in ('text_config', 'vision_config'):
    content[name] = content.get(f'{name}_dict') or content.get(name)
  if kind == 'clip_vision_model':
    content = {**content, 'vision_config': content}
    keys = {ours: key for ours, key in keys.items() if ours[:5] != 'text.'}
  elif kind != 'clip':
    raise ValueError(
      f'model_type is {text_lib.shown(kind)}; '
      "'clip' and 'clip_vision_model' can be read."
    )
  default = dict(keys.values())
  default |= _dependent(_config(default, keys))
  stated = default | _flatten(content)
  config = _config(stated, keys)
  text_lib.raise_problems(
    'our towers cannot be this model:',
    [
      f'{key} is {text_lib.shown(stated[key])}, must be {text_lib.shown(value)}'
      for key, value in _dependent(config).items()
      if stated[key] != value
      # In the configs of OpenAI's weights, 2 means what our tower does: pool
      # at the highest id.
      if (key, stated[key]) != ('text_config.eos_token_id', 2)
    ],
  )
  return config


def to_huggingface(config: clip_config.CLIPConfig) -> dict[str, Any]:
  """Return the content of the `config.json` that `transformers` reads."""
  settings = _written(config, _HUGGING_FACE) | _dependent(config)
  settings |= {
    'architectures': ['CLIPModel'],
    'dtype': 'float32',
    'model_type': 'clip',
    'vision_config.model_type': 'clip_vision_model',
    'vision_config.projection_dim': config.embed_dim,
  }
  if config.text:
    settings |= {
      'text_config.model_type': 'clip_text_model',
      'text_config.projection_dim': config.embed_dim,
      'text_config.bos_token_id': config.text.vocab_size - 2,
      'text_config.pad_token_id': 0,
    }
  content = traverse_util.unflatten_dict(settings, sep='.')
  if config.text:
    return content
  architecture = 'CLIPVisionModelWithProjection'
  return dict(
    content['vision_config'], architectures=[architecture], dtype='float32'
  )


def _dependent(config: clip_config.CLIPConfig) -> dict[str, Any]:
  """Return the settings of Hugging Face that follow from the sizes."""
  settings: dict[str, Any] = {}
  for name, tower in (('vision', config.vision), ('text', config.text)):
    if tower:
      settings |= {
        f'{name}_config.hidden_act': config.activation,
        f'{name}_config.layer_norm_eps': 1e-5,
        f'{name}_config.intermediate_size': 4 * tower.width,
      }
  if config.text:
    settings['text_config.eos_token_id'] = config.text.vocab_size - 1
  return settings


def from_open_clip(content: Mapping[str, Any]) -> clip_config.CLIPConfig:
  """Read the sizes from the `model_cfg` of an `open_clip_config.json`.

  Raises:
    ValueError: our towers cannot be such a model, for example one of timm.

  >>> vision = dict(image_size=224, layers=12, width=768, patch_size=32)
  >>> from_open_clip(dict(embed_dim=512, vision_cfg=vision, text_cfg={})).text
  TextConfig(context_length=77, vocab_size=49408, width=512, depth=12, heads=8)
  """
  known, given = dict(_OPEN_CLIP.values()), _flatten(content)
  text_lib.raise_problems(
    'our towers cannot be this model:',
    [
      f'{text_lib.plain(key)}={text_lib.shown(value)} cannot be read'
      for key, value in given.items()
      if value and key not in known and value != _OPEN_CLIP_FIXED.get(key)
    ],
  )
  stated = known | given
  stated['vision_cfg.head_width'] = (
    stated['vision_cfg.width'] // stated['vision_cfg.head_width']
  )
  stated['quick_gelu'] = 'quick_gelu' if stated['quick_gelu'] else 'gelu'
  return _config(stated, _OPEN_CLIP)


def to_open_clip(config: clip_config.CLIPConfig) -> dict[str, Any]:
  """Return the `model_cfg` that open_clip reads.

  Raises:
    ValueError: open_clip cannot hold such a CLIP.
  """
  channels = config.vision.channels
  problems = []
  if channels != 3:
    problems.append(f'it takes images of 3 channels, not {channels}')
  if config.text is None:
    problems.append('it takes both towers, and there is no text tower')
  text_lib.raise_problems('open_clip cannot hold this CLIP:', problems)
  settings = _written(config, _OPEN_CLIP)
  settings['vision_cfg.head_width'] = config.vision.width // config.vision.heads
  settings['quick_gelu'] = config.activation == 'quick_gelu'
  return traverse_util.unflatten_dict(settings, sep='.')


def from_openai_shapes(
  shapes: Mapping[str, tuple[int, ...]],
) -> clip_config.CLIPConfig:
  """Infer the sizes from the tensors of an OpenAI archive, which states none.

  Heads have 64 features, the activation is QuickGELU, as in all of OpenAI's.

  Args:
    shapes: by name. Without blocks of a text tower there is none.

  Raises:
    ValueError: these are not the tensors of a vision transformer.
  """
  some = ', '.join(map(text_lib.plain, sorted(shapes)[:3]))
  with text_lib.explained(
    'these are not the tensors of a vision transformer of OpenAI (',
    f'). There are {len(shapes)}: {some}, .... If a config.json or '
    'open_clip_config.json belongs to them, pass the folder that holds both.',
    (LookupError, ValueError),
  ):
    width, channels, _, patch_size = shapes['visual.conv1.weight']
    image_tokens, _ = shapes['visual.positional_embedding']
    vision = clip_config.VisionConfig(
      image_size=math.isqrt(image_tokens - 1) * patch_size,
      patch_size=patch_size,
      width=width,
      depth=_depth(shapes, 'visual.transformer.resblocks.'),
      heads=max(width // 64, 1),
      channels=channels,
    )
    text = None
    if depth := _depth(shapes, 'transformer.resblocks.'):
      context_length, width = shapes['positional_embedding']
      text = clip_config.TextConfig(
        context_length=context_length,
        vocab_size=shapes['token_embedding.weight'][0],
        width=width,
        depth=depth,
        heads=max(width // 64, 1),
      )
    return clip_config.CLIPConfig(shapes['visual.proj'][1], vision, text)


def _depth(names: Mapping[str, Any], prefix: str) -> int:
  pattern = re.compile(re.escape(prefix) + r'(\d+)\.')
  return len({m[1] for m in map(pattern.match, names) if m})


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings of nested blocks, by keys such as 'text_cfg.width'."""
  return traverse_util.flatten_dict(dict(content), sep='.')


def _config(stated: Mapping[str, Any], keys: _Keys) -> clip_config.CLIPConfig:
  """Return the sizes that a config file states."""
  values = {ours: stated[key] for ours, (key, _) in keys.items()}
  sizes = traverse_util.unflatten_dict(values, sep='.')
  towers = {'image': sizes['vision'], 'text': sizes.get('text')}
  return clip_config.from_dict(sizes | towers)


def _written(config: clip_config.CLIPConfig, keys: _Keys) -> dict[str, Any]:
  """Return the settings of a config file, by flat keys."""
  sizes = _flatten(dataclasses.asdict(config))
  return {
    theirs: sizes[ours] for ours, (theirs, _) in keys.items() if ours in sizes
  }
