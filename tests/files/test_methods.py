"""Soups, WiSE-FT and LiNeS of files against float64 and the merges of trees."""

import json

import numpy as np
import pytest
import safetensors.numpy

import modelstock_jax as ms
from modelstock_jax import files
from modelstock_jax.files import blocks
from modelstock_jax.merging import options as options_lib

SHAPES = {
  'embed.weight': (40, 8),
  'blocks.0.attn.weight': (8, 8),
  'blocks.1.attn.weight': (8, 8),
  'blocks.3.mlp.weight': (6, 3, 2),
  'norm.weight': (64,),
}
DEPTHS = dict(zip(SHAPES, (None, 0, 1, 3, None), strict=True))


def check(actual, expected):
  """Float32 of values near 1, rounded once: half an ulp is 1.2e-7."""
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(actual[name], array, rtol=1e-7, atol=1e-7)


def double(tree):
  return {name: np.asarray(array, np.float64) for name, array in tree.items()}


@pytest.fixture
def small(monkeypatch):
  """Cuts tensors into blocks."""
  monkeypatch.setattr(blocks, 'BLOCK', 16)


def average(models, weights):
  return {
    name: sum(w * x[name] for w, x in zip(weights, models, strict=True))
    for name in models[0]
  }


@pytest.mark.parametrize('anchored', [True, False])
@pytest.mark.parametrize('num_models', [1, 2, 3])
def test_a_uniform_soup(family, save, load, tmp_path, anchored, num_models):
  trees = family(num_models)
  anchor, models = save(trees)
  soup = files.Method('soup')
  anchor = anchor if anchored else None
  merged = files.merge(anchor, models, tmp_path / 'out', method=soup)
  actual = load(tmp_path / 'out')
  individual = [double(tree) for tree in trees[1:]]
  check(actual, average(individual, [1 / num_models] * num_models))
  if num_models > 1:
    check(actual, dict(ms.uniform_soup(trees[1:])))
  # Angles are those from the anchor, where there is one.
  assert bool(merged.cosine) == (anchored and num_models > 1)
  tokenizer = json.loads((tmp_path / 'out/tokenizer.json').read_text())
  assert tokenizer == {'of': 'a' if anchored else 'b'}


def test_a_weighted_soup(family, save, load, tmp_path, small):
  trees = family(3)
  _, models = save(trees)
  weights = [0.5, 0.3, 0.2]
  soup = files.Method('soup', weights=weights)
  files.merge(None, models, tmp_path / 'out', method=soup)
  check(load(tmp_path / 'out'), average(map_double(trees[1:]), weights))
  report = json.loads((tmp_path / 'out/model_stock.json').read_text())
  assert report['method']['weights'] == weights


def map_double(trees):
  return [double(tree) for tree in trees]


@pytest.mark.parametrize('decay', ['linear', 'sqrt'])
def test_a_soup_of_a_run_has_the_updates_of_a_decayed_rate(
  family, save, load, tmp_path, decay
):
  """Scale the update before checkpoint k of n by 1 - k / n, or 1 - sqrt."""
  trees = family(4)
  _, models = save(trees)
  soup = files.Method('soup', decay=decay)
  files.merge(None, models, tmp_path / 'out', method=soup)
  steps = map_double(trees[1:])
  expected = steps[0]
  for k in range(1, 4):
    factor = 1 - (k / 4 if decay == 'linear' else (k / 4) ** 0.5)
    expected = {
      name: array + factor * (steps[k][name] - steps[k - 1][name])
      for name, array in expected.items()
    }
  check(load(tmp_path / 'out'), expected)


def test_wise_ft_in_one_pass(family, save, load, tmp_path, small):
  trees = family(1)
  trees[0]['ids'] = trees[1]['ids'] = np.arange(3)
  anchor, (model,) = save(trees)
  alphas = [0.0, 0.3, 0.55, 1.0]
  out = tmp_path / 'out'
  method = files.Method('wise_ft', alphas=alphas)
  merged = files.merge(anchor, [model], out, method=method)
  names = sorted(path.name for path in out.iterdir())
  folders = ['alpha_0', 'alpha_0.3', 'alpha_0.55', 'alpha_1']
  assert names == [*folders, 'model_stock.json']
  swept = ms.unstack(ms.wise_ft(trees[0], trees[1], alphas))
  center, tuned = map_double(trees)
  for folder, alpha, tree in zip(folders, alphas, swept, strict=True):
    actual = load(out / folder)
    check(actual, average([center, tuned], [1 - alpha, alpha]))
    check(actual, dict(tree))
    companions = sorted(path.name for path in (out / folder).iterdir())
    assert 'config.json' in companions
    assert 'tokenizer.json' in companions
  for name, array in load(out / 'alpha_0').items():
    np.testing.assert_array_equal(array, trees[0][name])
  assert merged.ratio['norm.weight'] == alphas
  assert merged.cosine == {}


