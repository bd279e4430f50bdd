"""From encoded bytes to normalised images.

Bytes are decoded on the host and scaled inside the jitted step: only uint8
pixels travel to the device.
"""

from collections.abc import Callable
from collections.abc import Sequence
import io
import re
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageOps
import simplejpeg

from modelstock_jax.data import records

# Pixels of the largest image that is decoded, or that another is resized to.
MAX_PIXELS = 2**26
# Pixels in all scans of a JPEG: each scan of a few bytes may pass over all.
_MAX_SCANNED = 32 * MAX_PIXELS
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')  # by Pillow's names

_JPEG = b'\xff\xd8'
_SCAN = b'\xff\xda'
_END = b'\xff\xd9'
# A marker in the data of a JPEG, other than of scans, tables and restarts.
_MARKER = re.compile(rb'\xff[^\x00\xc4\xd0-\xd7\xda\xff]')
_MAX_HEADER = 2**20  # bytes; a JPEG with more before its data is decoded
_BEGINNING = 4096  # bytes of data of a JPEG, or all, which are always decoded
_HOLE = bytes(512)  # what is left of a sector that was never written
_MODES = {1: 'L', 3: 'RGB'}
# The complaints of libjpeg after which pixels are missing. It fills them up
# with grey, as Pillow does without a word.
_DAMAGED = re.compile(
  'remature end|bad (Huffman|arithmetic) code|instead of RST|progression seq'
)


def decode(encoded: bytes, channels: int | None = None) -> np.ndarray:
  """Decode one image, to the pixels that Pillow gives.

  JPEG goes through libjpeg-turbo, as in Pillow but in a third less time;
  everything else, and CMYK, through Pillow. Transparency is dropped and a
  rotation that EXIF asks for is not done, as in CLIP's own transform.

  Args:
    encoded: the bytes of a file in one of `FORMATS`, of at most 2^26 pixels
      of 8 bits a channel (of a JPEG, 2^31 in all its scans); 16-bit colour
      loses its lower bytes.
    channels: 1 for grey, 3 for colour: what is stored is converted. `None`
      keeps grey images grey and makes all others colour.

  Returns:
    `uint8[height, width, channels]`.

  Raises:
    ValueError: `channels` is neither 1 nor 3, or the bytes are no such image
      or a damaged one.

  >>> file = io.BytesIO()
  >>> Image.new('L', (4, 2), 255).save(file, 'png')
  >>> decode(file.getvalue()).shape, decode(file.getvalue(), 3).shape
  ((2, 4, 1), (2, 4, 3))
  """
  if channels is not None and channels not in _MODES:
    raise ValueError(f'channels={channels!r}: use 1 (grey), 3 (colour) or None')
  try:
    if encoded[:2] == _JPEG:
      pixels = _decode_jpeg(encoded, channels)
      if pixels is not None:
        return pixels
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
      _check_work(encoded, *image.size)
      if image.mode[0] in 'IF':
        raise ValueError(
          f'its pixels are of mode {image.mode!r}; save them with 8 bits'
        )
      grey = channels == 1 or (channels is None and image.mode in ('1', 'L'))
      pixels = np.asarray(image.convert('L' if grey else 'RGB'))
  except (*_BROKEN, ValueError) as error:
    raise ValueError(
      f'{len(encoded)} bytes that begin with {encoded[:8]!r} are no image '
      f'({", ".join(FORMATS)}): {error}'
    ) from error
  return pixels[..., None] if grey else pixels


def check(encoded: bytes) -> None:
  """Raise ValueError where `decode` does; a JPEG takes two thirds of the time.

  All data of a JPEG are read, but pixels of an eighth of its size are made.
  """
  if encoded[:2] != _JPEG or _decode_jpeg(encoded, 1, min_factor=8) is None:
    decode(encoded)


