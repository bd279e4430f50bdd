import dataclasses
import io
import math

import numpy as np
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import pytest

from modelstock_jax.data import augment
from modelstock_jax.data import examples
from modelstock_jax.data import preprocessing


def _png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'png')
  return file.getvalue()


@pytest.fixture
def pixels():
  rng = np.random.default_rng(0)
  rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
  return np.array(rough.resize((80, 60), Image.Resampling.BICUBIC))


def _rng(place=0):
  return examples.generator(seed=0, model=0, epoch=0, place=place)


class _Fixed:
  """Draws that a test dictates, in place of a generator."""

  def __init__(self, *numbers):
    self._numbers = list(numbers)

  def _next(self, *_, **__):
    return self._numbers.pop(0)

  random = integers = uniform = permutation = _next


# --- The whole transform.


@pytest.mark.parametrize('channels', [1, 3])
def test_all_off_is_clips_transform(pixels, channels):
  transform = augment.Augment(24, channels)
  assert not transform.random
  np.testing.assert_array_equal(
    transform(_png(pixels), _rng()),
    preprocessing.clip_image(_png(pixels), 24, channels),
  )


def test_flip_is_as_frequent_as_asked(pixels):
  pixels = pixels[:8, :8]
  plain = preprocessing.clip_image(_png(pixels), 8)
  transform = augment.Augment(8, flip=0.3)
  flips = 0
  for place in range(1000):
    result = transform(_png(pixels), _rng(place))
    flipped = np.array_equal(result, plain[:, ::-1])
    assert flipped or np.array_equal(result, plain)
    flips += flipped
  # Binomial: five deviations of sqrt(1000 * 0.3 * 0.7) = 14.5.
  assert abs(flips - 300) < 73


def test_flipping_twice_is_nothing(pixels):
  transform = augment.Augment(60, flip=1.0)
  once = transform(_png(pixels), _rng())
  plain = preprocessing.clip_image(_png(pixels), 60)
  assert not np.array_equal(once, plain)
  np.testing.assert_array_equal(transform(_png(once), _rng()), plain)


def test_box_is_resized_by_pillow(pixels):
  transform = augment.Augment(24, crop_scale=(0.1, 0.6))
  box = augment.random_box(80, 60, (0.1, 0.6), (3 / 4, 4 / 3), _rng(3))
  expected = Image.fromarray(pixels).resize(
    (24, 24), Image.Resampling.BICUBIC, box=box
  )
  np.testing.assert_array_equal(
    transform(_png(pixels), _rng(3)), np.asarray(expected)
  )


@pytest.mark.parametrize('channels', [1, 3])
def test_everything_on(pixels, channels):
  transform = augment.Augment(
    24,
    channels,
    crop_scale=(0.08, 1.0),
    flip=0.5,
    color_jitter=0.4,
    randaugment_count=2,
    randaugment_magnitude=20,
  )
  assert transform.random
  results = [transform(_png(pixels), _rng(place)) for place in range(60)]
  assert {r.shape for r in results} == {(24, 24, channels)}
  assert {r.dtype for r in results} == {np.dtype(np.uint8)}
  assert len({r.tobytes() for r in results}) == 60
  again = transform(_png(pixels), _rng(7))
  np.testing.assert_array_equal(again, results[7])


@pytest.mark.parametrize(
  'values',
  [
    {'crop_scale': (0.5, 1.0)},
    {'flip': 0.5},
    {'color_jitter': 0.1},
    {'randaugment_count': 1},
    {'randaugment': 'm9-n1'},
  ],
)
def test_each_part_makes_it_random(pixels, values):
  transform = augment.Augment(24, **values)
  assert transform.random
  results = {
    transform(_png(pixels), _rng(place)).tobytes() for place in range(40)
  }
  assert len(results) > 1


def test_all_problems_at_once():
  with pytest.raises(ValueError, match='must be') as error:
    augment.Augment(
      0,
      channels=2,
      crop_scale=(0.5, 0.2),
      crop_ratio=(0.0, 1.0),
      flip=1.5,
      color_jitter=-1.0,
      randaugment_count=-1,
      randaugment_magnitude=31,
      randaugment='m9-q2',
    )
  names = [field.name for field in dataclasses.fields(augment.Augment)]
  for name in names:
    assert f'{name}=' in str(error.value)


