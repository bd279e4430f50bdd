import io

import numpy as np
from PIL import Image
import pytest

from modelstock_jax.data import preprocessing
from modelstock_jax.data import records


def _png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


def _noise(height, width, channels=3):
  pixels = np.random.default_rng(0).integers(
    0, 256, (height, width, channels), np.uint8
  )
  return pixels if channels > 1 else pixels[..., 0]


def _cubic(distance):
  """The kernel that Pillow calls bicubic: Keys', with a = -1/2."""
  x = abs(distance)
  near = 1.5 * x**3 - 2.5 * x**2 + 1
  far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _weights(length, new_length):
  """float64[new_length, length]: antialiased cubic weights, rows sum to 1."""
  scale = length / new_length
  width = max(scale, 1.0)
  centres = (np.arange(new_length) + 0.5) * scale
  places = np.arange(length) + 0.5
  weights = _cubic((places - centres[:, None]) / width)
  return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
  ('height', 'width'), [(75, 100), (100, 75), (40, 41), (20, 25), (32, 32)]
)
def test_against_the_definition_in_float64(height, width):
  # Of a contrast that overshoots neither 0 nor 255, where Pillow clips.
  pixels, size = _noise(height, width) // 3 + 85, 32
  shorter = min(height, width)
  new_height, new_width = size * height // shorter, size * width // shorter
  resized = np.einsum(
    'yi,xj,ijc->yxc',
    _weights(height, new_height),
    _weights(width, new_width),
    pixels.astype(np.float64),
  )
  top, left = (new_height - size) // 2, (new_width - size) // 2
  expected = resized[top : top + size, left : left + size]
  result = preprocessing.clip_image(_png(pixels), size)
  assert result.dtype == np.uint8
  assert result.shape == (size, size, 3)
  # Pillow rounds after each direction: by 1/2, of which the second direction,
  # whose weights sum to at most 1.3 without their signs, makes 0.65; and 1/2.
  assert abs(result - expected).max() < 1.2


@pytest.mark.parametrize('channels', [1, 3])
def test_image_of_the_right_size_is_unchanged(channels):
  pixels = _noise(24, 24, channels)
  result = preprocessing.clip_image(_png(pixels), 24, channels)
  np.testing.assert_array_equal(result, pixels.reshape(24, 24, channels))


# Half of what is too much, rounded to even, as Python and torchvision round.
@pytest.mark.parametrize(
  ('extra', 'offset'), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)]
)
def test_offset_of_the_crop(extra, offset):
  pixels = _noise(24, 24 + extra)  # the shorter side fits: nothing is resized
  result = preprocessing.clip_image(_png(pixels), 24)
  np.testing.assert_array_equal(result, pixels[:, offset : offset + 24])
  result = preprocessing.clip_image(_png(pixels.swapaxes(0, 1)), 24)
  np.testing.assert_array_equal(
    result, pixels.swapaxes(0, 1)[offset : offset + 24]
  )


@pytest.mark.parametrize(
  ('height', 'width'), [(1, 1), (1, 9), (9, 1), (2, 300), (300, 2), (500, 375)]
)
def test_any_shape_fits(height, width):
  result = preprocessing.clip_image(_png(_noise(height, width)), 32)
  assert result.shape == (32, 32, 3)


def test_one_pixel_fills_the_image():
  pixel = np.array([[[10, 20, 200]]], np.uint8)
  result = preprocessing.clip_image(_png(pixel), 8)
  np.testing.assert_array_equal(result, np.broadcast_to(pixel, (8, 8, 3)))


def test_grey_becomes_colour():
  pixels = _noise(30, 40, 1)
  grey = preprocessing.clip_image(_png(pixels), 24, channels=1)
  colour = preprocessing.clip_image(_png(pixels), 24)
  np.testing.assert_array_equal(colour, np.repeat(grey, 3, axis=-1))


def test_transparency_is_dropped():
  pixels = _noise(30, 40, 4)
  result = preprocessing.clip_image(_png(pixels), 24)
  np.testing.assert_array_equal(
    result, preprocessing.clip_image(_png(pixels[..., :3].copy()), 24)
  )


def test_no_image():
  with pytest.raises(ValueError, match='are no image'):
    preprocessing.clip_image(b'nothing', 24)


def test_examples_that_take_too_much_memory_are_bad():
  def transform(encoded, argument):
    raise MemoryError

  read = preprocessing.image_reader(transform)
  with pytest.raises(records.BadExample, match='no memory is left'):
    read({'image': b'', 'label': 0}, None)


@pytest.mark.parametrize('record', [{'image': b''}, {'label': 0}, {}])
def test_records_without_image_or_label_are_bad(record):
  with pytest.raises(records.BadExample, match=r"has no \['(image|label)'"):
    preprocessing.image_reader()(record, None)