def test_wise_ft_by_default_is_half_way(family, save, load, tmp_path):
  trees = family(1)
  anchor, models = save(trees, form='file')
  out = tmp_path / 'out.safetensors'
  files.merge(anchor, models, out, method=files.Method('wise_ft'))
  check(load(out), average(map_double(trees), [0.5, 0.5]))


@pytest.mark.parametrize(
  ('settings', 'alpha', 'beta'),
  [
    ({}, 0.0, 1.0),
    ({'alphas': [0.2]}, 0.2, 0.8),
    ({'alphas': [0.2], 'beta': 1.5}, 0.2, 1.5),
  ],
)
@pytest.mark.parametrize('num_models', [1, 2])
def test_lines(family, save, load, tmp_path, settings, alpha, beta, num_models):
  trees = family(num_models, shapes=SHAPES)
  anchor, models = save(trees)
  method = files.Method('lines', **settings)
  merged = files.merge(anchor, models, tmp_path / 'out', method=method)
  actual = load(tmp_path / 'out')
  model = average(map_double(trees[1:]), [1 / num_models] * num_models)
  center = double(trees[0])
  scales = {
    name: alpha if depth is None else alpha + beta * depth / 3
    for name, depth in DEPTHS.items()
  }
  assert merged.ratio == pytest.approx(scales)
  expected = {
    name: center[name] + scale * (model[name] - center[name])
    for name, scale in scales.items()
  }
  check(actual, expected)
  if num_models == 1:
    depth = lambda path, leaf: DEPTHS[path]  # noqa: E731
    tree = ms.lines(*trees, depth, alpha=alpha, beta=beta)
    for name, array in tree.items():
      np.testing.assert_allclose(actual[name], array, atol=1e-6)


def test_running_statistics_are_interpolated_as_weights(tmp_path, write_scenic):
  """Write Scenic's checkpoint of WiSE-FT, its model_state at the same alpha."""
  anchor, model = write_scenic('a', 1.0), write_scenic('b', 3.0)
  method = files.Method('wise_ft', alphas=[0.25])
  files.merge(anchor, [model], tmp_path / 'out', method=method)
  actual = files.merge(
    tmp_path / 'out', [model], None, method=files.Method('wise_ft')
  )
  assert actual.ratio  # it is read again
  from modelstock_jax.formats import detect

  tensors = detect.read(tmp_path / 'out').tensors
  for name in ('params/w', 'model_state/mean'):
    np.testing.assert_array_equal(tensors[name].load(), [1.5, 1.5])


@pytest.fixture
def write_scenic(tmp_path):
  from flax import serialization

  def write(name, value):
    (tmp_path / name).mkdir()
    array = np.full(2, value, np.float32)
    tree = {'params': {'w': array}, 'model_state': {'mean': array}}
    data = serialization.msgpack_serialize(tree)
    (tmp_path / name / 'checkpoint_3').write_bytes(data)
    return tmp_path / name

  return write


@pytest.mark.parametrize(
  ('name', 'settings', 'words'),
  [
    ('ties', {}, "name: is 'ties', must be one of model_stock, soup, wise_ft"),
    ('soup', {'weights': [0.5, 0.6]}, 'weights: is [0.5, 0.6], must be numb'),
    ('soup', {'weights': [1.5, -0.5]}, 'must be numbers >= 0 of sum 1'),
    ('soup', {'decay': 'cosine'}, "decay: is 'cosine', must be one of linear"),
    (
      'soup',
      {'decay': 'sqrt', 'weights': [0.5, 0.5]},
      'weights, decay: give one of them',
    ),
    ('wise_ft', {'alphas': [0.5, 1.5]}, 'must be numbers from 0 to 1, each'),
    ('wise_ft', {'alphas': [0.5, 0.5]}, 'each once'),
    ('wise_ft', {'alphas': [float('nan')]}, 'alphas: is [nan], must be'),
    ('wise_ft', {'beta': 1.0}, 'beta: is of lines, not wise_ft'),
    ('lines', {'beta': float('inf')}, 'beta: is inf, must be at most 1000'),
    ('lines', {'weights': [1.0]}, 'weights: is of soup, not lines'),
    ('model_stock', {'alphas': [0.5]}, 'alphas: is of wise_ft and lines, not'),
  ],
)
def test_settings_that_are_wrong(name, settings, words):
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    files.Method(name, **settings)
  assert words in str(caught.value)


