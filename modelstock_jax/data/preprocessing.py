"""From encoded bytes to normalised images.

Bytes are decoded on the host and scaled inside the jitted step: only uint8
pixels travel to the device.
"""

from collections.abc import Sequence
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import simplejpeg

_JPEG = b'\xff\xd8'
_MODES = {1: 'L', 3: 'RGB'}


def decode(encoded: bytes, channels: int | None = None) -> np.ndarray:
  """Decodes one image: JPEG by libjpeg-turbo, everything else by Pillow.

  Args:
    encoded: the bytes of a JPEG, PNG or any other file that Pillow reads.
    channels: 1 for grey, 3 for colour: what is stored is converted. `None`
      keeps grey images grey and makes all others colour.

  Returns:
    `uint8[height, width, channels]`.

  Raises:
    ValueError: `channels` is neither 1 nor 3, or the bytes are no image.

  >>> file = io.BytesIO()
  >>> Image.new('L', (4, 2), 255).save(file, 'png')
  >>> decode(file.getvalue()).shape, decode(file.getvalue(), 3).shape
  ((2, 4, 1), (2, 4, 3))
  """
  if channels is not None and channels not in _MODES:
    raise ValueError(f'channels={channels!r}: use 1 (grey), 3 (colour) or None')
  if encoded[:2] == _JPEG:
    try:
      return _decode_jpeg(encoded, channels)
    except ValueError:
      pass  # CMYK and other rarities, which Pillow knows
  try:
    with Image.open(io.BytesIO(encoded)) as image:
      grey = channels == 1 or (channels is None and image.mode in ('1', 'L'))
      pixels = np.asarray(image.convert('L' if grey else 'RGB'))
  except OSError as error:
    raise ValueError(
      f'{len(encoded)} bytes that begin with {encoded[:8]!r} are no image: '
      f'{error}'
    ) from error
  return pixels[..., None] if grey else pixels


def _decode_jpeg(encoded: bytes, channels: int | None) -> np.ndarray:
  if channels is None:
    stored = simplejpeg.decode_jpeg_header(encoded)[2]
    channels = 1 if stored == 'Gray' else 3
  return simplejpeg.decode_jpeg(
    encoded, colorspace='GRAY' if channels == 1 else 'RGB', strict=False
  )


def normalize(
  images: jax.Array,
  mean: float | Sequence[float],
  std: float | Sequence[float],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Scales pixels to `(pixel / 255 - mean) / std`, per channel.

  Args:
    images: `uint8[..., channels]`.
    mean: one number, or one per channel, in units of the full range.
    std: likewise.
    dtype: of the result; the arithmetic is float32.

  Returns:
    `dtype[..., channels]`.

  Raises:
    ValueError: images are not uint8, or there are neither one nor `channels`
      means or deviations.

  >>> normalize(jnp.uint8([[0, 255]]), 0.5, 0.25).tolist()
  [[-2.0, 2.0]]
  """
  if images.dtype != jnp.uint8:
    raise ValueError(
      f'images are {images.dtype}: pass uint8 pixels 0..255, normalised once'
    )
  constants = []
  for name, value in (('mean', mean), ('std', std)):
    array = np.asarray(value, np.float32)
    if array.shape not in ((), (1,), images.shape[-1:]):
      raise ValueError(
        f'{name}={value!r}: images of shape {images.shape} need one number '
        f'or {images.shape[-1]}'
      )
    constants.append(array.reshape((1,) * (images.ndim - 1) + (-1,)))
  means, stds = constants
  return ((images.astype(jnp.float32) / 255 - means) / stds).astype(dtype)