def check_structure(encoded: bytes) -> None:
  """Raise ValueError for most of what `decode` refuses, in a tenth of its time.

  Of a JPEG, libjpeg reads the header and the first 4 kB of data, and the rest
  must reach the end without an odd marker or a hole of 512 zeros. Of a PNG, the
  checksums must be right; of a WebP, all parts must be there. Where they are
  not, and for any other format, `check` decides, so all that this refuses
  `decode` refuses. Damage to the data of a WebP, or of a JPEG after their
  beginning, may pass.
  """
  if not (_is_whole_jpeg if encoded[:2] == _JPEG else _is_whole)(encoded):
    check(encoded)


def _is_whole_jpeg(encoded: bytes) -> bool:
  """Return whether a JPEG has its parts; False if only `check` can tell."""
  start, limit = len(_JPEG), min(len(encoded) - _BEGINNING, _MAX_HEADER)
  while start < limit and not encoded.startswith(_SCAN, start):
    start += 2 + int.from_bytes(encoded[start + 2 : start + 4])
  end = _MARKER.search(encoded, start)
  if start >= limit or end is None or end[0] != _END:
    return False
  beginning = encoded[: start + _BEGINNING] + _END
  try:
    height, width, *_ = simplejpeg.decode_jpeg_header(beginning)
    _check_work(encoded, width, height)
    simplejpeg.decode_jpeg(
      beginning, 'GRAY', min_height=1, min_width=1, min_factor=8, strict=False
    )
  except ValueError:
    return False
  return encoded.find(_HOLE, start, end.start()) < 0


def _is_whole(encoded: bytes) -> bool:
  """Return whether a PNG or a WebP has its parts, likewise."""
  try:
    with Image.open(io.BytesIO(encoded), formats=('PNG', 'WEBP')) as image:
      check_size(*image.size)
      image.verify()  # checksums of a PNG; opening a WebP has found its parts
      return image.mode in ('L', 'LA', 'RGB', 'RGBA')
  except (*_BROKEN, ValueError):
    return False


# What Pillow raises, by format, for files that are not what they should be.
_BROKEN = (OSError, SyntaxError, struct.error, EOFError, Warning)
_BROKEN += (Image.DecompressionBombError, ArithmeticError, LookupError)


def check_size(width: Any, height: Any) -> None:
  """Raise ValueError for an image of more than `MAX_PIXELS`."""
  if width * height > MAX_PIXELS:
    raise ValueError(
      f'{width} x {height} pixels are more than {MAX_PIXELS}; make it smaller'
    )


def _check_work(encoded: bytes, width: Any, height: Any) -> None:
  """Raise ValueError for an image that takes too long to decode."""
  check_size(width, height)
  scans = 0
  if encoded[:2] == _JPEG:  # several times as fast as `encoded.count`
    data = np.frombuffer(encoded, np.uint8)
    scans = np.count_nonzero((data[:-1] == _SCAN[0]) & (data[1:] == _SCAN[1]))
  if scans * width * height > _MAX_SCANNED:
    raise ValueError(
      f'{scans:,} scans of {width} x {height} pixels take too long; save it '
      'with fewer'
    )


def _decode_jpeg(
  encoded: bytes, channels: int | None, min_factor: int = 1
) -> np.ndarray | None:
  """Decode a JPEG; None leaves CMYK and what libjpeg rejects to Pillow."""
  try:
    height, width, stored, _ = simplejpeg.decode_jpeg_header(encoded)
    _check_work(encoded, width, height)
    if stored == 'CMYK':  # converted to colour by a rule of its own
      return None
    if channels is None:
      channels = 1 if stored == 'Gray' else 3
    return simplejpeg.decode_jpeg(
      encoded,
      colorspace='GRAY' if channels == 1 else 'RGB',
      min_height=int(min_factor > 1),
      min_width=int(min_factor > 1),
      min_factor=min_factor,
    )
  except ValueError as error:
    if _DAMAGED.search(str(error)):
      raise
    return None


