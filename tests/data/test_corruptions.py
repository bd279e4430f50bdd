"""Against what the authors of ImageNet-C define, at severity 3."""

import colorsys

import numpy as np
import pytest
from scipy import fft

from modelstock_jax import data
from modelstock_jax.data import corruptions


@pytest.fixture(scope='module')
def picture():
  """Smooth colours, black and white, of 224 pixels."""
  waves = np.linspace(0, 6, 224)
  channels = np.sin(waves[:, None, None] + waves[None, :, None] * [0.5, 1, 2])
  image = np.round(127.5 + 127.5 * channels).astype(np.uint8)
  image[:20, :20], image[30:40, :20] = 0, 255
  return image


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
def test_repeatable_and_pure(name, channels, picture):
  image = picture[..., :channels]
  before = image.copy()
  one = corruptions.apply(name, image, 11)
  np.testing.assert_array_equal(one, corruptions.apply(name, image, 11))
  np.testing.assert_array_equal(image, before)
  assert (one.shape, one.dtype) == (image.shape, np.uint8)
  assert not np.array_equal(one, image)
  random = name.endswith('_noise')
  assert (one != corruptions.apply(name, image, 12)).any() == random


def _change(name, level):
  grey = np.full((256, 256, 3), level, np.uint8)
  return (corruptions.apply(name, grey, 0) - np.float64(level)) / 255


def test_noises_have_the_distributions_of_the_paper():
  # P(|z| < 1) = 0.6827, which clipping at 2.8 deviations leaves alone.
  change = _change('gaussian_noise', 128)
  assert (abs(change) < 0.18).mean() == pytest.approx(0.6827, abs=0.01)
  assert np.median(change) == pytest.approx(0, abs=0.005)
  # The mean of a Poisson is its variance: 12 x, in units of 1/12.
  change = _change('shot_noise', 51)
  assert change.mean() == pytest.approx(0, abs=0.002)
  assert change.var() == pytest.approx(0.2 / 12, rel=0.02)
  change = _change('impulse_noise', 51)
  assert (change < 0).mean() == pytest.approx(0.045, abs=0.002)
  assert (change > 0).mean() == pytest.approx(0.045, abs=0.002)
  assert set(np.unique(np.round(255 * change))) == {-51, 0, 204}


def test_blur_of_a_dot_is_a_gaussian_of_three_pixels():
  dot = np.zeros((224, 224, 1), np.uint8)
  dot[100:111, 100:111] = 255
  blurred = corruptions.apply('gaussian_blur', dot, 0)[..., 0].astype(float)
  offsets = np.arange(-20, 21)
  kernel = np.exp(-(offsets**2) / 18)
  profile = np.convolve(np.ones(11), kernel / kernel.sum())
  expected = 255 * np.outer(profile, profile)
  np.testing.assert_allclose(blurred[80:131, 80:131], expected, atol=0.6)
  # Half the size, half the blur.
  half = dot[:112, :112] * 0
  half[50:61, 50:61] = 255
  narrow = corruptions.apply('gaussian_blur', half, 0)
  assert narrow.max() > blurred.max()


def test_brightness_is_the_value_of_hsv(picture):
  bright = corruptions.apply('brightness', picture, 0)
  for row, column in [(0, 0), (35, 5), (60, 20), (100, 140), (200, 90)]:
    hue, saturation, value = colorsys.rgb_to_hsv(*picture[row, column] / 255)
    rgb = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
    expected = 255 * np.array(rgb)
    np.testing.assert_allclose(bright[row, column], expected, atol=0.51)


def test_contrast_keeps_the_mean_of_each_channel(picture):
  low = corruptions.apply('contrast', picture, 0)
  mean = picture.reshape(-1, 3).mean(0)
  expected = mean + 0.2 * (picture - mean)
  np.testing.assert_allclose(low, expected, atol=0.51)


def test_pixels_become_blocks():
  # 10 pixels become 4, each the mean of about 2.5, and then 2 or 3 pixels.
  ramp = np.repeat(np.arange(0, 250, 25, dtype=np.uint8)[None], 10, axis=0)
  blocks = corruptions.apply('pixelate', ramp[..., None], 0)[..., 0]
  means = [(0 + 25 + 50 / 2) / 2.5, (50 / 2 + 75 + 100) / 2.5]
  means += [225 - mean for mean in means[::-1]]
  assert (blocks == blocks[0]).all()
  np.testing.assert_allclose(np.unique(blocks), means, atol=10)  # of 25


def test_jpeg_rounds_frequencies_to_the_steps_of_quality_15():
  x = np.arange(8)
  image = 128 + 40 * np.cos(0.6 * x[:, None] + 0.3 * x)[..., None]
  compressed = corruptions.apply('jpeg_compression', np.uint8(image), 0)
  frequencies = fft.dctn(compressed[..., 0] - 128.0, norm='ortho')
  # The first steps of the standard's table of luminance, times 50 / 15.
  for place, step in {(0, 0): 16, (0, 1): 11, (1, 0): 12, (1, 1): 12}.items():
    size = np.round(step * 50 / 15)
    rest = abs(frequencies[place] / size - np.round(frequencies[place] / size))
    assert rest * size < 1.5


def test_images_are_corrupted_after_all_else():
  spec = data.find_benchmark('noise')
  source = data.open_benchmark(spec)
  clean, dark = (
    data.benchmark_reader(spec._replace(corruption=kind), source, 32)
    for kind in (None, 'contrast')
  )
  expected = corruptions.apply('contrast', clean(source[3], 3)['image'], 3)
  np.testing.assert_array_equal(dark(source[3], 3)['image'], expected)


@pytest.mark.parametrize(
  'example', [{'text': 'a'}, {'image': np.zeros((8, 8, 3))}]
)
def test_what_is_no_image_is_named(example):
  read = corruptions.corrupted(None, 'contrast')
  with pytest.raises(ValueError, match=r'must be uint8\[H, W, 1 or 3\], is'):
    read(example, 0)
