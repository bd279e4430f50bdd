"""Checkpoints on disk against the paper's formula in float64."""

import collections
import itertools
import json
import os

from flax import serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors

import modelstock_jax as ms
from modelstock_jax import files
from modelstock_jax.files import blocks
from modelstock_jax.files import layout
from modelstock_jax.formats import safetensors as safetensors_lib
from modelstock_jax.merging import options as options_lib

QUERY = 'blocks.0.attn.q_proj.weight'
KEY = 'blocks.0.attn.k_proj.weight'


def _cosine(steps, others, average):
  """The mean over pairs of float64 displacements."""
  actual = []
  for one, two in itertools.combinations(steps, 2):
    dot, left, right = (
      np.sum(x, axis=others) for x in (one * two, one**2, two**2)
    )
    cosine = dot / np.sqrt(left * right)
    actual.append(np.arccos(cosine) if average == 'angle' else cosine)
  mean = np.mean(actual, axis=0)
  return np.cos(mean) if average == 'angle' else mean


def oracle(
  trees, *, clip=True, strength=1.0, average='cosine', axis=None, groups=()
):
  """Equation 3 in float64: merged, cosine and ratio of every tensor.

  With `axis`, slices along it have cosines of their own. Of `groups`, sets of
  names, each has one cosine.
  """
  anchor, *models = [
    {name: np.asarray(array, np.float64) for name, array in tree.items()}
    for tree in trees
  ]
  steps = {n: [model[n] - anchor[n] for model in models] for n in anchor}
  merged, cosines, ratios = {}, {}, {}
  for name, center in anchor.items():
    others, measured = None, steps[name]
    if axis is not None and center.ndim > 1:
      others = tuple(a for a in range(center.ndim) if a != axis % center.ndim)
    for group in groups:
      if name in group:
        measured = [
          np.concatenate([steps[n][i].ravel() for n in group])
          for i in range(len(models))
        ]
    cosine = cosines[name] = _cosine(measured, others, average)
    cosine = np.clip(cosine, 0, 1) if clip else cosine
    count = len(models)
    t = strength * count * cosine / (1 + (count - 1) * cosine)
    ratios[name] = t
    t = t if others is None else np.expand_dims(t, others)
    merged[name] = center + t * sum(steps[name]) / count
  return merged, cosines, ratios


def check(actual, expected, tolerance=1e-6):
  """Absolute: values are near 1, so 1e-6 is a few roundings of float32."""
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    got = np.asarray(actual[name], np.float64)
    assert got.shape == np.shape(array)
    np.testing.assert_allclose(got, array, rtol=0, atol=tolerance)


@pytest.mark.parametrize('form', ['file', 'folder', 'sharded'])
@pytest.mark.parametrize('num_models', [2, 3, 5])
def test_layers(family, save, load, tmp_path, form, num_models):
  trees = family(num_models)
  anchor, models = save(trees, form=form)
  out = tmp_path / ('out.safetensors' if form == 'file' else 'out')
  merged = files.merge(anchor, models, out)
  expected, cosines, ratios = oracle(trees)
  check(load(out), expected)
  check(merged.cosine, cosines)
  check(merged.ratio, ratios)
  assert merged.output == out
  assert merged.left_out == []


@pytest.mark.parametrize('form', ['file', 'folder', 'sharded'])
def test_files_of_torch(family, save, save_torch, tmp_path, form):
  """The same bytes as from safetensors, whatever the checkpoints are mixed."""
  anchor, models = save(family(), form=form)
  copies = []
  for path in (anchor, *models):
    copy = tmp_path / f'torch_{path.name}'
    if form == 'file':
      copy = copy.with_suffix('.pt')
      _as_torch(path, copy, save_torch)
    else:
      copy.mkdir()
      for file in path.iterdir():
        name = file.name.replace('model', 'pytorch_model')
        if file.suffix == '.safetensors':
          _as_torch(file, copy / f'{name[:-12]}.bin', save_torch)
        elif file.name.endswith('.index.json'):
          text = file.read_text().replace('.safetensors', '.bin')
          text = text.replace('model-', 'pytorch_model-')
          (copy / 'pytorch_model.bin.index.json').write_text(text)
        else:
          (copy / file.name).write_bytes(file.read_bytes())
    copies.append(copy)
  suffix = '.safetensors' if form == 'file' else ''
  outputs = [tmp_path / f'{name}{suffix}' for name in ('one', 'two', 'three')]
  files.merge(anchor, models, outputs[0])
  files.merge(copies[0], copies[1:], outputs[1])
  files.merge(copies[0], [models[0], copies[2]], outputs[2])
  one, two, three = map(_contents, outputs)
  assert one == two == three


