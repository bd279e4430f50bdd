import numpy as np

from modelstock_jax.data.builders import digits


def test_rows_stand_in_rounds_of_one_per_class():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 130))
  splits = digits.assign(labels)
  for rows in splits.values():
    for first in range(0, len(rows), 3):
      assert sorted(labels[rows[first : first + 3]]) == [0, 1, 2]
  together = sorted(row for rows in splits.values() for row in rows)
  assert together == list(range(390))
  assert [len(rows) for rows in splits.values()] == [240, 120, 30]


def test_order_within_a_class_is_not_that_of_the_rows():
  train = digits.assign(np.repeat(np.arange(2), 150))['train']
  first_class = train[::2]
  assert sorted(first_class) != first_class
