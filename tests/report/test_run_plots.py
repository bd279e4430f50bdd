import re

from matplotlib import colors
from matplotlib import image as mpl_image
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax.report import merges
from modelstock_jax.report import plots
from modelstock_jax.report import run_plots


@pytest.fixture
def draw(tmp_path):
  """Pixels of a figure, as its PNG has them."""

  def write_and_read(figure):
    plots.save(figure, tmp_path / 'figure')
    pixels = mpl_image.imread(tmp_path / 'figure.png')[..., :3]
    return (pixels * 255).round().astype(np.uint8)

  return write_and_read


def _has(pixels, color):
  """Tells which pixels have a color."""
  return (pixels == np.array(colors.to_rgb(color)) * 255).all(-1)


def _center(pixels, color):
  """Mean place (right, up) of the pixels of a color, and their number."""
  down, right = np.nonzero(_has(pixels, color))
  return right.mean(), -down.mean(), len(right)


@pytest.mark.parametrize('plot', [run_plots.by_depth, run_plots.over_epochs])
def test_merge_plots_show_every_kind_and_follow_the_data(
  draw, merge_line, plot
):
  names = {
    f'image_block_{block}_attention_out_kernel': 0.3 for block in range(2)
  }
  places = []
  for head in (0.2, 0.9):
    lines = [
      merge_line(1, 0.7, restarts=True, **names),
      merge_line(2, 0.5, head_bias=head, head_kernel=head, **names),
    ]
    pixels = draw(plot(merges.collect([lines])))
    for kind in clip.layers.KINDS:
      assert _has(pixels, plots.KIND_STYLES[kind][0]).sum() > 50, kind
    places.append(_center(pixels, plots.KIND_STYLES['norm'][0])[1])
  # The axes start lower for the lower head, so all else stands higher.
  assert places[0] > places[1]


def test_negative_cosines_stay_in_the_picture(draw, merge_line):
  line = merge_line(1, 0.9, head_bias=-0.5)  # its ratio is -2
  pixels = draw(run_plots.by_depth(merges.collect([[line]])))
  low = _center(pixels, plots.KIND_STYLES['mlp'][0])[1]
  line = merge_line(1, 0.9)
  pixels = draw(run_plots.by_depth(merges.collect([[line]])))
  assert low > _center(pixels, plots.KIND_STYLES['mlp'][0])[1]


def _titles(figure):
  return re.findall(r'<title>(.*?)</title>', plots.svg(figure))


def test_depth_says_layer_and_value(merge_line):
  line = merge_line(1, 0.5, head_bias=0.25, head_kernel=0.75)
  titles = _titles(run_plots.by_depth(merges.collect([[line]])))
  # Ratios of two models: 2 c / (1 + c).
  for text in (
    'head/bias: cosine 0.250',
    'head/bias: ratio 0.400',
    'head/kernel: ratio 0.857',
    'head, output: mean cosine 0.500',
    'image/block_1/attention/qkv/kernel: ratio 0.667',
    'norm, block 0: mean ratio 0.667',
  ):
    assert text in titles


def test_epochs_say_kind_epoch_and_value(merge_line):
  lines = [merge_line(1, 0.5, restarts=True), merge_line(2, 1.0)]
  titles = _titles(run_plots.over_epochs(merges.collect([lines])))
  for text in (
    'mlp, after epoch 1: mean cosine 0.500',
    'mlp, after epoch 1: mean ratio 0.667',
    'block 1, after epoch 2: mean ratio 1.000',
  ):
    assert text in titles


def test_steps_leave_out_what_is_not_finite():
  lines = [
    {'step': 1, 'kind': 'train', 'loss': [2.5, 1.0]},
    {'step': 2, 'kind': 'train', 'loss': [None, 0.5]},
    {'step': 2, 'kind': 'validation', 'epoch': 1, 'accuracy': 0.875},
  ]
  assert sorted(_titles(run_plots.over_steps(lines))) == [
    'after epoch 1: 87.50 %',
    'model 0, step 1: loss 2.5',
    'model 1, step 1: loss 1',
    'model 1, step 2: loss 0.5',
  ]