@pytest.mark.parametrize('suffix', ['.msgpack', '.npz'])
def test_files_of_flax_and_numpy(family, save, load, tmp_path, suffix):
  """The bytes of safetensors of the params; a folder keeps its config."""
  trees = family()
  anchor, models = save(trees)
  files.merge(anchor, models, tmp_path / 'out')
  wanted = _bytes(load(tmp_path / 'out'))
  for path, tree in zip((anchor, *models), trees, strict=True):
    (path / 'model.safetensors').unlink()
    (path / 'training_args.bin').unlink()
    copy = path / f'flax_model{suffix}'
    arrays = {f'params/{name}': array for name, array in tree.items()}
    if suffix == '.npz':
      np.savez(copy, **arrays, step=np.array(3))
    else:
      state = {'params': tree, 'step': 3, 'opt_state': {'mu': np.ones(3)}}
      copy.write_bytes(serialization.msgpack_serialize(state))
  files.merge(anchor, models, tmp_path / 'folder')
  folder = {path.name for path in (tmp_path / 'folder').iterdir()}
  assert folder >= {'model.safetensors', 'config.json', 'tokenizer.json'}
  single = [path / f'flax_model{suffix}' for path in (anchor, *models)]
  files.merge(single[0], single[1:], tmp_path / 'out.safetensors')
  for path in (tmp_path / 'folder', tmp_path / 'out.safetensors'):
    actual = load(path)
    assert all(name.startswith('params/') for name in actual)
    named = {name.removeprefix('params/'): x for name, x in actual.items()}
    assert _bytes(named) == wanted
  with pytest.raises(ValueError, match='a merge is written as safetensors'):
    files.merge(anchor, models, tmp_path / f'out{suffix}')


def _bytes(arrays):
  return {name: array.tobytes() for name, array in arrays.items()}


def _as_torch(path, copy, save_torch):
  stored = safetensors_lib.read(path).tensors
  save_torch(copy, {name: x.load() for name, x in stored.items()})


def _contents(path):
  paths = [path] if path.is_file() else sorted(path.iterdir())
  reports = ('model_stock.json', 'README.md')  # which name the checkpoints
  return [
    (file.name if path.is_dir() else '', file.read_bytes())
    for file in paths
    if not file.name.endswith(reports)
  ]


GROUP = (QUERY, KEY)
EVERY = ('embed.weight', *GROUP, 'blocks.0.attn.q_proj.bias')
EVERY = (*EVERY, 'blocks.0.conv.weight', 'norm.weight')


@pytest.mark.parametrize(
  ('options', 'wanted'),
  [
    ({'options': options_lib.StockOptions('filter')}, {'axis': 0}),
    ({'options': options_lib.StockOptions('model')}, {'groups': [EVERY]}),
    (
      {'options': options_lib.StockOptions(average='angle')},
      {'average': 'angle'},
    ),
    (
      {'options': options_lib.StockOptions('filter', clip=False)},
      {'clip': False, 'axis': 0},
    ),
    ({'strength': 0.5}, {'strength': 0.5}),
    ({'layers': r'(.*)[.][qkv]_proj[.](weight)'}, {'groups': [GROUP]}),
    ({'threads': 1}, {}),
  ],
)
@pytest.mark.parametrize('small', [False, True])
def test_options(
  family, save, load, tmp_path, monkeypatch, options, wanted, small
):
  if small:  # so that tensors are cut into blocks
    monkeypatch.setattr(blocks, 'BLOCK', 16)
  trees = family(3, agreement=0.3)
  anchor, models = save(trees)
  merged = files.merge(anchor, models, tmp_path / 'out', **options)
  expected, cosines, ratios = oracle(trees, **wanted)
  check(load(tmp_path / 'out'), expected, tolerance=2e-6)
  check(merged.cosine, cosines)
  check(merged.ratio, ratios)


