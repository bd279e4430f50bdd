"""Sizes of a CLIP, from and to what other tools write beside the weights."""

from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

from modelstock_jax.clip import config as clip_config
from modelstock_jax.formats import text as text_lib

# Each of our sizes: its name and its default in `transformers`, in open_clip.
_HUGGING_FACE = dict(
  vision=dict(
    image_size=('image_size', 224),
    patch_size=('patch_size', 32),
    width=('hidden_size', 768),
    depth=('num_hidden_layers', 12),
    heads=('num_attention_heads', 12),
    channels=('num_channels', 3),
  ),
  text=dict(
    context_length=('max_position_embeddings', 77),
    vocab_size=('vocab_size', 49408),
    width=('hidden_size', 512),
    depth=('num_hidden_layers', 12),
    heads=('num_attention_heads', 8),
  ),
)
_OPEN_CLIP_VISION = dict(
  image_size=('image_size', 224),
  patch_size=('patch_size', 16),
  width=('width', 768),
  depth=('layers', 12),
)
_OPEN_CLIP_TEXT = dict(
  context_length=('context_length', 77),
  vocab_size=('vocab_size', 49408),
  width=('width', 512),
  depth=('layers', 12),
  heads=('heads', 8),
)
_Names = Mapping[str, tuple[str, int]]


def _read(block: Mapping[str, Any], names: _Names) -> dict[str, Any]:
  return {o: block.get(theirs, x) for o, (theirs, x) in names.items()}


def _written(tower: Any, names: _Names) -> dict[str, Any]:
  return {theirs: getattr(tower, ours) for ours, (theirs, _) in names.items()}


def _dependent(activation: str, width: int) -> dict[str, Any]:
  """Return the settings of a tower of Hugging Face that follow from others."""
  return dict(
    hidden_act=activation, layer_norm_eps=1e-5, intermediate_size=4 * width
  )


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
  kind = content.get('model_type')
  if kind not in ('clip', 'clip_vision_model'):
    raise ValueError(
      f'model_type is {text_lib.shown(kind)}; '
      "'clip' and 'clip_vision_model' can be read."
    )
  blocks = {
    tower: dict(content.get(f'{tower}_config') or {})
    for tower in ('vision', 'text')
  }
  if kind == 'clip_vision_model':
    blocks = {'vision': dict(content)}
  activation = blocks['vision'].get('hidden_act', 'quick_gelu')
  sizes, problems = {}, []
  for tower, block in blocks.items():
    sizes[tower] = _read(block, _HUGGING_FACE[tower])
    default_width = _HUGGING_FACE[tower]['width'][1]
    stated = _dependent('quick_gelu', default_width) | block
    problems += [
      f'{tower}_config.{key} is {text_lib.shown(stated[key])}, must be '
      f'{text_lib.shown(value)}'
      for key, value in _dependent(activation, sizes[tower]['width']).items()
      if stated[key] != value
    ]
  if activation not in clip_config.ACTIVATIONS:
    problems.append(
      f'hidden_act is {text_lib.shown(activation)}, must be one of '
      f'{clip_config.ACTIVATIONS}'
    )
  if 'text' in sizes:
    # 2 stands in the configs of OpenAI's weights and means what we do: pool at
    # the highest id. Any other is found by its value.
    end = blocks['text'].get('eos_token_id', 49407)
    last = sizes['text']['vocab_size'] - 1
    if end not in (2, last):
      problems.append(
        f'text_config.eos_token_id is {text_lib.shown(end)}, must be 2 or the '
        f'last id, {last}'
      )
  _raise(problems)
  return clip_config.CLIPConfig(
    embed_dim=content.get('projection_dim', 512),
    vision=clip_config.VisionConfig(**sizes['vision']),
    text=clip_config.TextConfig(**sizes['text']) if 'text' in sizes else None,
    activation=activation,
  )


def to_huggingface(config: clip_config.CLIPConfig) -> dict[str, Any]:
  """Write the `config.json` that `transformers` reads."""

  def block(name: str, tower: Any) -> dict[str, Any]:
    return dict(
      _written(tower, _HUGGING_FACE[name]),
      model_type=f'clip_{name}_model',
      projection_dim=config.embed_dim,
      **_dependent(config.activation, tower.width),
    )

  vision = block('vision', config.vision)
  if config.text is None:
    return dict(
      vision, architectures=['CLIPVisionModelWithProjection'], dtype='float32'
    )
  text = dict(
    block('text', config.text),
    bos_token_id=config.text.vocab_size - 2,
    eos_token_id=config.text.vocab_size - 1,
    pad_token_id=0,
  )
  return dict(
    architectures=['CLIPModel'],
    dtype='float32',
    model_type='clip',
    projection_dim=config.embed_dim,
    text_config=text,
    vision_config=vision,
  )


