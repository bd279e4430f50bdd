import numpy as np
import pytest
from scipy import stats

from modelstock_jax.report import comparison
from modelstock_jax.report import differences
from modelstock_jax.report import results
from modelstock_jax.training import evaluation

STOCK, ONE, TWO = 'model_stock_end', 'fine_tuned', 'fine_tuned_2'


def _pair(gained, lost, n):
  """Right answers of two methods: the first gains some, and loses some."""
  first, second = np.zeros((2, n))
  first[:gained] = 1
  second[gained : gained + lost] = 1
  return first, second


@pytest.mark.parametrize(('gained', 'lost', 'n'), [(30, 18, 400), (9, 2, 97)])
def test_interval_is_that_of_a_paired_bootstrap_elsewhere(gained, lost, n):
  first, second = _pair(gained, lost, n)
  low, high = differences.interval((first - second)[None])
  theirs = stats.bootstrap(
    (first, second),
    lambda x, y, axis: (x - y).mean(axis),
    paired=True,
    method='percentile',
    n_resamples=4000,
    rng=np.random.default_rng(1),
  ).confidence_interval
  # McNemar's: the variance of a mean of -1, 0 and 1.
  mean = (gained - lost) / n
  error = np.sqrt((gained + lost) / n - mean**2) / np.sqrt(n)
  # An end is a multiple of 1 / n; 2000 resamples have it within 0.06 errors.
  atol = 0.2 * error + 1 / n
  np.testing.assert_allclose([low, high], theirs, atol=atol)
  z = stats.norm.ppf(0.975)
  np.testing.assert_allclose(
    [low, high], [mean - z * error, mean + z * error], atol=atol
  )
  assert differences.interval((first - second)[None]) == (low, high)


def test_seeds_are_drawn_as_well():
  # All examples alike: the mean of two seeds drawn of 0 and 1 is 0, 0.5 or 1,
  # in a quarter, a half and a quarter of the cases.
  apart = np.repeat([[0.0], [1.0]], 50, axis=1)
  assert differences.interval(apart) == (0, 1)
  # All seeds alike: examples are drawn together, and three seeds know no more.
  first, second = _pair(30, 18, 400)
  one = (first - second)[None]
  three = np.repeat(one, 3, axis=0)
  np.testing.assert_allclose(
    differences.interval(three), differences.interval(one), rtol=1e-12
  )


def test_each_merge_is_compared_with_what_comes_before_it():
  right = {
    ONE: [np.array([1, 1, 0, 0], np.float32)],
    STOCK: [np.array([1, 1, 1, 0], np.float32)],
  }
  dark = {ONE: right[ONE], STOCK: right[ONE]}
  actual = differences.compare({'validation': right, 'noise': dark})
  assert {x.benchmark: x.difference for x in actual} == {
    'validation': 0.25,
    'noise': 0,
  }
  assert {(x.method, x.other, x.n, x.seeds) for x in actual} == {
    (STOCK, ONE, 4, 1)
  }


@pytest.fixture
def paired():
  return [
    differences.Difference(STOCK, ONE, 'validation', 0.03, -0.01, 0.07, 1, 120),
    differences.Difference(
      STOCK, TWO, 'validation', 0.017, -0.008, 0.042, 1, 120
    ),
  ]


def test_file_is_of_the_rows_next_to_it(paired, tmp_path):
  rows = [
    evaluation.Row(method, 'validation', 0, accuracy, 120)
    for method, accuracy in {ONE: 0.87, TWO: 0.883, STOCK: 0.9}.items()
  ]
  path = tmp_path / 'results.differences.json'
  assert differences.load(path) == []
  comparison.save(comparison.Measured(rows, paired), tmp_path / 'results.json')
  assert results.load(tmp_path / 'results.json') == rows
  assert differences.load(path) == paired
  comparison.save(comparison.Measured(rows, []), tmp_path / 'results.json')
  assert not path.exists()
  path.write_text('[{"method": "a"}]')
  with pytest.raises(ValueError, match='differences\\.json does not hold'):
    differences.load(path)


@pytest.mark.parametrize(
  ('ends', 'points', 'meaning'),
  [
    ((-0.8, 4.2), '1.7 points above', 'no difference that these examples can'),
    ((0.1, 3.0), '1.7 points above', 'better, by more than the choice of'),
    ((-3.0, -0.1), '1.7 points below', 'worse, by more than the choice of'),
    ((0.0, 0.0), 'level with', 'no difference that these examples can show'),
  ],
)
def test_the_verdict_is_against_the_best_single_model(
  paired, ends, points, meaning
):
  sign = {'above': 1, 'below': -1}.get(points.split()[-1], 0)
  paired[1] = paired[1]._replace(
    difference=0.017 * sign, low=ends[0] / 100, high=ends[1] / 100
  )
  [sentence] = differences.verdict(paired)
  assert sentence.startswith(
    f'On validation (120 examples), Model Stock (end) is {points} Fine-tuned 2,'
    ' the best of 2 single models (95 % interval '
  )
  assert f'{ends[0]:+.1f} to {ends[1]:+.1f}): {meaning}' in sentence


def test_the_verdict_names_what_is_compared(paired):
  names = ['validation', 'validation@mean', 'validation@blur', 'noise']
  several = [
    each._replace(benchmark=name, seeds=3) for name in names for each in paired
  ]
  clean, corrupted = differences.verdict(several)
  assert clean.startswith('On validation (120 examples and 3 seeds), ')
  assert corrupted.startswith('On validation, corrupted (120 examples')
  assert 'the best' not in differences.verdict(paired[:1])[0]
  three = [*paired, paired[0]._replace(other='fine_tuned_3')]
  assert ', the best of 3 single models' in differences.verdict(three)[0]
  others = [
    paired[0]._replace(other='zero_shot', difference=0.2),
    paired[0]._replace(other='uniform_soup', difference=-0.01),
    paired[0]._replace(other='wise_ft_0.5', difference=0.1),
  ]
  single, other = differences.verdict([*paired, *others])
  assert 'points above Fine-tuned 2, the best of 2 single models' in single
  assert '1.0 points below Uniform average, the best of 3 other mod' in other
  assert results.pairs([TWO, ONE, STOCK]) == [(STOCK, TWO), (STOCK, ONE)]