@pytest.mark.parametrize('unit', ['layer', 'filter', 'model'])
@pytest.mark.parametrize('num_models', [2, 3])
def test_files_are_merged_as_trees_are(
  family, save, load, tmp_path, unit, num_models
):
  trees = family(num_models)
  anchor, models = save(trees)
  files.merge(
    anchor, models, tmp_path / 'out', options=options_lib.StockOptions(unit)
  )
  expected = ms.model_stock(
    trees[0],
    trees[1:],
    unit=unit,
    layers=lambda path, leaf: ms.Layer(filter_axis=0),
  )
  check(load(tmp_path / 'out'), dict(expected.params))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float64'])
def test_dtypes(family, save, load, tmp_path, dtype):
  trees = family(dtype=dtype)
  anchor, models = save(trees)
  files.merge(anchor, models, tmp_path / 'out')
  expected, _, _ = oracle(trees)
  step = float(ml_dtypes.finfo(trees[0][QUERY].dtype).eps)
  for name, array in load(tmp_path / 'out').items():
    assert array.dtype == trees[0][name].dtype
    np.testing.assert_allclose(
      array.astype(np.float64),
      expected[name],
      rtol=0.51 * step if dtype != 'float64' else 1e-12,
      atol=1e-6 if dtype != 'float64' else 1e-12,
    )


def test_the_dtype_that_is_asked_for(family, save, load, tmp_path):
  trees = family(dtype='float32')
  trees[1:] = family(dtype='bfloat16')[1:]
  anchor, models = save(trees)
  wanted = r'(?s)--dtype says which .*\n  embed.weight: dtypes differ'
  with pytest.raises(ValueError, match=wanted):
    files.merge(anchor, models, tmp_path / 'out')
  files.merge(anchor, models, tmp_path / 'out', dtype='float16')
  expected, _, _ = oracle(trees)
  actual = load(tmp_path / 'out')
  assert {array.dtype.name for array in actual.values()} == {'float16'}
  check(actual, expected, tolerance=2e-3)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['torch_dtype'] == 'float16'


def test_integers_must_agree(family, save, load, tmp_path):
  trees = family()
  for tree in trees:
    tree['ids'] = np.arange(5)
  anchor, models = save(trees)
  merged = files.merge(anchor, models, tmp_path / 'out')
  assert load(tmp_path / 'out')['ids'].tolist() == [0, 1, 2, 3, 4]
  assert 'ids' not in merged.cosine
  trees[2]['ids'] = np.arange(5) + 1
  (tmp_path / 'more').mkdir()
  other = tmp_path / 'other.safetensors'
  safetensors.numpy.save_file(trees[2], other)
  with pytest.raises(ValueError, match='ids: int64 values differ'):
    files.merge(anchor, [models[0], other], tmp_path / 'bad')
  assert not list(tmp_path.glob('*bad*'))


def test_what_lies_next_to_the_tensors(family, save, tmp_path):
  trees = family()
  anchor, models = save(trees, form='sharded')
  merged = files.merge(anchor, models, tmp_path / 'out')
  names = sorted(path.name for path in (tmp_path / 'out').iterdir())
  assert names == [
    'README.md',
    'config.json',
    'model.safetensors',
    'model_stock.json',
    'tokenizer.json',
  ]
  tokenizer = json.loads((tmp_path / 'out' / 'tokenizer.json').read_text())
  assert tokenizer == {'of': 'a'}  # the anchor's
  with safetensors.safe_open(
    tmp_path / 'out' / 'model.safetensors', framework='numpy'
  ) as file:
    assert file.metadata() == {'format': 'pt'}  # transformers asks for it
  report = json.loads((tmp_path / 'out' / 'model_stock.json').read_text())
  assert report['anchor'] == str(anchor)
  assert report['models'] == [str(model) for model in models]
  assert report['tensors'].keys() == trees[0].keys()
  for name, line in report['tensors'].items():
    assert line == {'cosine': merged.cosine[name], 'ratio': merged.ratio[name]}


