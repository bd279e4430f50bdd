from matplotlib import colors
from matplotlib import image as mpl_image
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax.analysis import merges
from modelstock_jax.analysis import plots
from modelstock_jax.analysis import results


def _read(path):
  return (mpl_image.imread(path)[..., :3] * 255).round().astype(np.uint8)


def _has(pixels, color):
  """Tells which pixels have a color."""
  return (pixels == np.array(colors.to_rgb(color)) * 255).all(-1)


def _center(pixels, color):
  """Mean place (right, up) of the pixels of a color, and their number."""
  down, right = np.nonzero(_has(pixels, color))
  return right.mean(), -down.mean(), len(right)


def _rows(points, seeds=3):
  """Rows on 'digits' and 'noise', whose seeds differ by a point."""
  return [
    results.Row(method, benchmark, seed, (value + seed) / 100, 100)
    for method, pair in points.items()
    for benchmark, value in zip(('digits', 'noise'), pair, strict=True)
    for seed in range(seeds)
  ]


def test_scatter_puts_methods_where_they_are(tmp_path):
  path = tmp_path / 'scatter.png'
  points = {'fine_tuned': (80, 40), 'uniform_soup': (85, 30), 'mine': (90, 25)}
  plots.scatter(_rows(points), path)
  pixels = _read(path)
  assert pixels.shape == (960, 1280, 3)
  orange = _center(pixels, plots._ORANGE)
  red = _center(pixels, plots._RED)
  assert orange[0] < red[0]
  assert orange[1] > red[1]
  assert min(orange[2], red[2]) > 400

  plots.scatter(_rows(points | {'mine': (82, 35)}), path)
  pixels = _read(path)
  orange = _center(pixels, plots._ORANGE)
  red = _center(pixels, plots._RED)
  assert orange[0] > red[0]
  assert orange[1] < red[1]


@pytest.mark.parametrize(('zero_shot', 'is_line'), [(40, True), (78, False)])
def test_zero_shot_far_away_is_a_line(tmp_path, zero_shot, is_line):
  path = tmp_path / 'scatter.png'
  points = {'zero_shot': (zero_shot, 35), 'fine_tuned': (80, 40)}
  plots.scatter(_rows(points), path)
  longest = _has(_read(path), plots._GREY).sum(1).max()
  assert (longest > 500) == is_line


def test_scatter_draws_the_wise_ft_curve(tmp_path):
  path = tmp_path / 'scatter.png'
  points = {'zero_shot': (60, 30), 'fine_tuned': (80, 40)}
  plots.scatter(_rows(points | {'wise_ft_0.5': (75, 60)}), path)
  point = _center(_read(path), plots._PURPLE)
  points |= {'wise_ft_0.3': (70, 50), 'wise_ft_0.5': (75, 60)}
  plots.scatter(_rows(points), path)
  curve = _center(_read(path), plots._PURPLE)
  assert curve[2] > point[2] + 1000


def test_wise_ft_curve_leads_from_zero_shot_to_fine_tuned():
  points = {
    'wise_ft_0.75': np.array([[3.0, 30.0], [5.0, 50.0]]),
    'fine_tuned': np.array([[6.0, 20.0]]),
    'wise_ft_0.25': np.array([[2.0, 25.0]]),
    'zero_shot': np.array([[1.0, 10.0]]),
  }
  np.testing.assert_array_equal(
    plots._wise_ft_curve(points), [[1, 10], [2, 25], [4, 40], [6, 20]]
  )


def test_scatter_needs_both_axes(tmp_path):
  rows = [results.Row('zero_shot', 'digits', 0, 0.5, 100)]
  with pytest.raises(ValueError, match='in-distribution benchmark and a shift'):
    plots.scatter(rows, tmp_path / 'scatter.png')


def test_scatter_of_one_seed(tmp_path):
  path = tmp_path / 'scatter.png'
  plots.scatter(_rows({'uniform_soup': (80, 40)}, seeds=1), path)
  assert _center(_read(path), plots._ORANGE)[2] > 400


@pytest.mark.parametrize('plot', [plots.by_depth, plots.over_epochs])
def test_merge_plots_show_every_kind_and_follow_the_data(
  tmp_path, merge_line, plot
):
  path = tmp_path / 'merge.png'
  names = {
    f'image_block_{block}_attention_out_kernel': 0.3 for block in range(2)
  }
  places = []
  for head in (0.2, 0.9):
    lines = [
      merge_line(1, 0.7, restarts=True, **names),
      merge_line(2, 0.5, head_bias=head, head_kernel=head, **names),
    ]
    plot(merges.collect([lines]), path)
    pixels = _read(path)
    for kind in clip.layers.KINDS:
      assert _has(pixels, plots._KIND_STYLES[kind][0]).sum() > 50, kind
    places.append(_center(pixels, plots._KIND_STYLES['norm'][0])[1])
  # The axes start lower for the lower head, so all else stands higher.
  assert places[0] > places[1]


def test_negative_cosines_stay_in_the_picture(tmp_path, merge_line):
  path = tmp_path / 'merge.png'
  line = merge_line(1, 0.9, head_bias=-0.5)  # its ratio is -2
  plots.by_depth(merges.collect([[line]]), path)
  low = _center(_read(path), plots._KIND_STYLES['mlp'][0])[1]
  line = merge_line(1, 0.9)
  plots.by_depth(merges.collect([[line]]), path)
  assert low > _center(_read(path), plots._KIND_STYLES['mlp'][0])[1]