@pytest.mark.parametrize('name', ['crop_scale', 'crop_ratio'])
@pytest.mark.parametrize('value', [(0.5,), (0.1, 0.2, 0.3), (0.5, math.nan)])
def test_ranges_are_two_numbers(name, value):
  with pytest.raises(ValueError, match=f'{name}=.*two numbers'):
    augment.Augment(8, **{name: value})


def test_magnitude_without_operations():
  with pytest.raises(ValueError, match='randaugment_count'):
    augment.Augment(8, randaugment_magnitude=9)


@pytest.mark.parametrize(
  'text',
  [
    'm9-n2-mmax30',
    'm9n2',
    'm9.5',
    'n10',
    'p1.5',
    'mstd-1',
    'inc2',
    'rand',
    '9',
  ],
)
def test_strings_that_are_not_of_timm(text):
  with pytest.raises(ValueError, match=f"randaugment='{text}': must be of mM"):
    augment.Augment(8, randaugment=text)


def test_two_scales_of_randaugment():
  with pytest.raises(ValueError, match='two scales: set one'):
    augment.Augment(8, randaugment='m9-n2', randaugment_count=2)


@pytest.mark.parametrize('value', [math.nan, math.inf, -0.1])
@pytest.mark.parametrize('name', ['flip', 'color_jitter'])
def test_numbers_that_are_none(name, value):
  with pytest.raises(ValueError, match=f'{name}='):
    augment.Augment(8, **{name: value})


# --- Boxes.


def _boxes(width, height, scale, ratio, count=4000):
  rng = np.random.default_rng(0)
  boxes = np.array(
    [augment.random_box(width, height, scale, ratio, rng) for _ in range(count)]
  )
  left, top, right, bottom = boxes.T
  assert left.min() >= 0
  assert top.min() >= 0
  assert right.max() <= width
  assert bottom.max() <= height
  assert (right > left).all()
  assert (bottom > top).all()
  return left, top, right - left, bottom - top


def _deviation(numbers, cdf):
  """Kolmogorov-Smirnov: sqrt(n) times the largest distance of the cdfs.

  Above 1.95 it is once in a thousand, above 2.5 once in 130,000.
  """
  numbers = np.sort(numbers)
  count = len(numbers)
  expected = cdf(numbers)
  above = np.arange(1, count + 1) / count - expected
  below = expected - np.arange(count) / count
  return math.sqrt(count) * max(above.max(), below.max())


def test_area_and_ratio_of_boxes():
  # In a square of which a box is at most a third, every draw fits: width =
  # 2000 sqrt(1/3 * 4/3) < 2000. So nothing is drawn anew.
  _, _, w, h = _boxes(2000, 2000, (0.05, 1 / 3), (3 / 4, 4 / 3))
  share = w * h / 2000**2
  assert _deviation(share, lambda x: (x - 0.05) / (1 / 3 - 0.05)) < 2.5
  log = np.log(w / h)
  edge = math.log(4 / 3)
  assert _deviation(log, lambda x: (x + edge) / (2 * edge)) < 2.5
  # Independent: correlation of 4000 pairs, five deviations.
  assert abs(np.corrcoef(share, log)[0, 1]) < 0.08


def test_places_of_boxes():
  # Sides of a quarter exactly: 1501 places each way, all alike.
  left, top, w, h = _boxes(2000, 2000, (1 / 16, 1 / 16), (1.0, 1.0))
  assert set(w) == set(h) == {500}
  for place in (left, top):
    assert _deviation(place, lambda x: (x + 0.5) / 1501) < 2.5
  assert abs(np.corrcoef(left, top)[0, 1]) < 0.08


@pytest.mark.parametrize('side', [1, 8, 333])
def test_full_area_is_the_full_image(side):
  box = augment.random_box(side, side, (1.0, 1.0), (1.0, 1.0), _rng())
  assert box == (0, 0, side, side)


@pytest.mark.parametrize(
  ('width', 'height', 'expected'),
  [
    (1000, 10, (493, 0, 506, 10)),  # 13 = round(10 * 4/3) wide
    (10, 1000, (0, 493, 10, 506)),  # 13 = round(10 / (3/4)) high
    (1, 1, (0, 0, 1, 1)),
    (110, 100, (0, 0, 110, 100)),  # its own ratio is allowed
  ],
)
def test_what_never_fits_is_the_middle(width, height, expected):
  box = augment.random_box(width, height, (1.0, 1.0), (3 / 4, 4 / 3), _rng())
  assert box == expected


# --- Colour jitter.