@pytest.mark.parametrize(
  ('method', 'count', 'options', 'words'),
  [
    (files.Method('wise_ft'), 2, {}, 'wise_ft takes the anchor and one model'),
    (files.Method('lines'), 0, {}, 'the anchor and at least one model'),
    (
      files.Method('soup', weights=[0.5, 0.5]),
      3,
      {},
      'soup takes at least one model, weights one for each',
    ),
    (
      files.Method('soup'),
      2,
      {'options': options_lib.StockOptions('filter')},
      'unit, average, clip, strength, layers, stacked: are of model_stock',
    ),
    (files.Method('lines'), 2, {'strength': 0.5}, 'are of model_stock'),
    (files.Method('lines'), 2, {'layers': '(.*)'}, 'are of model_stock'),
    (files.Method('soup'), 2, {'stacked': {'.*': 0}}, 'are of model_stock'),
    (files.Method('lines'), 2, {}, 'lines: takes two blocks or more'),
  ],
)
def test_methods_that_do_not_fit(
  family, save, tmp_path, method, count, options, words
):
  anchor, models = save(family(3))
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    files.merge(
      anchor, models[:count], tmp_path / 'out', method=method, **options
    )
  assert words in str(caught.value)
  assert not list(tmp_path.glob('*out*'))


def test_only_a_soup_needs_no_anchor(family, save, tmp_path):
  _, models = save(family())
  with pytest.raises(ValueError, match='anchor: not given; model_stock takes'):
    files.merge(None, models, tmp_path / 'out')
  with pytest.raises(ValueError, match='is given twice'):
    files.merge(
      None, [models[0]] * 2, tmp_path / 'out', method=files.Method('soup')
    )


def test_several_alphas_take_a_folder(family, save, tmp_path):
  anchor, models = save(family(1))
  method = files.Method('wise_ft', alphas=[0.1, 0.2])
  with pytest.raises(ValueError, match='several alphas make a folder for each'):
    files.merge(anchor, models, tmp_path / 'm.safetensors', method=method)


def test_nothing_is_left_of_several_outputs(family, save, tmp_path):
  trees = family(1)
  trees[1]['norm.weight'][3] = np.nan
  anchor, models = save(trees)
  method = files.Method('wise_ft', alphas=[0.1, 0.2])
  with pytest.raises(ValueError, match=r'norm\.weight: values that are not fi'):
    files.merge(anchor, models, tmp_path / 'out', method=method)
  assert not list(tmp_path.glob('*out*'))


def test_what_float16_does_not_hold_of_several_outputs(family, save, tmp_path):
  """An infinity of the second output alone is seen."""
  trees = family(1)
  trees[0]['norm.weight'] = trees[0]['norm.weight'] * 0
  trees[1]['norm.weight'] = trees[1]['norm.weight'] * 0 + np.float32(7e4)
  anchor, models = save(trees)
  method = files.Method('wise_ft', alphas=[0.1, 1.0])
  with pytest.raises(
    ValueError, match=r'norm\.weight: has values that float16 does'
  ):
    files.merge(
      anchor, models, tmp_path / 'out', method=method, dtype='float16'
    )


def test_shards_of_several_outputs(family, save, load, tmp_path, monkeypatch):
  from modelstock_jax.files import layout

  monkeypatch.setattr(layout, 'SHARD_SIZE', 600)
  trees = family(1)
  anchor, models = save(trees)
  method = files.Method('wise_ft', alphas=[0.25, 0.75])
  files.merge(anchor, models, tmp_path / 'out', method=method)
  folder = tmp_path / 'out/alpha_0.75'
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  for name, file in index['weight_map'].items():
    assert name in safetensors.numpy.load_file(folder / file)
  check(load(folder), average(map_double(trees), [0.25, 0.75]))
