import pytest

from modelstock_jax.report import merges
from modelstock_jax.report import plots
from modelstock_jax.report import run_plots


@pytest.mark.parametrize('plot', [run_plots.by_depth, run_plots.over_epochs])
def test_merge_plots_show_every_kind_and_follow_the_data(
  drawn, merge_line, plot
):
  names = {
    f'image_block_{block}_attention_out_kernel': 0.3 for block in range(2)
  }
  places = []
  for head in (0.2, 0.9):
    lines = {
      1: merge_line(1, 0.7, **names),
      2: merge_line(2, 0.5, head_bias=head, head_kernel=head, **names),
    }
    pixels = drawn.pixels(plot(merges.collect([lines])))
    for kind, (color, _) in plots.KIND_STYLES.items():
      assert drawn.has(pixels, color).sum() > 50, kind
    places.append(drawn.center(pixels, plots.KIND_STYLES['norm'][0])[1])
  # The axes start lower for the lower head, so all else stands higher.
  assert places[0] > places[1]


def test_negative_cosines_stay_in_the_picture(drawn, merge_line):
  line = merge_line(1, 0.9, head_bias=-0.5)  # its ratio is -2
  pixels = drawn.pixels(run_plots.by_depth(merges.collect([{1: line}])))
  low = drawn.center(pixels, plots.KIND_STYLES['mlp'][0])[1]
  line = merge_line(1, 0.9)
  pixels = drawn.pixels(run_plots.by_depth(merges.collect([{1: line}])))
  assert low > drawn.center(pixels, plots.KIND_STYLES['mlp'][0])[1]


def test_depth_says_layer_and_value(drawn, merge_line):
  line = merge_line(1, 0.5, head_bias=0.25, head_kernel=0.75)
  titles = drawn.titles(run_plots.by_depth(merges.collect([{1: line}])))
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


def test_epochs_say_kind_epoch_and_value(drawn, merge_line):
  lines = {1: merge_line(1, 0.5), 2: merge_line(2, 1.0)}
  titles = drawn.titles(run_plots.over_epochs(merges.collect([lines])))
  for text in (
    'mlp, after epoch 1: mean cosine 0.500',
    'mlp, after epoch 1: mean ratio 0.667',
    'block 1, after epoch 2: mean ratio 1.000',
  ):
    assert text in titles


def test_steps_leave_out_what_is_not_finite(drawn):
  lines = [
    {'step': 1, 'kind': 'train', 'loss': [2.5, 1.0]},
    {'step': 2, 'kind': 'train', 'loss': [None, 0.5]},
    {'step': 2, 'kind': 'validation', 'epoch': 1, 'accuracy': 0.875},
  ]
  assert sorted(drawn.titles(run_plots.over_steps(lines))) == [
    'after epoch 1: 87.50 %',
    'model 0, step 1: loss 2.5',
    'model 1, step 1: loss 1',
    'model 1, step 2: loss 0.5',
  ]
