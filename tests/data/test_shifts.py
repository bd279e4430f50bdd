import numpy as np
import pytest

from modelstock_jax.data import preprocessing
from modelstock_jax.data import shifts
from modelstock_jax.data import sources


def _rng():
  return np.random.default_rng(0)


def _dot(side, row, column):
  image = np.zeros((side, side, 1), np.uint8)
  image[row, column] = 255
  return image


@pytest.fixture(scope='module')
def digit():
  record = sources.open_source('digits', 'test')[5]
  return preprocessing.decode(record['image'])


@pytest.mark.parametrize('name', shifts.SHIFTS)
def test_repeatable_and_pure(name, digit):
  before = digit.copy()
  one = shifts.apply(name, digit, 11)
  np.testing.assert_array_equal(one, shifts.apply(name, digit, 11))
  np.testing.assert_array_equal(digit, before)
  assert one.shape == digit.shape
  assert one.dtype == np.uint8
  assert not np.array_equal(one, digit)


@pytest.mark.parametrize('name', ['noise', 'occlusion', 'shift'])
def test_randomness_differs_by_place(name, digit):
  results = {shifts.apply(name, digit, k).tobytes() for k in range(30)}
  assert len(results) > 4


@pytest.mark.parametrize(
  ('name', 'degrees'), [('rotate_ccw', 25), ('rotate_cw', -25)]
)
def test_direction_of_turn(name, degrees):
  # A dot 20 pixels to the right of the centre: seen from there, a turn by
  # +25 degrees carries it up, to smaller row numbers.
  side, radius = 65, 20
  turned = shifts.apply(name, _dot(side, 32, 32 + radius), 0)[..., 0]
  rows, columns = np.mgrid[:side, :side]
  weights = turned / turned.sum()
  angle = np.deg2rad(degrees)
  assert (weights * rows).sum() == pytest.approx(
    32 - radius * np.sin(angle), abs=0.5
  )
  assert (weights * columns).sum() == pytest.approx(
    32 + radius * np.cos(angle), abs=0.5
  )


def test_noise_is_normal_with_a_quarter_of_the_range():
  grey = np.full((256, 256, 1), 128, np.uint8)
  change = shifts.noise(grey, _rng()).astype(float) - 128
  # P(|z| < 1) = 0.6827; clipping at two deviations leaves it alone.
  assert (abs(change) < 63.75).mean() == pytest.approx(0.6827, abs=0.01)
  assert np.median(change) == pytest.approx(0, abs=1)
  neighbours = np.corrcoef(change[:, 1:].ravel(), change[:, :-1].ravel())
  assert abs(neighbours[0, 1]) < 0.02


def test_blur_of_a_dot_is_a_gaussian():
  blurred = shifts.blur(_dot(15, 7, 7), _rng())[..., 0].astype(float)
  offsets = np.arange(15) - 7.0
  profile = np.exp(-(offsets**2) / (2 * 0.8**2))
  expected = 255 * np.outer(profile, profile) / profile.sum() ** 2
  np.testing.assert_allclose(blurred, expected, atol=0.6)


def test_contrast_keeps_the_mean_and_scales_the_rest(digit):
  low = shifts.contrast(digit, _rng()).astype(float)
  expected = digit.mean() + 0.3 * (digit - digit.mean())
  np.testing.assert_allclose(low, expected, atol=0.5001)


def test_occlusion_blanks_one_square():
  white = np.full((8, 8, 1), 255, np.uint8)
  corners = set()
  for k in range(400):
    rows, columns, _ = np.nonzero(shifts.apply('occlusion', white, k) == 0)
    assert len(rows) == 9
    assert np.ptp(rows) == np.ptp(columns) == 2
    corners.add((rows.min(), columns.min()))
  assert len(corners) == 36  # every place at which it fits


def test_shift_moves_one_pixel_in_eight_directions():
  moves = set()
  for k in range(200):
    moved = shifts.apply('shift', _dot(8, 3, 4), k)
    assert moved.sum() == 255
    row, column, _ = np.argwhere(moved)[0]
    moves.add((int(row) - 3, int(column) - 4))
  expected = {(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)} - {(0, 0)}
  assert moves == expected


def test_shift_does_not_wrap():
  frame = np.full((8, 8, 1), 255, np.uint8)
  for k in range(50):
    moved = shifts.apply('shift', frame, k)[..., 0]
    black = 64 - np.count_nonzero(moved)
    assert black in (8, 15)  # a row or column, or both
