"""CLIP's transform against transformers' CLIPImageProcessorPil, in bytes.

Of the two CLIPImageProcessors it is the one over Pillow, as OpenAI's CLIP was
evaluated; the other runs on tensors of torchvision.
"""

import io

import numpy as np
from PIL import Image
import pytest

from modelstock_jax.data import preprocessing

pytestmark = pytest.mark.oracle


def _processor(**options):
  from transformers.models.clip import image_processing_pil_clip

  return image_processing_pil_clip.CLIPImageProcessorPil(
    do_rescale=False, do_normalize=False, **options
  )


def _processed(encoded, **options):
  """The pixels of Hugging Face, before it normalises them."""
  with Image.open(io.BytesIO(encoded)) as image:
    batch = _processor(**options)(image)
  return np.moveaxis(np.asarray(batch['pixel_values'][0]), 0, -1)


def _photo(height, width, channels=3, seed=0):
  """Smooth shapes under fine noise."""
  rng = np.random.default_rng(seed)
  rough = rng.integers(0, 256, (9, 12, channels), np.uint8)
  image = Image.fromarray(rough if channels > 1 else rough[..., 0])
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  smooth = np.asarray(image).astype(float)
  noisy = smooth + rng.normal(0, 6, smooth.shape)
  return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _encoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def _rotated(height, width):
  exif = Image.Exif()
  exif[0x0112] = 6  # orientation: turn by 90 degrees to show
  return _encoded(_photo(height, width), 'jpeg', quality=90, exif=exif)


FILES = {
  'jpeg': lambda h, w: _encoded(_photo(h, w), 'jpeg', quality=90),
  'jpeg, no subsampling': lambda h, w: _encoded(
    _photo(h, w), 'jpeg', quality=95, subsampling=0
  ),
  'jpeg, progressive': lambda h, w: _encoded(
    _photo(h, w), 'jpeg', progressive=True
  ),
  'jpeg, grey': lambda h, w: _encoded(_photo(h, w, 1), 'jpeg', quality=90),
  'jpeg, CMYK': lambda h, w: _encoded(
    Image.merge('CMYK', _photo(h, w, 4).split()), 'jpeg', quality=90
  ),
  'jpeg, rotated by EXIF': _rotated,
  'png': lambda h, w: _encoded(_photo(h, w), 'png'),
  'png, grey': lambda h, w: _encoded(_photo(h, w, 1), 'png'),
  'png, black and white': lambda h, w: _encoded(
    _photo(h, w, 1).convert('1'), 'png'
  ),
  'png, palette': lambda h, w: _encoded(_photo(h, w).quantize(64), 'png'),
  'webp': lambda h, w: _encoded(_photo(h, w), 'webp'),
}
SIZES = [(375, 500), (500, 375), (333, 500), (224, 224), (100, 100), (1, 1)]
SIZES += [(7, 5), (3, 120), (120, 3), (40, 1000), (1000, 40)]


@pytest.mark.parametrize('kind', FILES)
@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_no_byte_differs(kind, height, width):
  encoded = FILES[kind](height, width)
  ours = preprocessing.clip_image(encoded, 224)
  longer = 224 * max(height, width) // min(height, width)
  assert (longer - 224) % 4 != 3  # the next test is about these
  theirs = _processed(encoded)
  assert theirs.dtype == ours.dtype == np.uint8
  assert ours.shape == (224, 224, 3)
  if min(height, width) > 3:
    assert len(np.unique(ours)) > 1  # not blank
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('extra', range(8))
@pytest.mark.parametrize('upright', [False, True])
def test_crop_is_at_most_a_pixel_off(extra, upright):
  """Round down, as Hugging Face does, where torchvision rounds to even."""
  size = (224 + extra, 224) if upright else (224, 224 + extra)
  encoded = _encoded(_photo(*size), 'jpeg', quality=90)
  full = _processed(encoded, do_center_crop=False)
  assert full.shape[:2] == size
  offset = round(extra / 2)
  middle = slice(offset, offset + 224)
  ours = preprocessing.clip_image(encoded, 224)
  np.testing.assert_array_equal(
    ours, full[middle] if upright else full[:, middle]
  )
  same = np.array_equal(ours, _processed(encoded))
  assert same == (extra % 4 != 3)


@pytest.mark.parametrize('size', [32, 224, 336])
def test_other_sizes(size):
  encoded = FILES['jpeg'](375, 500)
  assert (size * 500 // 375 - size) % 4 != 3
  theirs = _processed(
    encoded,
    size={'shortest_edge': size},
    crop_size={'height': size, 'width': size},
  )
  np.testing.assert_array_equal(preprocessing.clip_image(encoded, size), theirs)


def test_neither_turns_what_exif_wants_turned():
  plain = preprocessing.clip_image(FILES['jpeg'](375, 500), 224)
  rotated = FILES['jpeg, rotated by EXIF'](375, 500)
  with Image.open(io.BytesIO(rotated)) as image:
    assert image.getexif()[0x0112] == 6
  np.testing.assert_array_equal(preprocessing.clip_image(rotated, 224), plain)
  np.testing.assert_array_equal(_processed(rotated), plain)


def test_only_transparency_differs():
  """OpenAI's CLIP drops it, as here; Hugging Face lays white under it."""
  image = _photo(300, 400, 4)
  alpha = np.asarray(image)[..., 3]
  assert alpha.min() < 64
  opaque = _encoded(image.convert('RGB'), 'png')
  encoded = _encoded(image, 'png')
  ours = preprocessing.clip_image(encoded, 224)
  np.testing.assert_array_equal(ours, _processed(opaque))
  assert not np.array_equal(ours, _processed(encoded))
  image.putalpha(255)
  np.testing.assert_array_equal(ours, _processed(_encoded(image, 'png')))


# The order of OpenAI's own transform, written with Pillow: see clip_image.
def _converted_last(encoded, size=224):
  with Image.open(io.BytesIO(encoded)) as image:
    shorter = min(image.size)
    new = [int(size * side / shorter) for side in image.size]
    left, top = (round((side - size) / 2) for side in new)
    resized = image.resize(new, Image.Resampling.BICUBIC)
    cropped = resized.crop((left, top, left + size, top + size))
    return np.asarray(cropped.convert('RGB'))


@pytest.mark.parametrize('kind', ['jpeg', 'jpeg, grey', 'png', 'png, grey'])
def test_order_of_conversion_does_not_matter(kind):
  encoded = FILES[kind](375, 500)
  np.testing.assert_array_equal(
    preprocessing.clip_image(encoded, 224), _converted_last(encoded)
  )


def test_order_of_conversion_matters_little_for_cmyk():
  # Resizing commutes with conversion where the latter is linear: everywhere
  # but where a sum of ink is cut off at black, and for rounding.
  encoded = FILES['jpeg, CMYK'](375, 500)
  ours = preprocessing.clip_image(encoded, 224).astype(int)
  difference = abs(ours - _converted_last(encoded))
  print(f'CMYK: max {difference.max()}, mean {difference.mean():.4f}')
  assert difference.max() <= 16
  assert difference.mean() < 1
