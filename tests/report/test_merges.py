import collections

import jax
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax.clip import weights
from modelstock_jax.files import names
from modelstock_jax.report import merges
from modelstock_jax.report import plots


def test_layers_have_kind_and_place(merge_line):
  actual = merges.collect([{1: merge_line(1, 0.5)}])
  assert actual.places == ['input', '0', '1', 'output']
  placed = {
    layer.name: (layer.kind, actual.places[layer.place])
    for layer in actual.layers
  }
  assert placed == {
    'head/bias': ('head', 'output'),
    'head/kernel': ('head', 'output'),
    'image/ln_post/scale': ('norm', 'output'),
    'image/ln_pre/scale': ('norm', 'input'),
    'image/patch_embedding/kernel': ('embedding', 'input'),
    # Query, key and value share a cosine: they are one layer.
    'image/block_0/attention/qkv/kernel': ('attention', '0'),
    'image/block_0/attention/out/kernel': ('attention', '0'),
    'image/block_0/ln_1/scale': ('norm', '0'),
    'image/block_0/mlp/fc/bias': ('bias', '0'),
    'image/block_0/mlp/fc/kernel': ('mlp', '0'),
    'image/block_1/attention/qkv/kernel': ('attention', '1'),
    'image/block_1/attention/out/kernel': ('attention', '1'),
    'image/block_1/ln_1/scale': ('norm', '1'),
    'image/block_1/mlp/fc/bias': ('bias', '1'),
    'image/block_1/mlp/fc/kernel': ('mlp', '1'),
  }
  kinds = merges.by_kind(actual.layers)
  assert list(kinds) == list(plots.KIND_STYLES)
  assert kinds['embedding'].sum() == 1
  assert sum(layer.place == 0 for layer in actual.layers) == 2


def test_values_by_seed_epoch_and_layer(merge_line):
  runs = [
    {
      1: merge_line(1, 0.2 + 0.1 * seed),
      2: merge_line(2, 0.5, head_bias=-0.25 * seed),
    }
    for seed in range(3)
  ]
  actual = merges.collect(runs)
  assert actual.epochs == [1, 2]
  assert actual.cosine.shape == actual.ratio.shape == (3, 2, len(actual.layers))
  bias = [layer.name for layer in actual.layers].index('head/bias')
  np.testing.assert_allclose(actual.cosine[:, 0, bias], [0.2, 0.3, 0.4])
  np.testing.assert_allclose(actual.cosine[:, 1, bias], [0, -0.25, -0.5])
  # 2 c / (1 + c) by hand: of 0, -1/4, -1/2.
  np.testing.assert_allclose(actual.ratio[:, 1, bias], [0, -2 / 3, -2])


def test_parameters_of_one_layer_are_averaged(merge_line):
  line = merge_line(
    1,
    0.5,
    image_block_0_attention_query_kernel=0.1,
    image_block_0_attention_key_kernel=0.3,
    image_block_0_attention_value_kernel=0.8,
  )
  actual = merges.collect([{1: line}])
  names = [layer.name for layer in actual.layers]
  layer = names.index('image/block_0/attention/qkv/kernel')
  np.testing.assert_allclose(actual.cosine[0, 0, layer], 0.4)  # 1.2 / 3


def test_only_real_merges_count(merge_line):
  # A run that merges at the end also logs what a merge would have been.
  end = [merge_line(5, 0.1), merge_line(10, 0.2), merge_line(15, 0.3)]
  assert merges.select(end, 15) == {15: end[2]}
  assert merges.select(end, 20) == {}
  every_ten = [
    merge_line(5, 0.1),
    merge_line(10, 0.2, restarts=True),
    merge_line(15, 0.3),
    merge_line(20, 0.4),
  ]
  assert merges.select(every_ten, 20) == {10: every_ten[1], 20: every_ten[3]}


def test_one_model_has_no_merge(merge_line):
  line = {**merge_line(5, 0.1), 'cosine': {}, 'ratio': {}}
  assert merges.select([line], 5) == {}


def test_epochs_are_those_in_common(merge_line):
  runs = [
    {epoch: merge_line(epoch, 0.5) for epoch in epochs}
    for epochs in ((1, 2, 3), (2, 3, 4))
  ]
  assert merges.collect(runs).epochs == [2, 3]


def test_runs_of_different_networks_are_an_error(merge_line):
  other = merge_line(1, 0.5)
  del other['cosine']['image/ln_pre/scale']
  with pytest.raises(ValueError, match=r"differ .*\['image/ln_pre/scale'\]"):
    merges.collect([{1: merge_line(1, 0.5)}, {1: other}])


def test_names_tell_kind_and_block():
  config = clip.SIZES['ViT-B/32']
  model = clip.classifier(config, num_classes=4)
  like = jax.eval_shape(clip.create(config).init, jax.random.key(0))
  head = jax.eval_shape(model.init, jax.random.key(0))['head']
  paths = [path for path, _ in weights.flatten({**like, 'head': head})]
  counts = collections.Counter(map(names.layer_kind, paths))
  blocks = config.vision.depth + config.text.depth
  assert counts == {
    'attention': 4 * blocks,
    'mlp': 2 * blocks,
    'norm': 4 * blocks + 2 * 3,  # ln_pre, ln_post, ln_final
    'bias': 6 * blocks,
    'embedding': 5,  # patch, class, token, a position in each tower
    'head': 5,  # two projections, kernel, bias, temperature
  }
  for path in paths:
    assert names.layer_block(path) == clip.layer_depth(path), path
  # Networks of others.
  for name, kind, block in (
    ('model.layers.3.self_attn.q_proj.weight', 'attention', 3),
    ('transformer.h.0.mlp.c_fc.bias', 'bias', 0),
    ('layers_2/norm/scale', 'norm', 2),
    ('lm_head.weight', 'head', None),
    ('wte.weight', 'embedding', None),
    ('proj', 'head', None),
  ):
    assert (names.layer_kind(name), names.layer_block(name)) == (kind, block)
