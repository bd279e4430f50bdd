"""RandAugment of timm's strings, against timm's own module."""

import collections
import importlib.util
import pathlib
import random
import sys

import numpy as np
from PIL import Image
import pytest

from modelstock_jax.data import augment

pytestmark = pytest.mark.oracle

# timm's names of operations, with and without 'inc1', and ours.
NAMES = {
  'AutoContrast': 'autocontrast',
  'Equalize': 'equalize',
  'Invert': 'invert',
  'Rotate': 'rotate',
  'Posterize': 'posterize',
  'Solarize': 'solarize',
  'SolarizeAdd': 'solarize_add',
  'Color': 'color',
  'Contrast': 'contrast',
  'Brightness': 'brightness',
  'Sharpness': 'sharpness',
  'ShearX': 'shear_x',
  'ShearY': 'shear_y',
  'TranslateXRel': 'translate_x',
  'TranslateYRel': 'translate_y',
}
DRAWS = 6000


@pytest.fixture(scope='module')
def timm():
  """The module of RandAugment, without the package, which needs torchvision."""
  path = pathlib.Path(sys.prefix) / 'open_clip/timm/data/auto_augment.py'
  spec = importlib.util.spec_from_file_location('timm_auto_augment', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _transform(timm, text):
  """As `transforms_imagenet_train` makes it of CLIP's mean."""
  hparams = {'img_mean': (123, 117, 104), 'interpolation': Image.BILINEAR}
  return timm.rand_augment_transform(f'rand-{text}', hparams)


def _ours(name):
  return NAMES[name.replace('Increasing', '')]


@pytest.fixture
def image():
  rng = np.random.default_rng(0)
  rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
  # No translation ends at half a pixel, where rounding decides on a row.
  return rough.resize((83, 83), Image.Resampling.BICUBIC)


@pytest.mark.parametrize('text', ['inc0', 'inc1'])
@pytest.mark.parametrize('magnitude', [0, 1, 3, 5, 7, 9, 10, 12, 20])
def test_operations_at_a_magnitude(timm, image, magnitude, text):
  """Pixel for pixel in both directions; a translation may round by 1."""
  theirs = _transform(timm, f'm{magnitude}-p1-{text}').ops
  ours = augment.timm_operations(text == 'inc1')
  assert {_ours(operation.name) for operation in theirs} == set(ours)
  level = min(magnitude, 10) / 10
  random.seed(0)
  for operation in theirs:
    name = _ours(operation.name)
    actual = [ours[name](image, level, sign) for sign in (-1, 1)]
    try:
      expected = [operation(image) for _ in range(20)]
    except ValueError:  # no bit is left, which Pillow takes no more
      assert name == 'posterize'
      expected = [Image.new('RGB', image.size)]
    for one, others in ((actual, expected), (expected, actual)):
      for x in one:
        off = [np.abs(np.subtract(x, y, dtype=int)).max() for y in others]
        assert min(off) <= name.startswith('translate'), (name, off)


def _note_theirs(timm, text, patch):
  """Names and arguments of the operations of each of many draws."""
  draws = []

  def note(name):
    def operation(image, *arguments, **_):
      draws[-1].append((_ours(name), arguments))
      return image

    return operation

  patch.setattr(timm, 'NAME_TO_OP', {n: note(n) for n in timm.NAME_TO_OP})
  transform = _transform(timm, text)
  random.seed(0)
  np.random.seed(0)
  for _ in range(DRAWS):
    draws.append([])
    transform(None)
  return draws


def _note_ours(text, patch):
  draws = []

  def note(name):
    def operation(image, level, sign):
      draws[-1].append((name, (level, sign)))
      return image

    return operation

  noted = {name: note(name) for name in augment.timm_operations(False)}
  patch.setattr(augment, 'timm_operations', lambda increasing: noted)
  rng = np.random.default_rng(0)
  for _ in range(DRAWS):
    draws.append([])
    augment.timm_rand_augment(None, text, rng)
  return draws


@pytest.mark.parametrize(
  ('text', 'count', 'probability'),
  [('m9-n2', 2, 0.5), ('m9', 2, 0.5), ('m9-n3-p0.8', 3, 0.8), ('m9-n0', 0, 0)],
)
def test_operations_are_drawn_as_often(
  timm, monkeypatch, text, count, probability
):
  both = _note_theirs(timm, text, monkeypatch), _note_ours(text, monkeypatch)
  for draws in both:
    numbers = np.bincount([len(draw) for draw in draws], minlength=count + 1)
    assert len(numbers) == count + 1
    # Five deviations of a binomial of DRAWS * count.
    trials = DRAWS * count
    off = 5 * np.sqrt(trials * probability * (1 - probability))
    total = sum(len(draw) for draw in draws)
    assert abs(total - trials * probability) <= off
  # Numbers of operations and their names: each difference of two counts has a
  # variance of at most their sum.
  for key in (len, lambda draw: draw[0][0] if draw else ''):
    theirs, ours = (collections.Counter(map(key, draws)) for draws in both)
    assert theirs.keys() == ours.keys()
    if len(theirs) > 1:
      chi = [(theirs[k] - ours[k]) ** 2 / (theirs[k] + ours[k]) for k in theirs]
      assert sum(chi) < 45  # 15 degrees of freedom: once in 12,000


def _far(one, two):
  """Kolmogorov-Smirnov of two samples: above 2.5 it is once in 130,000."""
  values = np.sort(np.concatenate([one, two]))
  cdfs = [
    np.searchsorted(np.sort(x), values, side='right') / len(x)
    for x in (one, two)
  ]
  size = len(one) * len(two) / (len(one) + len(two))
  return np.sqrt(size) * np.abs(cdfs[0] - cdfs[1]).max()


# What the arguments of these are at level 1, either way.
GREATEST = {
  'rotate': 30,
  'shear_x': 0.3,
  'shear_y': 0.3,
  'translate_x': 0.45,
  'translate_y': 0.45,
}


@pytest.mark.parametrize('text', ['m9-mstd0.5', 'm5-mstd3', 'm8-mstd101'])
def test_magnitudes_are_drawn_alike(timm, monkeypatch, text):
  theirs, ours = (
    [
      (name, arguments)
      for draw in draws
      for name, arguments in draw
      if name in GREATEST
    ]
    for draws in (
      _note_theirs(timm, text, monkeypatch),
      _note_ours(text, monkeypatch),
    )
  )
  theirs = np.array([x / GREATEST[name] for name, (x,) in theirs])
  ours = np.array([level * sign for _, (level, sign) in ours])
  assert min(len(theirs), len(ours)) > 1800
  assert np.abs(ours).max() <= 1
  assert _far(np.abs(theirs), np.abs(ours)) < 2.5
  # Signs: five deviations of the difference of two binomial shares.
  shares = np.mean(theirs > 0), np.mean(ours > 0)
  assert abs(shares[0] - shares[1]) < 5 * np.sqrt(0.5 / len(ours))
