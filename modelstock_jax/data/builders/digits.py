"""The 1,797 handwritten digits that ship with scikit-learn, as TFDS."""

from typing import Any

import numpy as np
from sklearn import datasets
import tensorflow_datasets as tfds

_TRAIN_PER_CLASS = 80
_VALIDATION_PER_CLASS = 40
_SEED = 0


def assign(labels: np.ndarray) -> dict[str, list[int]]:
  """Assigns every row to one split, by class and by a fixed permutation.

  Rows of a split stand in rounds of one row per class, so every prefix of
  10 n training rows holds n of each class: `train[:200]` is a balanced set.

  Args:
    labels: `int[n]`, the class of each row.

  Returns:
    Rows of `train` (80 per class), `validation` (40 per class) and `test`
    (all others).
  """
  rng = np.random.default_rng(_SEED)
  splits = {'train': [], 'validation': [], 'test': []}
  for label in np.unique(labels):
    rows = rng.permutation(np.flatnonzero(labels == label)).tolist()
    held_out = _TRAIN_PER_CLASS + _VALIDATION_PER_CLASS
    splits['train'].append(rows[:_TRAIN_PER_CLASS])
    splits['validation'].append(rows[_TRAIN_PER_CLASS:held_out])
    splits['test'].append(rows[held_out:])
  return {name: _in_rounds(rows) for name, rows in splits.items()}


def _in_rounds(by_class: list[list[int]]) -> list[int]:
  longest = max(len(rows) for rows in by_class)
  return [
    rows[turn]
    for turn in range(longest)
    for rows in by_class
    if turn < len(rows)
  ]


class Digits(tfds.core.GeneratorBasedBuilder):
  """8x8 grey digits: ink counts 0..16 of 4x4 blocks, scaled to 0..255."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        'Handwritten digits of 43 people, 8x8 pixels, as they ship with '
        'scikit-learn: the test part of a larger collection. A pixel counts '
        'the inked ones among 4x4 pixels of a 32x32 bitmap (0..16), stored '
        'here as round(count * 255 / 16).'
      ),
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=list('0123456789')),
          'index': tfds.features.Scalar(np.int32),
        }
      ),
      homepage='https://archive.ics.uci.edu/dataset/80',
      citation=(
        'E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten '
        'Digits. UCI Machine Learning Repository, 1998. CC BY 4.0.'
      ),
      # The order of the records is part of the data: see `assign`.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    digits: Any = datasets.load_digits()
    return {
      name: self._generate_examples(digits.images, digits.target, rows)
      for name, rows in assign(digits.target).items()
    }

  def _generate_examples(self, images, labels, rows):
    for position, row in enumerate(rows):
      pixels = np.round(images[row] * (255 / 16)).astype(np.uint8)
      yield (
        position,
        {
          'image': pixels[..., None],
          'label': int(labels[row]),
          'index': row,
        },
      )
