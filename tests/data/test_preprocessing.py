import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import simplejpeg

from modelstock_jax.data import preprocessing


def _encode(pixels, mode, kind, **options):
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, kind, **options)
  return file.getvalue()


@pytest.fixture
def grey():
  rows, columns = np.mgrid[:40, :56]
  return (120 + 60 * np.sin(rows / 9) + columns).astype(np.uint8)


@pytest.fixture
def colour(grey):
  return np.stack([grey, grey[::-1], 255 - grey], -1)


def test_png_is_exact(grey, colour):
  png = _encode(grey, 'L', 'png')
  np.testing.assert_array_equal(preprocessing.decode(png), grey[..., None])
  np.testing.assert_array_equal(
    preprocessing.decode(png, 3), np.repeat(grey[..., None], 3, -1)
  )
  png = _encode(colour, 'RGB', 'png')
  np.testing.assert_array_equal(preprocessing.decode(png), colour)
  assert preprocessing.decode(png, 1).shape == (40, 56, 1)


@pytest.mark.parametrize('channels', [None, 1, 3])
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_jpeg_agrees_with_pillow(colour, mode, channels):
  jpeg = _encode(colour, mode, 'jpeg', quality=95, subsampling=0)
  decoded = preprocessing.decode(jpeg, channels)
  stored = 1 if mode == 'L' else 3
  target = {1: 'L', 3: 'RGB'}[channels or stored]
  with Image.open(io.BytesIO(jpeg)) as image:
    expected = np.asarray(image.convert(target)).reshape(40, 56, -1)
  assert decoded.dtype == np.uint8
  assert decoded.shape == expected.shape
  # Colour conversion may round differently.
  assert abs(decoded.astype(int) - expected.astype(int)).max() <= 2


def test_cmyk_jpeg_becomes_colour(colour):
  jpeg = _encode(colour, 'CMYK', 'jpeg', quality=95)
  decoded = preprocessing.decode(jpeg, 3)
  assert decoded.shape == (40, 56, 3)
  assert abs(decoded.astype(int) - colour.astype(int)).mean() < 6


def test_cmyk_jpeg_is_as_pillow_reads_it(colour):
  jpeg = _encode(colour, 'CMYK', 'jpeg', quality=95)
  with Image.open(io.BytesIO(jpeg)) as image:
    expected = np.asarray(image.convert('RGB'))
  np.testing.assert_array_equal(preprocessing.decode(jpeg, 3), expected)


@pytest.mark.parametrize('subsampling', [0, 1, 2])
@pytest.mark.parametrize('progressive', [False, True])
def test_colour_jpeg_is_as_pillow_reads_it(colour, subsampling, progressive):
  jpeg = _encode(
    colour, 'RGB', 'jpeg', subsampling=subsampling, progressive=progressive
  )
  with Image.open(io.BytesIO(jpeg)) as image:
    expected = np.asarray(image)
  np.testing.assert_array_equal(preprocessing.decode(jpeg, 3), expected)


