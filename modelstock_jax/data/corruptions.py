"""Corruptions of images of any kind, the same in every run.

Eight of the kinds of ImageNet-C, at severity 3 of 5: those that are an
expression each. Their strengths are of images of 224 pixels; lengths scale with
the image.

Source: Hendrycks and Dietterich. Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations. ICLR 2019, arXiv:1903.12261. The strengths
are those of the code that its authors published.
"""

from collections.abc import Callable
import io

import numpy as np
from PIL import Image

from modelstock_jax.data import pipeline
from modelstock_jax.data import preprocessing
from modelstock_jax.data import shifts


def _impulses(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  draw = rng.random(x.shape)
  return np.where(draw < 0.09, draw < 0.045, x)


def _blur(x: np.ndarray) -> np.ndarray:
  from scipy import ndimage  # late, as in `shifts.blur`

  sigma = 3 * x.shape[0] / 224
  return ndimage.gaussian_filter(x, sigma, mode='nearest', axes=(0, 1))


def _brighter(x: np.ndarray) -> np.ndarray:
  value = x.max(axis=-1, keepdims=True)  # of HSV; hue and saturation stay
  brighter = np.minimum(value + 0.3, 1)
  return np.where(value > 0, x / np.maximum(value, 1e-9) * brighter, brighter)


def _pixels(x: np.ndarray) -> np.ndarray:
  image = _to_image(x)
  small = [max(1, int(0.4 * side)) for side in image.size]
  small = image.resize(small, Image.Resampling.BOX)
  large = small.resize(image.size, Image.Resampling.BOX)
  return preprocessing.to_array(large) / 255


def _jpeg(x: np.ndarray) -> np.ndarray:
  file = io.BytesIO()
  _to_image(x).save(file, 'jpeg', quality=15)
  return preprocessing.decode(file.getvalue(), x.shape[2]) / 255


def _to_image(x: np.ndarray) -> Image.Image:
  pixels = np.round(255 * x).astype(np.uint8)
  return Image.fromarray(pixels if x.shape[2] > 1 else pixels[..., 0])


# Pixels float64[H, W, C] of 0..1 and a generator -> pixels, to be clipped.
CORRUPTIONS: dict[
  str, Callable[[np.ndarray, np.random.Generator], np.ndarray]
] = {
  # White, of standard deviation 0.18.
  'gaussian_noise': lambda x, rng: x + rng.normal(0, 0.18, x.shape),
  # Photons, of which white has 12.
  'shot_noise': lambda x, rng: rng.poisson(12 * x) / 12,
  # 9 % of the values become 0 or 1.
  'impulse_noise': _impulses,
  # Of 3 pixels in 224.
  'gaussian_blur': lambda x, _: _blur(x),
  # 0.3 more.
  'brightness': lambda x, _: _brighter(x),
  # 0.2 of the distance from the mean of the channel.
  'contrast': lambda x, _: 0.2 * x + 0.8 * x.mean(axis=(0, 1), keepdims=True),
  # 0.4 of each side.
  'pixelate': lambda x, _: _pixels(x),
  # Of quality 15.
  'jpeg_compression': lambda x, _: _jpeg(x),
}


def apply(name: str, image: np.ndarray, position: int) -> np.ndarray:
  """Corrupt the image at one place of a split.

  As of `shifts.apply`, its randomness depends on the name and the place alone.

  Args:
    name: a key of `CORRUPTIONS`.
    image: `uint8[H, W, C]` of 1 or 3 channels.
    position: index of the image in its split.

  Returns:
    `uint8[H, W, C]`.

  >>> apply('contrast', np.uint8([[[0]], [[200]]]), 0)[..., 0].tolist()
  [[80], [120]]
  """
  rng = shifts.generator(name, position)
  pixels = CORRUPTIONS[name](image / 255, rng)
  return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def corrupted(read: pipeline.EvalRead | None, name: str) -> pipeline.EvalRead:
  """Return a `read` whose images are corrupted, after all else.

  Args:
    read: record, index -> example with 'image', `uint8[H, W, C]`; None takes
      records as they are.
    name: a key of `CORRUPTIONS`.

  Returns:
    A function that raises ValueError where 'image' is no such image.
  """

  def read_corrupted(record, index):
    example = read(record, index) if read else record
    image = np.asarray(example.get('image'))
    if image.dtype != np.uint8 or image.shape[2:] not in ((1,), (3,)):
      raise ValueError(
        "Corruptions are of images: example['image'] must be uint8[H, W, 1 or "
        f'3], is {image.dtype}{list(image.shape)}.'
      )
    return {**example, 'image': apply(name, image, index)}

  return read_corrupted