def test_jitter_is_pillows_in_the_order_drawn(pixels):
  image = Image.fromarray(pixels)
  factors = np.array([0.7, 1.3, 0.8])
  result = augment.jitter(image, 0.4, _Fixed(factors, np.array([2, 0, 1])))
  expected = ImageEnhance.Color(image).enhance(0.8)
  expected = ImageEnhance.Brightness(expected).enhance(0.7)
  expected = ImageEnhance.Contrast(expected).enhance(1.3)
  np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_jitter_of_nothing_changes_nothing(pixels):
  image = Image.fromarray(pixels)
  result = augment.jitter(image, 0.0, _rng())
  np.testing.assert_array_equal(np.asarray(result), pixels)


def test_range_of_brightness():
  # A grey image keeps its pixels but for brightness: mean and grey are it.
  image = Image.new('RGB', (1, 1), (100, 100, 100))
  values = np.array(
    [augment.jitter(image, 0.5, _rng(p)).getpixel((0, 0)) for p in range(3000)]
  )
  assert (values == values[:, :1]).all()
  assert values.min() == 50
  assert values.max() == 149  # of 100 * 1.5, which is cut off below 150
  # Uniform over 50..150: deviation of the mean 29 / sqrt(3000) = 0.53.
  assert abs(values.mean() - 99.5) < 2.7


# --- RandAugment.


def test_operations_are_the_papers():
  # arXiv:1909.13719, section 3.
  assert set(augment.OPERATIONS) == {
    'identity',
    'autocontrast',
    'equalize',
    'rotate',
    'solarize',
    'color',
    'posterize',
    'contrast',
    'brightness',
    'sharpness',
    'shear_x',
    'shear_y',
    'translate_x',
    'translate_y',
  }


@pytest.mark.parametrize('sign', [-1, 1])
@pytest.mark.parametrize(
  'name', sorted(set(augment.OPERATIONS) - {'autocontrast', 'equalize'})
)
def test_magnitude_0_changes_nothing(pixels, name, sign):
  result = augment.OPERATIONS[name](Image.fromarray(pixels), 0.0, sign)
  np.testing.assert_array_equal(np.asarray(result), pixels)


def _enhanced(kind, factor):
  return lambda image: kind(image).enhance(factor)


def _pixelwise(function):
  return lambda image: Image.fromarray(
    function(np.asarray(image).astype(int)).astype(np.uint8)
  )