def test_next_to_a_file(family, save, tmp_path):
  anchor, models = save(family(), form='file')
  files.merge(anchor, models, tmp_path / 'deep' / 'er' / 'm.safetensors')
  names = sorted(path.name for path in (tmp_path / 'deep' / 'er').iterdir())
  assert names == ['m.model_stock.json', 'm.safetensors']


def test_shards(family, save, load, tmp_path, monkeypatch):
  monkeypatch.setattr(layout, 'SHARD_SIZE', 600)
  trees = family()
  anchor, models = save(trees)
  files.merge(anchor, models, tmp_path / 'out')
  paths = sorted((tmp_path / 'out').glob('*.safetensors'))
  total = len(paths)
  assert total > 2
  assert [path.name for path in paths] == [
    f'model-{i + 1:05d}-of-{total:05d}.safetensors' for i in range(total)
  ]
  index = json.loads(
    (tmp_path / 'out' / 'model.safetensors.index.json').read_text()
  )
  for name, file in index['weight_map'].items():
    with safetensors.safe_open(
      tmp_path / 'out' / file, framework='numpy'
    ) as opened:
      assert name in opened.keys()  # noqa: SIM118
  assert index['metadata']['total_size'] == sum(
    array.nbytes for array in trees[0].values()
  )
  check(load(tmp_path / 'out'), oracle(trees)[0])
  # and what was written is read again
  again = files.merge(tmp_path / 'out', models, tmp_path / 'again')
  assert len(again.cosine) == len(trees[0])


def test_the_common_part(family, save, load, tmp_path):
  trees = family()
  trees[1]['embed.weight'] = np.concatenate([trees[1]['embed.weight']] * 2)
  del trees[2]['norm.weight']
  anchor, models = save(trees)
  with pytest.raises(ValueError, match='do not fit the anchor') as caught:
    files.merge(anchor, models, tmp_path / 'out')
  text = str(caught.value)
  assert f'norm.weight: not in {models[1]}' in text
  assert (
    f'embed.weight: rows differ: {anchor} float32[40, 8], '
    f'{models[0]} float32[80, 8]'
  ) in text
  assert '--common merges what all of them have' in text

  merged = files.merge(anchor, models, tmp_path / 'out', common=True)
  assert merged.left_out == ['norm.weight']
  del trees[0]['norm.weight'], trees[1]['norm.weight']
  trees[1]['embed.weight'] = trees[1]['embed.weight'][:40]
  check(load(tmp_path / 'out'), oracle(trees)[0])
  report = json.loads((tmp_path / 'out' / 'model_stock.json').read_text())
  assert report['left_out'] == ['norm.weight']
  assert report['cut'] == merged.cut == {'embed.weight': 40}


def test_the_config_tells_of_fewer_rows(family, save, load, tmp_path):
  trees = family()
  for tree in trees[1:]:
    tree['embed.weight'] = tree['embed.weight'][:30]
  anchor, models = save(trees)
  files.merge(anchor, models, tmp_path / 'out', common=True)
  assert load(tmp_path / 'out')['embed.weight'].shape == (30, 8)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['vocab_size'] == 30


def test_the_config_is_of_the_rows_that_are_left(family, save, tmp_path):
  """Take a model's config, as the anchor is one file; of positions too."""
  trees = family()
  trees[0]['positions'] = np.ones((9, 4), np.float32)
  trees[1]['positions'] = np.full((12, 4), 2, np.float32)
  trees[2]['positions'] = np.full((9, 4), 3, np.float32)
  anchor, models = save(trees)
  config = {'text_config': {'max_position_embeddings': 12}, 'vocab_size': 40}
  (models[0] / 'config.json').write_text(json.dumps(config))
  files.merge(
    anchor / 'model.safetensors', models, tmp_path / 'out', common=True
  )
  actual = json.loads((tmp_path / 'out' / 'config.json').read_text())
  config['text_config']['max_position_embeddings'] = 9
  assert actual == config


def test_a_config_that_is_no_json(family, save, tmp_path, monkeypatch):
  """Is told before anything is merged."""
  anchor, models = save(family())
  (anchor / 'config.json').write_text('{"vocab_size": 40,}')
  with pytest.raises(ValueError, match=r'config\.json is not JSON'):
    files.merge(anchor, models, tmp_path / 'out', dtype='bfloat16')
  assert not list(tmp_path.glob('*out*'))