@pytest.mark.parametrize('channels', [None, 1, 3])
@pytest.mark.parametrize('kept', [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize('end', [b'', b'\xff\xd9'])
@pytest.mark.parametrize('progressive', [False, True])
def test_cut_jpeg_is_no_image(colour, progressive, end, kept, channels):
  """Not even where a marker says that this is the end."""
  full = _encode(colour, 'RGB', 'jpeg', progressive=progressive)
  head = full.index(b'\xff\xda')  # pixels follow
  cut = head + int(kept * (len(full) - 2 - head))
  preprocessing.decode(full, channels)
  with pytest.raises(ValueError, match='are no image'):
    preprocessing.decode(full[:cut] + end, channels)


def test_jpeg_with_bytes_too_many_is_read_as_by_pillow(colour):
  full = _encode(colour, 'RGB', 'jpeg')
  odd = full[:-2] + b'abc' + full[-2:]  # libjpeg complains of these
  np.testing.assert_array_equal(
    preprocessing.decode(odd, 3), preprocessing.decode(full, 3)
  )


@pytest.mark.parametrize('kind', ['png', 'gif', 'webp', 'tiff', 'bmp'])
def test_cut_file_is_no_image(colour, kind):
  full = _encode(colour, 'RGB', kind)
  preprocessing.decode(full, 3)
  with pytest.raises(ValueError, match='are no image'):
    preprocessing.decode(full[: len(full) // 2], 3)


@pytest.mark.parametrize(
  ('mode', 'progressive'), [('RGB', False), ('RGB', True), ('L', False)]
)
def test_a_header_of_a_huge_jpeg(colour, mode, progressive):
  """Two kilobytes that would take 12 GB."""
  jpeg = bytearray(_encode(colour, mode, 'jpeg', progressive=progressive))
  at = jpeg.index(b'\xff\xc2' if progressive else b'\xff\xc0')
  jpeg[at + 5 : at + 9] = b'\xff\xdc' * 2
  with pytest.raises(ValueError, match=r'4290250000 pixels\) exceeds limit'):
    preprocessing.decode(bytes(jpeg))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
def test_a_jpeg_of_many_scans(colour, mode):
  """A few bytes are a scan, which passes over all 64 million pixels."""
  jpeg = bytearray(_encode(colour, mode, 'jpeg', progressive=True))
  at = jpeg.index(b'\xff\xc2')
  jpeg[at + 5 : at + 9] = (8000).to_bytes(2) * 2
  usual = jpeg.count(b'\xff\xda')
  jpeg[-2:] = jpeg[jpeg.rindex(b'\xff\xda') : -2] * 1000 + jpeg[-2:]
  words = rf'{1000 + usual:,} scans of 8000 x 8000 pixels take too long'
  with pytest.raises(ValueError, match=words):
    preprocessing.decode(bytes(jpeg))


@pytest.mark.parametrize('size', [(1, 65_000), (65_000, 1)])
def test_a_thin_image_is_not_resized(size):
  file = io.BytesIO()
  Image.new('RGB', size).save(file, 'png')
  assert preprocessing.decode(file.getvalue()).size == 3 * 65_000
  with pytest.raises(ValueError, match='pixels are more than'):
    preprocessing.clip_image(file.getvalue(), 224)


@pytest.mark.parametrize('kind', [np.uint16, np.int32, np.float32])
def test_pixels_of_more_than_8_bits(grey, kind):
  file = io.BytesIO()
  Image.fromarray(grey.astype(kind) * 200).save(file, 'tiff')
  with pytest.raises(ValueError, match=r"of mode '[IF].*save them with 8 bits"):
    preprocessing.decode(file.getvalue())


def test_only_known_formats_are_opened(colour):
  """Pillow would run Ghostscript on EPS."""
  eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n'
  for encoded in (eps, _encode(colour, 'RGB', 'ppm')):
    with pytest.raises(ValueError, match=r'no image \(JPEG, PNG.* identify'):
      preprocessing.decode(encoded)


def test_flipped_bits_of_a_jpeg(colour):
  """What libjpeg complains of is refused, unless no pixel is missing."""
  jpeg = _encode(colour, 'RGB', 'jpeg')
  start, rng, refused = (
    jpeg.index(b'\xff\xda') + 14,
    np.random.default_rng(0),
    0,
  )
  for place in rng.integers(start, len(jpeg) - 2, 200):
    flipped = bytearray(jpeg)
    flipped[place] ^= 1 << rng.integers(8)
    try:
      simplejpeg.decode_jpeg(flipped)
    except ValueError as error:
      if 'bad Huffman' in str(error) or 'remature' in str(error):
        refused += 1
        with pytest.raises(ValueError, match='are no image'):
          preprocessing.decode(bytes(flipped))
  assert refused


def _is_refused(call, encoded):
  try:
    call(encoded)
  except ValueError:
    return True
  return False


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_check_refuses_what_decode_does(colour, mode, progressive):
  jpeg = _encode(colour, mode, 'jpeg', progressive=progressive)
  rng = np.random.default_rng(0)
  variants = [jpeg, _encode(colour, 'RGB', 'png'), b'\xff\xd8cut']
  variants += [jpeg[:cut] for cut in rng.integers(3, len(jpeg), 20)]
  for place in rng.integers(3, len(jpeg), 100):
    flipped = bytearray(jpeg)
    flipped[place] ^= 1 << rng.integers(8)
    variants.append(bytes(flipped))
  expected = [_is_refused(preprocessing.decode, x) for x in variants]
  actual = [_is_refused(preprocessing.check, x) for x in variants]
  assert actual == expected
  assert 20 < sum(expected) < len(variants) - 10


@pytest.fixture(scope='module')
def photo():
  """More data than `check_structure` decodes at the beginning of a JPEG."""
  return np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)


KINDS = [
  *(('jpeg', mode, {}) for mode in ('RGB', 'L', 'CMYK')),
  ('jpeg', 'RGB', {'progressive': True}),
  ('jpeg', 'RGB', {'restart_marker_rows': 1}),
  *(('png', mode, {}) for mode in ('RGB', 'L', 'P', '1', 'I;16')),
  ('webp', 'RGB', {}),
  *((kind, 'RGB', {}) for kind in ('gif', 'bmp', 'tiff')),
]


@pytest.mark.parametrize(('kind', 'mode', 'options'), KINDS)
def test_structure_has_the_verdict_of_decode(photo, kind, mode, options):
  """Of files that are cut, lost a sector, or have bytes after the end."""
  if mode == 'I;16':
    file = io.BytesIO()
    Image.fromarray(photo[..., 0].astype(np.uint16)).save(file, kind)
    full = file.getvalue()
  else:
    full = _encode(photo, mode, kind, **options)
  places = [*np.random.default_rng(1).integers(0, len(full), 10)]
  places += [1, 3, 20, len(full) // 2, len(full) - 2, len(full) - 1]
  variants = [full, full + b'abc', full + full, full + bytes(4096)]
  variants += [full[:place] for place in places]
  variants += [full[:place] + bytes(len(full) - place) for place in places]
  for place in places:
    end = min(place + 1100, len(full))
    variants.append(full[:place] + bytes(end - place) + full[end:])
  if kind in ('png', 'bmp', 'tiff', 'gif') or mode == 'CMYK':
    for place in places:
      variants.append(full[:place] + b'?' + full[place + 1 :])
  if kind == 'webp':  # of the hole in the data only decoding tells
    variants = variants[: -len(places)]
  expected = [_is_refused(preprocessing.decode, x) for x in variants]
  actual = [_is_refused(preprocessing.check_structure, x) for x in variants]
  assert actual == expected
  assert sum(expected) >= len(places)


@pytest.mark.parametrize('kind', ['jpeg', 'webp'])
def test_structure_refuses_nothing_that_decode_accepts(photo, kind):
  full = _encode(photo, 'RGB', kind)
  rng = np.random.default_rng(0)
  refused = 0
  for place in [*rng.integers(0, 700, 60), *rng.integers(0, len(full), 20)]:
    flipped = bytearray(full)
    flipped[place] ^= 1 << rng.integers(8)
    if _is_refused(preprocessing.check_structure, bytes(flipped)):
      refused += 1
      assert _is_refused(preprocessing.decode, bytes(flipped))
  assert refused


def test_structure_of_the_first_picture_counts(photo):
  """Not that of the small one in EXIF, nor of another after the end."""
  small = _encode(photo[:16, :16], 'RGB', 'jpeg')
  full = _encode(photo, 'RGB', 'jpeg', exif=b'Exif\x00\x00' + small)
  preprocessing.check_structure(full + full)
  assert len(full) > 8000  # so not all of it is decoded
  with pytest.raises(ValueError, match='remature end'):
    preprocessing.check_structure(full[:-20])


def test_structure_limits_the_work(photo):
  jpeg = bytearray(_encode(photo, 'RGB', 'jpeg', progressive=True))
  at = jpeg.index(b'\xff\xc2')
  jpeg[at + 5 : at + 9] = (8000).to_bytes(2) * 2
  scan = jpeg[jpeg.rindex(b'\xff\xda') : -2]
  with pytest.raises(ValueError, match='scans of 8000 x 8000 pixels'):
    preprocessing.check_structure(bytes(jpeg[:-2] + scan * 40 + jpeg[-2:]))


@pytest.mark.parametrize('encoded', [b'', b'not an image', b'\xff\xd8cut'])
def test_no_image(encoded):
  with pytest.raises(ValueError, match='are no image'):
    preprocessing.decode(encoded, 3)


def test_bad_channels(grey):
  with pytest.raises(ValueError, match='channels=4'):
    preprocessing.decode(_encode(grey, 'L', 'png'), 4)


@pytest.mark.parametrize(
  ('mean', 'std'), [(0.3, 0.2), ([0.48, 0.45, 0.4], [0.26, 0.25, 0.27])]
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_normalize_against_float64(mean, std, dtype):
  images = np.random.default_rng(0).integers(
    0, 256, (2, 5, 8, 8, 3), dtype=np.uint8
  )
  expected = (images.astype(np.float64) / 255 - mean) / std
  with (
    jax.numpy_dtype_promotion('strict'),
    jax.numpy_rank_promotion('raise'),
  ):
    result = jax.jit(lambda x: preprocessing.normalize(x, mean, std, dtype))(
      images
    )
  assert result.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(result, np.float64),
    expected,
    rtol=float(jnp.finfo(dtype).eps),
    atol=4e-6,  # differences of nearly equal float32 numbers, over 0.2
  )


@pytest.mark.parametrize(
  ('images', 'mean', 'message'),
  [
    (np.zeros((2, 8, 8, 1), np.float32), 0.5, 'images are float32'),
    (np.zeros((2, 8, 8, 1), np.uint8), [0.5] * 3, r'mean=.*\(2, 8, 8, 1\)'),
  ],
)
def test_normalize_bad_input(images, mean, message):
  with pytest.raises(ValueError, match=message):
    preprocessing.normalize(jnp.asarray(images), mean, 0.5)
