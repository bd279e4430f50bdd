"""Random transforms of training images: crops, flips, colour, RandAugment."""

from collections.abc import Callable
import dataclasses
import functools
import math
import re

import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps

from modelstock_jax.data import preprocessing
from modelstock_jax.formats import text as text_lib

MAX_MAGNITUDE = 30

_RANGES = {
  'size': (1, 4096),
  'flip': (0, 1),
  'color_jitter': (0, 1),
  'randaugment_count': (0, 10),
  'randaugment_magnitude': (0, MAX_MAGNITUDE),
}
_PAIRS = {'crop_scale': (0.001, 1), 'crop_ratio': (0.01, 100)}
_ATTEMPTS = 10  # at a box that fits into the image
# timm's strings for RandAugment, and what holds for sections that they omit.
_SECTION = r'(m\d{1,2}|n\d|p0\.\d+|p1|mstd\d+(\.\d+)?|inc[01])'
_TIMM = re.compile(rf'(rand-)?{_SECTION}(-{_SECTION})*')
_TIMM_DEFAULTS = {'m': 10.0, 'n': 2.0, 'p': 0.5, 'mstd': 0.0, 'inc': 0.0}
# CLIP's mean colour, which normalisation takes to 0: where an image is moved
# away from, by number of channels.
_FILL = {1: 117, 3: (123, 117, 104)}