def normalize(
  images: jax.Array,
  mean: float | Sequence[float],
  std: float | Sequence[float],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Scale pixels to `(pixel / 255 - mean) / std`, per channel.

  Args:
    images: `uint8[..., channels]`.
    mean: one number, or one per channel, in units of the full range.
    std: likewise.
    dtype: dtype of the result; the arithmetic is float32.

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


def image_reader(
  transform: Callable[[bytes, Any], np.ndarray] | None = None,
) -> Callable[[dict[str, Any], Any], dict[str, np.ndarray]]:
  """Return a `read` for batches of labelled images.

  Args:
    transform: maps the encoded bytes to `uint8[H, W, C]`, one shape for all.
      Its second argument is what `read` gets: in training a generator to draw
      from, in evaluation the place of the image. `None` decodes alone.

  Returns:
    From a record with `image`, encoded bytes, and `label`, to
    `dict(image=uint8[H, W, C], label=int32[...])`. It raises `BadExample`
    where the transform raises OSError, ValueError or MemoryError.

  >>> from modelstock_jax.data import pipeline, sources
  >>> source = sources.open_source('digits', 'train[:200]')
  >>> batches = pipeline.train_batches(
  ...   source, num_models=2, batch_size=50, seed=0, read=image_reader()
  ... )
  >>> {name: array.shape for name, array in next(batches).items()}
  {'image': (2, 50, 8, 8, 1), 'label': (2, 50)}
  >>> batches.close()
  """
  to_pixels = transform or (lambda encoded, _: decode(encoded))

  def read(record: dict[str, Any], argument: Any) -> dict[str, np.ndarray]:
    if missing := {'image', 'label'} - record.keys():
      raise records.BadExample(f'the record has no {sorted(missing)}')
    try:
      image = to_pixels(record['image'], argument)
    except (OSError, ValueError, MemoryError) as error:
      raise records.BadExample(str(error) or 'no memory is left') from error
    return {'image': image, 'label': np.asarray(record['label'], np.int32)}

  return read


def clip_image(
  encoded: bytes, size: int, channels: int = 3, *, border: int = 0
) -> np.ndarray:
  """Decode, resize the shorter side to `size` and crop the middle.

  Resizing is Pillow's bicubic, antialiased. Where the CLIPs of OpenAI (over
  torchvision) and of Hugging Face differ, this follows

  * OpenAI in the offset of the crop: half of what is too much, rounded to
    even (1.5 -> 2, 2.5 -> 2). Hugging Face rounds down: of every four widths,
    one is cut a pixel further left there;
  * OpenAI in dropping transparency, which Hugging Face lays over white;
  * Hugging Face in converting to colour first. The order shows where Pillow
    does not resize all channels alike: CMYK, in which OpenAI resizes before
    it converts, and palettes and black and white, of which OpenAI takes the
    nearest pixel.

  Args:
    encoded: the bytes of an image, as `decode` takes them.
    size: the side of the result, pixels.
    channels: 3, or 1 for grey.
    border: pixels to cut off each side before anything else.

  Returns:
    `uint8[size, size, channels]`.

  Raises:
    ValueError: the bytes are no image, or not all of one, or nothing is left
      of it.

  >>> import io
  >>> file = io.BytesIO()
  >>> Image.new('RGB', (500, 375), 'red').save(file, 'png')
  >>> clip_image(file.getvalue(), 224)[0, 0]
  array([255,   0,   0], dtype=uint8)
  """
  image = open_image(encoded, channels)
  if min(image.size) <= 2 * border:
    raise ValueError(
      f'an image of {image.width} x {image.height} pixels has no inside of '
      f'{border} pixels from each side'
    )
  return to_array(resize_and_crop(ImageOps.crop(image, border), size))


def open_image(encoded: bytes, channels: int) -> Image.Image:
  """Return the decoded image, of mode 'RGB' or, of one channel, 'L'."""
  pixels = decode(encoded, channels)
  return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def to_array(image: Image.Image) -> np.ndarray:
  """Return `uint8[height, width, channels]` of an image in 'RGB' or 'L'."""
  return np.asarray(image).reshape(image.height, image.width, -1)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
  """Resize the shorter side to `size` and crop the middle square.

  Raises:
    ValueError: the longer side is so long that memory might not do.
  """
  shorter = min(image.size)
  width, height = (size * side // shorter for side in image.size)
  check_size(width, height)
  left, top = round((width - size) / 2), round((height - size) / 2)
  resized = image.resize((width, height), Image.Resampling.BICUBIC)
  return resized.crop((left, top, left + size, top + size))