def test_what_float16_does_not_hold(family, save, tmp_path):
  trees = family()
  for tree in trees:
    tree['norm.weight'] = tree['norm.weight'] * 0 + np.float32(7e4)
  anchor, models = save(trees)
  with pytest.raises(ValueError, match=r'norm\.weight: .* Give --dtype bfloat'):
    files.merge(anchor, models, tmp_path / 'out', dtype='float16')
  assert not list(tmp_path.glob('*out*'))


def test_limits(save, load, tmp_path):
  """As `ms.model_stock` documents them."""
  rng = np.random.default_rng(0)
  center, step = rng.normal(size=(2, 50)).astype(np.float32)
  names = ('unmoved', 'same', 'opposite', 'one', 'moved')
  anchor = dict.fromkeys(names, center)
  one = {
    'unmoved': center,
    'same': center + step,
    'opposite': center + step,
    'one': center + step,
    'moved': center + step,
  }
  two = one | {'opposite': center - step, 'one': center}
  paths = save([anchor, one, two])
  unclipped = options_lib.StockOptions(clip=False)
  merged = files.merge(*paths, tmp_path / 'out', options=unclipped)
  actual = load(tmp_path / 'out')
  for name in ('unmoved', 'one'):
    np.testing.assert_array_equal(actual[name], center)
    assert merged.ratio[name] == 0
  np.testing.assert_allclose(actual['opposite'], center, atol=1e-6)
  np.testing.assert_array_equal(actual['same'], one['same'])
  assert merged.ratio['same'] == 1


def test_what_is_written_is_rounded_once(save, load, tmp_path):
  """Merge three million elements: each is the float64 result to half an ulp."""
  rng = np.random.default_rng(0)
  anchor = rng.normal(size=3_000_000).astype(np.float32)
  shared = rng.normal(size=anchor.shape)
  trees = [{'w': anchor}] + [
    {'w': (anchor + shared + rng.normal(size=shared.shape)).astype(np.float32)}
    for _ in range(2)
  ]
  merged = files.merge(*save(trees), tmp_path / 'out')
  expected, cosines, _ = oracle(trees)
  assert abs(merged.cosine['w'] - cosines['w']) < 1e-14
  actual = load(tmp_path / 'out')['w']
  apart = np.abs(actual - expected['w'])
  # and by 1e-14 for the order of sums
  assert np.all(apart <= np.spacing(np.abs(actual)) / 2 + 1e-14)


def test_progress(family, save, tmp_path):
  trees = family()
  said = []
  files.merge(
    *save(trees), tmp_path / 'out', progress=lambda *n: said.append(n)
  )
  total = sum(array.nbytes for array in trees[0].values())
  assert [done for done, _ in said] == sorted(done for done, _ in said)
  assert said[-1] == (total, total)
  assert {most for _, most in said} == {total}


@pytest.mark.skipif(not hasattr(os, 'posix_fadvise'), reason='not on a Mac')
def test_checkpoints_larger_than_the_cache_leave_it(
  family, save, tmp_path, monkeypatch
):
  trees = family()
  paths = save(trees, form='file')
  forgotten = collections.Counter()

  def advise(fd, offset, length, advice):
    assert advice == os.POSIX_FADV_DONTNEED
    forgotten[os.fstat(fd).st_ino, length] += 1

  monkeypatch.setattr(os, 'posix_fadvise', advise)
  files.merge(*paths, tmp_path / 'small.safetensors')
  assert not forgotten
  monkeypatch.setattr(os, 'sysconf', lambda name: 1)
  files.merge(*paths, tmp_path / 'large.safetensors')
  assert forgotten == collections.Counter(
    (path.stat().st_ino, array.nbytes)
    for path, tree in zip((paths[0], *paths[1]), trees, strict=True)
    for array in tree.values()
  )


def test_names_are_listed_up_to_a_number(family, save, tmp_path):
  trees = family(shapes={f'w{i:03d}': (9,) for i in range(100)})
  trees[2] = {'w000': trees[2]['w000']}
  anchor, models = save(trees)
  with pytest.raises(ValueError, match='and 79 more') as caught:
    files.merge(anchor, models, tmp_path / 'out')
  assert len(str(caught.value)) < 5000
