"""CLIP's transform of an image, in bytes, and examples that hold images."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL import ImageOps

from modelstock_jax.data import preprocessing
from modelstock_jax.data import records


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
  decode = transform or (lambda encoded, _: preprocessing.decode(encoded))

  def read(record: dict[str, Any], argument: Any) -> dict[str, np.ndarray]:
    if missing := {'image', 'label'} - record.keys():
      raise records.BadExample(f'the record has no {sorted(missing)}')
    try:
      image = decode(record['image'], argument)
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
    encoded: the bytes of an image, as `preprocessing.decode` takes them.
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
  pixels = preprocessing.decode(encoded, channels)
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
  preprocessing.check_size(width, height)
  left, top = round((width - size) / 2), round((height - size) / 2)
  resized = image.resize((width, height), Image.Resampling.BICUBIC)
  return resized.crop((left, top, left + size, top + size))