def to_preprocessor(
  vision: clip_config.VisionConfig, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
  """Write the `preprocessor_config.json` that `transformers` reads."""
  size = vision.image_size
  return dict(
    image_processor_type='CLIPImageProcessor',
    do_convert_rgb=vision.channels == 3,
    do_resize=True,
    size=dict(shortest_edge=size),
    resample=3,  # bicubic, in Pillow
    do_center_crop=True,
    crop_size=dict(height=size, width=size),
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(mean),
    image_std=list(std),
  )


def from_open_clip(content: Mapping[str, Any]) -> clip_config.CLIPConfig:
  """Read the sizes from the `model_cfg` of an `open_clip_config.json`.

  Raises:
    ValueError: it asks for what our towers cannot be, such as a timm model.

  >>> vision = dict(image_size=224, layers=12, width=768, patch_size=32)
  >>> from_open_clip(dict(embed_dim=512, vision_cfg=vision, text_cfg={})).text
  TextConfig(context_length=77, vocab_size=49408, width=512, depth=12, heads=8)
  """
  vision = dict(content.get('vision_cfg') or {})
  text = dict(content.get('text_cfg') or {})
  known = dict.fromkeys(('embed_dim', 'vision_cfg', 'text_cfg', 'quick_gelu'))
  # Others have the only value that our towers have.
  known_vision = dict(head_width=None, mlp_ratio=4.0, pool_type='tok')
  known_text = dict(mlp_ratio=4.0, pool_type='argmax', proj_type='linear')
  problems = [
    *_foreign('', content, known, {}),
    *_foreign('vision_cfg.', vision, known_vision, _OPEN_CLIP_VISION),
    *_foreign('text_cfg.', text, known_text, _OPEN_CLIP_TEXT),
  ]
  if not isinstance(vision.get('layers', 12), int):
    problems.append(
      f'vision_cfg.layers is {text_lib.shown(vision["layers"])}, a ResNet; '
      'only vision transformers can be read'
    )
  head_width = vision.get('head_width', 64)
  if type(head_width) is not int or head_width < 1:
    problems.append(f'vision_cfg.head_width is {text_lib.shown(head_width)}')
  _raise(problems)
  sizes = _read(vision, _OPEN_CLIP_VISION)
  return clip_config.CLIPConfig(
    embed_dim=content.get('embed_dim', 512),
    vision=clip_config.VisionConfig(
      **sizes, heads=sizes['width'] // head_width
    ),
    text=clip_config.TextConfig(**_read(text, _OPEN_CLIP_TEXT)),
    activation='quick_gelu' if content.get('quick_gelu') else 'gelu',
  )


def to_open_clip(config: clip_config.CLIPConfig) -> dict[str, Any]:
  """Write the `model_cfg` that open_clip reads.

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
  return dict(
    embed_dim=config.embed_dim,
    quick_gelu=config.activation == 'quick_gelu',
    vision_cfg=dict(
      _written(vision, _OPEN_CLIP_VISION),
      head_width=vision.width // vision.heads,
    ),
    text_cfg=_written(text, _OPEN_CLIP_TEXT),
  )


def from_openai_shapes(
  shapes: Mapping[str, tuple[int, ...]],
) -> clip_config.CLIPConfig:
  """Infer the sizes from the tensors of an OpenAI archive: it states none.

  Heads have 64 features, the activation is QuickGELU, as in all of OpenAI's.

  Args:
    shapes: by name. Without text tensors there is no text tower.

  Raises:
    ValueError: these are not the tensors of a vision transformer.
  """
  ranks = {
    'visual.conv1.weight': 4,
    'visual.positional_embedding': 2,
    'visual.proj': 2,
  }
  text_ranks = {'token_embedding.weight': 2, 'positional_embedding': 2}
  has_text = any(name in shapes for name in text_ranks)
  ranks |= text_ranks if has_text else {}
  missing = [name for name in ranks if name not in shapes]
  if missing:
    some = ', '.join(map(text_lib.plain, sorted(shapes)[:3]))
    raise ValueError(
      f"there is no {missing}: not the tensors of one of OpenAI's vision "
      f'transformers. It holds {len(shapes)} tensors ({some}, ...).'
    )
  for name, rank in ranks.items():
    if len(shapes[name]) != rank or not all(shapes[name]):
      raise ValueError(
        f'{name} has shape {shapes[name]}, must have {rank} axes, none of them '
        'empty.'
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


def _foreign(
  prefix: str,
  settings: Mapping[str, Any],
  known: Mapping[str, Any],
  sizes: _Names,
) -> list[str]:
  """List the settings that are not ours and not switched off."""
  known = dict(known) | dict.fromkeys(name for name, _ in sizes.values())
  return [
    f'{prefix}{text_lib.plain(key)}={text_lib.shown(value)} cannot be read'
    for key, value in settings.items()
    if value and (key not in known or known[key] not in (None, value))
  ]


def _raise(problems: list[str], what: str = '') -> None:
  if problems:
    raise ValueError(what + '; '.join(problems) + '.')
