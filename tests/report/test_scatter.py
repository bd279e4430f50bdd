from modelstock_jax.report import plots
from modelstock_jax.report import scatter
from modelstock_jax.training import evaluation


def _rows(points, seeds=3):
  """Rows on 'digits' and 'noise', whose seeds differ by a point."""
  return [
    evaluation.Row(method, benchmark, seed, (value + seed) / 100, 100)
    for method, pair in points.items()
    for benchmark, value in zip(('digits', 'noise'), pair, strict=True)
    for seed in range(seeds)
  ]


def test_scatter_puts_methods_where_they_are(drawn):
  points = {'fine_tuned': (80, 40), 'uniform_soup': (85, 30), 'mine': (90, 25)}
  pixels = drawn.pixels(scatter.draw(_rows(points)))
  assert pixels.shape == (960, 1280, 3)
  orange = drawn.center(pixels, plots.ORANGE)
  red = drawn.center(pixels, plots.RED)
  assert orange[0] < red[0]
  assert orange[1] > red[1]
  assert min(orange[2], red[2]) > 400

  pixels = drawn.pixels(scatter.draw(_rows(points | {'mine': (82, 35)})))
  orange = drawn.center(pixels, plots.ORANGE)
  red = drawn.center(pixels, plots.RED)
  assert orange[0] > red[0]
  assert orange[1] < red[1]


def test_zero_shot_is_a_line(drawn):
  points = {'zero_shot': (40, 35), 'fine_tuned': (80, 40)}
  pixels = drawn.pixels(scatter.draw(_rows(points)))
  assert drawn.has(pixels, plots.GREY).sum(1).max() > 500


def test_scatter_of_one_seed(drawn):
  figure = scatter.draw(_rows({'uniform_soup': (80, 40)}, seeds=1))
  assert drawn.center(drawn.pixels(figure), plots.ORANGE)[2] > 400


def test_scatter_says_what_its_points_are(drawn):
  rows = _rows({'uniform_soup': (80, 40), 'mine': (90, 25)}, seeds=2)
  assert set(drawn.titles(scatter.draw(rows))) == {
    'Uniform average, seed 0: test 80.0 %, mean of shifts 40.0 %',
    'Uniform average, seed 1: test 81.0 %, mean of shifts 41.0 %',
    # sd of two values that differ by 1: 1 / sqrt(2)
    'Uniform average, mean of 2 seeds: test 80.5 ± 0.7 %, mean of shifts '
    '40.5 ± 0.7 %',
    'mine, seed 0: test 90.0 %, mean of shifts 25.0 %',
    'mine, seed 1: test 91.0 %, mean of shifts 26.0 %',
    'mine, mean of 2 seeds: test 90.5 ± 0.7 %, mean of shifts 25.5 ± 0.7 %',
  }