@pytest.mark.parametrize(
  ('name', 'level', 'sign', 'expected'),
  [
    ('autocontrast', 0.3, 1, ImageOps.autocontrast),
    ('equalize', 0.3, 1, ImageOps.equalize),
    ('color', 1.0, 1, _enhanced(ImageEnhance.Color, 1.9)),
    ('color', 0.5, -1, _enhanced(ImageEnhance.Color, 0.55)),
    ('contrast', 1.0, -1, _enhanced(ImageEnhance.Contrast, 0.1)),
    ('brightness', 0.5, 1, _enhanced(ImageEnhance.Brightness, 1.45)),
    ('sharpness', 1.0, 1, _enhanced(ImageEnhance.Sharpness, 1.9)),
    ('solarize', 1.0, 1, ImageOps.invert),
    (
      'solarize',
      0.5,
      -1,
      _pixelwise(lambda x: np.where(x < 128, x, 255 - x)),
    ),
    ('posterize', 1.0, 1, _pixelwise(lambda x: x // 16 * 16)),
    ('posterize', 0.5, -1, _pixelwise(lambda x: x // 4 * 4)),
  ],
)
def test_colour_operations(pixels, name, level, sign, expected):
  image = Image.fromarray(pixels)
  result = augment.OPERATIONS[name](image, level, sign)
  np.testing.assert_array_equal(np.asarray(result), np.asarray(expected(image)))


def _moved(pixels, rows, columns):
  """Pixels that come from (row + rows, column + columns), or CLIP's mean."""
  height, width = pixels.shape[:2]
  result = np.full_like(pixels, (123, 117, 104))
  for row in range(height):
    for column in range(width):
      r, c = row + rows(row, column), column + columns(row, column)
      if 0 <= r < height and 0 <= c < width:
        result[row, column] = pixels[r, c]
  return result


@pytest.mark.parametrize('sign', [-1, 1])
@pytest.mark.parametrize('name', ['translate_x', 'translate_y'])
def test_translations(name, sign):
  # 0.45 * 40 = 18 pixels.
  pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  result = augment.OPERATIONS[name](Image.fromarray(pixels), 1.0, sign)
  far = lambda row, column: 18 * sign  # noqa: E731
  none = lambda row, column: 0  # noqa: E731
  moves = (none, far) if name == 'translate_x' else (far, none)
  np.testing.assert_array_equal(np.asarray(result), _moved(pixels, *moves))


@pytest.mark.parametrize('sign', [-1, 1])
@pytest.mark.parametrize('name', ['shear_x', 'shear_y'])
def test_shears(name, sign):
  # A pixel's centre is at row + 1/2; of a ramp, what is sampled is known.
  size = 40
  ramp = np.arange(size) * 4.0 + 40
  pixels = np.broadcast_to(ramp, (size, size))
  if name == 'shear_y':
    pixels = pixels.T
  image = Image.fromarray(pixels.astype(np.uint8)).convert('RGB')
  result = np.asarray(augment.OPERATIONS[name](image, 0.5, sign))
  rows, columns = np.mgrid[:size, :size] + 0.5
  across, along = (rows, columns) if name == 'shear_x' else (columns, rows)
  source = along + 0.15 * sign * across
  expected = np.repeat(((source - 0.5) * 4 + 40)[..., None], 3, axis=-1)
  inside = (source > 1) & (source < size - 1)
  assert inside.mean() > 0.8
  # Linear between pixels, and rounded down.
  assert abs(result - expected)[inside].max() <= 1.0
  outside = (source < 0) | (source > size)
  assert outside.any()
  np.testing.assert_array_equal(
    result[outside], np.broadcast_to((123, 117, 104), result[outside].shape)
  )


@pytest.mark.parametrize('sign', [-1, 1])
def test_rotation(sign):
  # A bright spot 15 pixels to the right of the centre of a black image.
  size, radius = 61, 15
  pixels = np.zeros((size, size, 3), np.uint8)
  pixels[29:32, 30 + radius - 1 : 30 + radius + 2] = 255
  result = augment.OPERATIONS['rotate'](Image.fromarray(pixels), 1.0, sign)
  bright = np.asarray(result)[..., 0].astype(float)
  rows, columns = np.mgrid[:size, :size]
  near = np.hypot(rows - 30, columns - 30) < 20  # the rest may be filled
  bright = bright * near
  row = (bright * rows).sum() / bright.sum() - 30
  column = (bright * columns).sum() / bright.sum() - 30
  angle = math.degrees(math.atan2(-row, column))
  assert angle == pytest.approx(30 * sign, abs=1.5)
  assert np.asarray(result)[0, 0].tolist() == [123, 117, 104]


def test_operations_are_drawn_alike():
  draws = []

  def note(number):
    def operation(image, level, sign):
      draws.append((number, level, sign))
      return image

    return operation

  noted = {name: note(i) for i, name in enumerate(augment.OPERATIONS)}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(augment, 'OPERATIONS', noted)
    for place in range(2000):
      augment.rand_augment(Image.new('L', (1, 1)), 3, 12.0, _rng(place))
  numbers, levels, signs = map(np.array, zip(*draws, strict=True))
  assert len(numbers) == 6000
  assert set(levels) == {0.4}
  counts = np.bincount(numbers, minlength=14)
  # Chi-squared with 13 degrees of freedom: above 40 once in 10,000.
  expected = 6000 / 14
  assert ((counts - expected) ** 2 / expected).sum() < 40
  # Five deviations of sqrt(6000) = 77.
  assert abs(signs.sum()) < 388
  assert set(signs) == {-1, 1}


# --- RandAugment of timm; tests/oracles/test_timm.py compares it with timm.


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('text', ['m0-n9-p1', 'm10-n9-p1-inc1', 'rand-mstd101'])
def test_timms_operations_keep_size_and_mode(pixels, channels, text):
  transform = augment.Augment(24, channels, randaugment=text)
  results = [transform(_png(pixels), _rng(place)) for place in range(60)]
  assert {r.shape for r in results} == {(24, 24, channels)}
  assert len({r.tobytes() for r in results}) > 30
  np.testing.assert_array_equal(transform(_png(pixels), _rng(7)), results[7])


def test_no_operation_of_timm(pixels):
  """Model Soups has such strings; and probability 0."""
  plain = preprocessing.clip_image(_png(pixels), 24)
  for text in ('m18-n0', 'm9-n2-p0.0'):
    transform = augment.Augment(24, randaugment=text)
    for place in range(9):
      np.testing.assert_array_equal(transform(_png(pixels), _rng(place)), plain)