@dataclasses.dataclass(frozen=True)
class Augment:
  """A training transform, from encoded bytes to pixels.

  In order: a random box of the image, resized (or, with
  `crop_scale=(1, 1)`, CLIP's own transform); a flip; colour jitter;
  RandAugment. With the defaults it is `preprocessing.clip_image`.

  Attributes:
    size: the side of the result, pixels.
    channels: channels of the result, 3 or 1.
    crop_scale: least and greatest share of the image's area in a box; the
      share is drawn uniformly. (1, 1) draws no box.
    crop_ratio: least and greatest width / height of a box, drawn uniformly on
      a log scale.
    flip: probability that left and right change places, 0..1.
    color_jitter: c: brightness, contrast and saturation are each multiplied by
      a factor from 1 - c to 1 + c, in a random order; 0..1.
    randaugment_count: number of operations, one after another; 0 is off.
    randaugment_magnitude: their strength, 0..30, see `OPERATIONS`.
    randaugment: RandAugment as timm has it, in place of these two: see
      `timm_rand_augment`. '' is off.

  Raises:
    ValueError: values out of range, all at once.

  >>> import io
  >>> file = io.BytesIO()
  >>> Image.new('RGB', (500, 375), 'red').save(file, 'png')
  >>> transform = Augment(224, crop_scale=(0.08, 1.0), flip=0.5)
  >>> transform(file.getvalue(), np.random.default_rng(0)).shape
  (224, 224, 3)
  """

  size: int
  channels: int = 3
  crop_scale: tuple[float, float] = (1.0, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = 0.0
  color_jitter: float = 0.0
  randaugment_count: int = 0
  randaugment_magnitude: float = 0.0
  randaugment: str = ''

  def __post_init__(self):
    problems = [
      f'{name}={text_lib.shown(pair)}: must be two numbers, {low} <= least <= '
      f'greatest <= {high}'
      for name, (low, high) in _PAIRS.items()
      if len(pair := getattr(self, name)) != 2
      or not low <= pair[0] <= pair[1] <= high
    ]
    problems += [
      f'{name}={value}: must be from {low} to {high}'
      for name, (low, high) in _RANGES.items()
      if not low <= (value := getattr(self, name)) <= high
    ]
    if self.channels not in _FILL:
      problems.append(f'channels={self.channels}: must be 1 or 3')
    if self.randaugment_magnitude and not self.randaugment_count:
      problems.append(
        f'randaugment_magnitude={self.randaugment_magnitude} without a '
        'randaugment_count does nothing: set both, or neither'
      )
    if self.randaugment and self.randaugment_count:
      problems.append(
        f'randaugment={self.randaugment!r} and randaugment_count='
        f'{self.randaugment_count} are two scales: set one of them'
      )
    if self.randaugment and not _TIMM.fullmatch(self.randaugment):
      problems.append(
        f'randaugment={text_lib.shown(self.randaugment)}: must be of mM, nN, '
        "pP, mstdS and inc1, joined by '-', such as m9-n2-mstd0.5"
      )
    if problems:
      raise ValueError('; '.join(problems))

  @property
  def random(self) -> bool:
    """True if two calls on one image may differ."""
    return bool(
      tuple(self.crop_scale) != (1, 1)
      or self.flip
      or self.color_jitter
      or self.randaugment_count
      or self.randaugment
    )

  def __call__(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
    """Transform one image.

    Args:
      encoded: its bytes, as `preprocessing.decode` takes them.
      rng: all that is drawn comes from here.

    Returns:
      `uint8[size, size, channels]`.

    Raises:
      ValueError: the bytes are no image, or not all of one.
    """
    image = preprocessing.open_image(encoded, self.channels)
    if tuple(self.crop_scale) == (1, 1):
      image = preprocessing.resize_and_crop(image, self.size)
    else:
      box = random_box(*image.size, self.crop_scale, self.crop_ratio, rng)
      image = image.resize(
        (self.size, self.size), Image.Resampling.BICUBIC, box=box
      )
    if self.flip and rng.random() < self.flip:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if self.color_jitter:
      image = jitter(image, self.color_jitter, rng)
    if self.randaugment_count:
      image = rand_augment(
        image, self.randaugment_count, self.randaugment_magnitude, rng
      )
    if self.randaugment:
      image = timm_rand_augment(image, self.randaugment, rng)
    return preprocessing.to_array(image)


def random_box(
  width: int,
  height: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Draw a box inside an image: its area, then its shape, then its place.

  The rule of Inception (arXiv:1409.4842): the share of the area is uniform,
  the logarithm of width / height is uniform, sides are rounded to pixels. What
  does not fit is drawn anew; after ten times, it is the largest box in the
  middle whose ratio is the image's, or as near as allowed.

  Args:
    width: width of the image.
    height: height of the image.
    scale: least and greatest share of the area.
    ratio: least and greatest width / height.
    rng: draws.

  Returns:
    left, upper, right, lower, as Pillow takes them.

  >>> rng = np.random.default_rng(0)
  >>> random_box(500, 500, (1.0, 1.0), (1.0, 1.0), rng)
  (0, 0, 500, 500)
  """
  low, high = map(math.log, ratio)
  for _ in range(_ATTEMPTS):
    # One call for all four: a call costs more than the numbers.
    share, shape, x, y = rng.random(4).tolist()
    area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
    shape = math.exp(low + (high - low) * shape)
    w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
      return left, top, left + w, top + h
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def jitter(
  image: Image.Image, strength: float, rng: np.random.Generator
) -> Image.Image:
  """Change brightness, contrast and saturation, in a random order.

  Args:
    image: 'RGB' or 'L'.
    strength: c, 0..1; each factor is uniform from 1 - c to 1 + c.
    rng: draws the order and the factors.

  Returns:
    The image; factors of 1 change nothing.
  """
  factors = rng.uniform(1 - strength, 1 + strength, len(_JITTERS))
  for turn in rng.permutation(len(_JITTERS)):
    image = _JITTERS[turn](image).enhance(factors[turn])
  return image


def rand_augment(
  image: Image.Image, count: int, magnitude: float, rng: np.random.Generator
) -> Image.Image:
  """Apply RandAugment (arXiv:1909.13719): operations of one magnitude.

  Args:
    image: 'RGB' or 'L'.
    count: number of operations, each drawn uniformly from `OPERATIONS`.
    magnitude: 0..30, the same for all of them.
    rng: draws the operations and their directions.

  Returns:
    An image of the same size and mode.
  """
  operations = tuple(OPERATIONS.values())
  for turn in rng.integers(len(operations), size=count):
    sign = 1 if rng.random() < 0.5 else -1
    image = operations[turn](image, magnitude / MAX_MAGNITUDE, sign)
  return image


def timm_rand_augment(
  image: Image.Image, text: str, rng: np.random.Generator
) -> Image.Image:
  """Apply RandAugment as a string of timm describes it.

  n operations are drawn, each of which is applied with probability p, at level
  min(m, 10) / 10. So 'm20' is 'm10'. Without 'inc1', posterize and solarize
  weaken with m, and enhancers have factor 0.1 + 1.8 level: 'm5' changes least.
  Interpolation is bilinear, where timm draws bilinear or bicubic.

  Args:
    image: 'RGB' or 'L'.
    text: sections mM (default 10), nN (2), pP (0.5), mstdS (0: the standard
      deviation of m, which above 100 is uniform from 0 to m), inc1, joined by
      '-'. 'rand-' before them means nothing.
    rng: draws.

  Returns:
    An image of the same size and mode.
  """
  sections = re.findall(r'([a-z]+)([\d.]+)', text)
  values = _TIMM_DEFAULTS | {name: float(value) for name, value in sections}
  operations = tuple(timm_operations(bool(values['inc'])).values())
  for turn in rng.integers(len(operations), size=int(values['n'])):
    if rng.random() < values['p']:
      magnitude, std = values['m'], values['mstd']
      if std > 100:
        magnitude = rng.uniform(0, magnitude)
      elif std:
        magnitude = rng.normal(magnitude, std)
      sign = 1 if rng.random() < 0.5 else -1
      image = operations[turn](image, min(max(magnitude, 0), 10) / 10, sign)
  return image


_Operation = Callable[[Image.Image, float, int], Image.Image]


def _enhance(kind: Callable) -> _Operation:
  return lambda image, level, sign: kind(image).enhance(1 + 0.9 * level * sign)


def _shift_by(row: Callable[[float, float], tuple[float, ...]]) -> _Operation:
  """Return a linear change of coordinates, from strength and side."""

  def operation(image: Image.Image, level: float, sign: int) -> Image.Image:
    return image.transform(
      image.size,
      Image.Transform.AFFINE,
      row(level * sign, image.width),
      Image.Resampling.BILINEAR,
      fillcolor=_FILL[len(image.getbands())],
    )

  return operation


def _rotate(image: Image.Image, level: float, sign: int) -> Image.Image:
  return image.rotate(
    30 * level * sign,
    Image.Resampling.BILINEAR,
    fillcolor=_FILL[len(image.getbands())],
  )


_JITTERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

# RandAugment's operations, of an image, a level = magnitude / 30 and a random
# sign. Ranges are AutoAugment's (arXiv:1805.09501, table 6), reached at 30;
# level 0 changes nothing but in the three that have no level.
#
#   identity, autocontrast, equalize   no level
#   rotate                             30 level degrees, either way
#   solarize                           pixels from 256 (1 - level) are inverted
#   color, contrast, brightness,
#   sharpness                          factor 1 - 0.9 level or 1 + 0.9 level
#   posterize                          8 - round(4 level) bits are kept
#   shear_x, shear_y                   0.3 level, either way
#   translate_x, translate_y           0.45 level of the side, either way
OPERATIONS: dict[str, _Operation] = {
  'identity': lambda image, level, sign: image,
  'autocontrast': lambda image, level, sign: ImageOps.autocontrast(image),
  'equalize': lambda image, level, sign: ImageOps.equalize(image),
  'rotate': _rotate,
  'solarize': lambda image, level, sign: ImageOps.solarize(
    image, round(256 * (1 - level))
  ),
  'color': _enhance(ImageEnhance.Color),
  'posterize': lambda image, level, sign: ImageOps.posterize(
    image, 8 - round(4 * level)
  ),
  'contrast': _enhance(ImageEnhance.Contrast),
  'brightness': _enhance(ImageEnhance.Brightness),
  'sharpness': _enhance(ImageEnhance.Sharpness),
  'shear_x': _shift_by(lambda x, side: (1, 0.3 * x, 0, 0, 1, 0)),
  'shear_y': _shift_by(lambda x, side: (1, 0, 0, 0.3 * x, 1, 0)),
  'translate_x': _shift_by(lambda x, side: (1, 0, 0.45 * side * x, 0, 1, 0)),
  'translate_y': _shift_by(lambda x, side: (1, 0, 0, 0, 1, 0.45 * side * x)),
}


def _solarize_add(image: Image.Image, level: float, sign: int) -> Image.Image:
  """Add up to 110 to the pixels below 128."""
  table = [x + int(110 * level) if x < 128 else x for x in range(256)]
  return image.point(table * len(image.getbands()))


@functools.cache
def timm_operations(increasing: bool) -> dict[str, _Operation]:
  """Return timm's operations, of level = magnitude / 10, with 'inc1' or not."""

  def share(level: float, most: int) -> int:
    return most - int(most * level) if increasing else int(most * level)

  def decreasing(kind: _Operation) -> _Operation:
    return lambda image, level, sign: kind(image, 2 * level - 1, 1)

  operations = OPERATIONS | {
    # Of 0 bits black, which ImageOps refuses since Pillow 12.
    'posterize': lambda image, level, sign: image.point(
      lambda x: x & -(1 << 8 - share(level, 4))
    ),
    'solarize': lambda image, level, sign: ImageOps.solarize(
      image, share(level, 256)
    ),
    'solarize_add': _solarize_add,
    'invert': lambda image, level, sign: ImageOps.invert(image),
  }
  del operations['identity']
  if not increasing:
    for name in ('color', 'contrast', 'brightness', 'sharpness'):
      operations[name] = decreasing(OPERATIONS[name])
  return operations
