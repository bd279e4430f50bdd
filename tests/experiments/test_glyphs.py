import itertools

import numpy as np
import pytest

from experiments.digits import glyphs
from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources


def _take(count, **options):
  batches = glyphs.glyph_batches(**options)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def _blocks(images):
  return images.reshape(-1, 8, 4, 8, 4).mean((2, 4))


def _assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_a_function_of_the_seed():
  batches = _take(3, batch_size=32, seed=3)
  for one, other in zip(batches, _take(3, batch_size=32, seed=3), strict=True):
    _assert_same(one, other)
  other_seed = _take(1, batch_size=32, seed=4)[0]
  assert not np.array_equal(batches[0]['image'], other_seed['image'])
  assert not np.array_equal(batches[0]['image'], batches[1]['image'])


def test_shapes_and_classes():
  batch = _take(1, batch_size=1024, seed=0)[0]
  assert batch['image'].shape == (1024, 8, 8, 1)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32
  counts = np.bincount(batch['label'], minlength=36)
  assert len(counts) == 36
  assert counts.min() > 7  # 28 expected of each; sd 5.3


def test_look_is_that_of_the_real_digits():
  batch = _take(1, batch_size=4096, seed=1)[0]
  drawn = batch['image'][batch['label'] < 10][..., 0]
  real = np.stack(
    [
      preprocessing.decode(record['image'])[..., 0]
      for record in sources.open_source('digits', 'train')
    ]
  )
  for measure, tolerance in (
    (lambda x: x.mean() / 255, 0.05),  # ink
    (lambda x: (x.max(2) > 48).sum(1).mean() / 8, 0.05),  # rows it fills
    (lambda x: (x.max(1) > 48).sum(1).mean() / 8, 0.05),  # columns
    (lambda x: (x < 16).mean(), 0.08),  # background
  ):
    assert measure(drawn) == pytest.approx(measure(real), abs=tolerance)


def test_places_without_deformation_are_the_pixels_themselves(monkeypatch):
  for name in ('_ANGLE', '_SLANT', '_MOVE', '_ELASTIC', '_NOISE'):
    monkeypatch.setattr(glyphs, name, 0.0)
  for name in ('_HEIGHT', '_WIDTH', '_GAIN'):
    monkeypatch.setattr(glyphs, name, (1.0, 1.0))
  batch = _take(1, batch_size=8, seed=0)[0]
  source = sources.open_source('glyphs', 'train')
  drawn = np.stack([preprocessing.decode(r['image']) for r in source])
  drawn = drawn[..., 0]
  padded = np.pad(drawn, ((0, 0), (0, 1), (0, 1)))
  thick = np.max(
    [padded[:, r : r + 32, c : c + 32] for r in (0, 1) for c in (0, 1)], 0
  )
  labels = np.array([record['label'] for record in source])
  weights = set()
  for image, label in zip(batch['image'], batch['label'], strict=True):
    errors = [
      abs(_blocks(version[labels == label]) - image[..., 0]).max((1, 2)).min()
      for version in (drawn, thick)
    ]
    assert min(errors) <= 0.51  # of 255: rounding
    weights.add(np.argmin(errors))
  assert weights == {0, 1}


def test_turn_is_the_affine_map_it_says(monkeypatch):
  for name in ('_SLANT', '_MOVE', '_ELASTIC'):
    monkeypatch.setattr(glyphs, name, 0.0)
  monkeypatch.setattr(glyphs, '_HEIGHT', (2.0, 2.0))
  monkeypatch.setattr(glyphs, '_WIDTH', (0.5, 0.5))
  rng = np.random.default_rng(0)
  places = glyphs._places(1, rng)[0]
  # Undo the scales: what is left is a rotation, so lengths stay.
  turned = places * np.array([2.0, 0.5])[:, None, None]
  grid = np.arange(32) - 15.5
  lengths = np.hypot(*np.meshgrid(grid, grid, indexing='ij'))
  np.testing.assert_allclose(np.hypot(*turned), lengths, rtol=1e-5)


@pytest.mark.parametrize(
  'options',
  [{'batch_size': 0, 'seed': 0}, {'batch_size': 1, 'seed': -1}],
)
def test_bad_numbers(options):
  with pytest.raises(ValueError, match='must be at least'):
    glyphs.glyph_batches(**options)
