"""Sizes of CLIP models: frozen values, checked when they are created."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import Literal
from typing import get_args

from modelstock_jax.formats import text as text_lib

Activation = Literal['quick_gelu', 'gelu']
ACTIVATIONS = get_args(Activation)
# The largest side of an image, in pixels, and the largest of other sizes.
MAX_IMAGE_SIZE, MAX_SIZE = 2**12, 2**20


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The image tower.

  Attributes:
    image_size: height and width of an image, in pixels.
    patch_size: height and width of a patch, in pixels; divides `image_size`.
    width: features per token.
    depth: number of residual blocks.
    heads: attention heads per block; divides `width`.
    channels: channels of an image.

  Raises:
    ValueError: lists every setting that cannot be.

  >>> config = VisionConfig(8, 2, width=48, depth=3, heads=3, channels=1)
  >>> config.tokens
  17
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  heads: int
  channels: int = 3

  def __post_init__(self):
    _check(self, patch_size='image_size', heads='width')

  @property
  def tokens(self) -> int:
    """Number of tokens of one image: its patches and the class token."""
    return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The text tower.

  Attributes:
    context_length: the most tokens a text may have.
    vocab_size: number of token ids. The end-of-text token has the highest id
      of each text: the tower pools where it stands.
    width: features per token.
    depth: number of residual blocks.
    heads: attention heads per block; divides `width`.

  Raises:
    ValueError: lists every setting that cannot be.
  """

  context_length: int
  vocab_size: int
  width: int
  depth: int
  heads: int

  def __post_init__(self):
    _check(self, heads='width')


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Two towers that end in one space of `embed_dim` features.

  Attributes:
    embed_dim: features of an image or text embedding.
    vision: the image tower.
    text: the text tower; None where there is an image tower only.
    activation: of the MLPs: 'quick_gelu', x * sigmoid(1.702 x), in OpenAI's
      weights; 'gelu' in many that were trained with open_clip.

  Raises:
    ValueError: `embed_dim` is not a positive integer, or the activation is
      neither.
  """

  embed_dim: int
  vision: VisionConfig
  text: TextConfig | None
  activation: Activation = 'quick_gelu'

  def __post_init__(self):
    shown = text_lib.shown(self.activation)
    problem = f'activation={shown} must be one of {ACTIVATIONS}'
    _check(self, [] if self.activation in ACTIVATIONS else [problem])


def from_dict(sizes: Mapping[str, Any]) -> CLIPConfig:
  """Read the config that a run's `model` block, or a file's metadata, holds.

  Args:
    sizes: 'embed_dim', 'image' and 'text' (the fields of `VisionConfig` and
      `TextConfig`; a text tower of None has none) and perhaps 'activation';
      other keys are not read.

  Raises:
    ValueError: a size is missing, unknown, or cannot be.

  >>> towers = dict(width=64, depth=1, heads=1)
  >>> image = dict(image_size=8, patch_size=2, **towers)
  >>> from_dict(dict(embed_dim=4, image=image, text=None)).vision.tokens
  17
  """
  with text_lib.explained(
    f'{text_lib.shown(sizes)} does not describe a CLIP: ',
    ". It takes 'embed_dim', and sizes of the towers in 'image' and 'text'.",
    (KeyError, TypeError),
  ):
    text = sizes['text']
    return CLIPConfig(
      embed_dim=sizes['embed_dim'],
      vision=VisionConfig(**sizes['image']),
      text=TextConfig(**text) if text and any(text.values()) else None,
      activation=sizes.get('activation', 'quick_gelu'),
    )


def _check(config: Any, problems: Sequence[str] = (), **multiples: str) -> None:
  """Raise one error over all settings that cannot be.

  Args:
    config: the sizes, whose integers are at least 1.
    problems: further problems to report.
    **multiples: by field, the field that it must divide.
  """
  integers = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.type is int
  }
  limits = {'image_size': MAX_IMAGE_SIZE}
  problems = [
    f'{name}={text_lib.shown(value)} must be an integer from 1 to '
    f'{limits.get(name, MAX_SIZE)}'
    for name, value in integers.items()
    if type(value) is not int or not 0 < value <= limits.get(name, MAX_SIZE)
  ] + list(problems)
  problems = problems or [
    f'{name}={integers[name]} does not divide {multiple}={integers[multiple]}'
    for name, multiple in multiples.items()
    if integers[multiple] % integers[name]
  ]
  if problems:
    raise ValueError(f'{type(config).__name__}: {"; ".join(problems)}.')


# Table 20 of the CLIP paper (arXiv:2103.00020). Heads have 64 features.
SIZES = {
  name: CLIPConfig(
    embed_dim,
    VisionConfig(image_size, patch_size, width, depth, heads=width // 64),
    TextConfig(77, 49408, text_width, depth=12, heads=text_width // 64),
  )
  for name, embed_dim, image_size, patch_size, width, depth, text_width in (
    ('ViT-B/32', 512, 224, 32, 768, 12, 512),
    ('ViT-B/16', 512, 224, 16, 768, 12, 512),
    ('ViT-L/14', 768, 224, 14, 1024, 24, 768),
    ('ViT-L/14@336', 768, 336, 14, 1024, 24, 768),
  )
}
