import numpy as np

from modelstock_jax.data import examples


def _rng(place):
  return examples.generator(seed=0, model=0, epoch=0, place=place)


def test_no_two_examples_share_random_numbers():
  numbers = [
    tuple(
      examples.generator(
        seed=seed, model=model, epoch=epoch, place=place
      ).integers(2**62, size=8)
    )
    for seed in (0, 1)
    for model in (0, 1)
    for epoch in (0, 1)
    for place in (0, 1, 2)
  ]
  assert len({number for draws in numbers for number in draws}) == 24 * 8


def test_numbers_of_neighbours_are_uniform_and_uncorrelated():
  first = np.array([_rng(place).random(2) for place in range(4000)])
  # Means of 4000 uniform numbers have deviations of sqrt(1/12/4000) = 0.0046;
  # correlations of 4000 pairs have 0.016. Five deviations each.
  assert abs(first.mean(0) - 0.5).max() < 0.023
  assert abs(np.corrcoef(first.T)[0, 1]) < 0.08
  assert abs(np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]) < 0.08
