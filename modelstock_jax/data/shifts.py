"""Distribution shifts of small grey images, the same in every run.

A shift is a function of an image `uint8[H, W, 1]` and a generator, to an image
of the same shape. Strengths are set by eye: harder to read, still legible.
"""

from collections.abc import Callable
import zlib

import numpy as np
from PIL import Image

Shift = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_NOISE = 0.25  # standard deviation, of the full range
_BLUR = 0.8  # standard deviation, pixels
_ANGLE = 25.0  # degrees
_CONTRAST = 0.3  # of the distances from the mean, what is left
_SQUARE = 3  # side of the blanked square, pixels


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Add white Gaussian noise of 0.25 of the full range."""
  return _to_uint8(image + rng.normal(0, _NOISE * 255, image.shape))


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Smooth with a Gaussian of 0.8 pixels; outside it is black."""
  from scipy import ndimage  # takes long, and all commands import this module

  del rng
  smooth = ndimage.gaussian_filter(
    image.astype(np.float64), _BLUR, mode='constant', axes=(0, 1)
  )
  return _to_uint8(smooth)


def rotate_ccw(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Turn by 25 degrees, counter-clockwise as seen."""
  del rng
  return _rotate(image, _ANGLE)


def rotate_cw(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Turn by 25 degrees, clockwise as seen."""
  del rng
  return _rotate(image, -_ANGLE)


def contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Draw every pixel towards the image's mean: 0.3 of the contrast stays."""
  del rng
  mean = image.mean()
  return _to_uint8(mean + _CONTRAST * (image - mean))


def occlusion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Blank a square of 3x3 pixels at a random place."""
  row, column = rng.integers(0, np.array(image.shape[:2]) - _SQUARE + 1)
  result = image.copy()
  result[row : row + _SQUARE, column : column + _SQUARE] = 0
  return result


def shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Move by one pixel in one of eight directions; nothing wraps around."""
  moves = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
  row, column = moves[rng.integers(len(moves))]
  height, width = image.shape[:2]
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  return padded[1 - row : 1 - row + height, 1 - column : 1 - column + width]


_FUNCTIONS = (noise, blur, rotate_ccw, rotate_cw, contrast, occlusion, shift)
SHIFTS: dict[str, Shift] = {f.__name__: f for f in _FUNCTIONS}


def apply(name: str, image: np.ndarray, position: int) -> np.ndarray:
  """Shift the image at one place of a split.

  Its randomness depends on the shift and the place alone: the shifted set is
  the same for every method, seed and batch size.

  Args:
    name: a key of `SHIFTS`.
    image: `uint8[H, W, 1]`.
    position: index of the image in its split.

  Returns:
    `uint8[H, W, 1]`.

  >>> image = np.full((8, 8, 1), 255, np.uint8)
  >>> int((apply('occlusion', image, 3) == 0).sum())
  9
  """
  return SHIFTS[name](image, generator(name, position))


def generator(name: str, position: int) -> np.random.Generator:
  """Return the generator of one place of a split, for what `name` does."""
  return np.random.default_rng((zlib.crc32(name.encode()), position))


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
  turned = Image.fromarray(image[..., 0]).rotate(
    degrees, Image.Resampling.BILINEAR
  )
  return np.asarray(turned)[..., None]


def _to_uint8(image: np.ndarray) -> np.ndarray:
  return np.clip(np.round(image), 0, 255).astype(np.uint8)
