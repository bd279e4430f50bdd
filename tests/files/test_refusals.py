"""Checkpoints and options that a merge refuses, and why."""

import json
import os
import shutil
import struct
import sys

from flax import serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import files
from modelstock_jax.formats import detect
from modelstock_jax.merging import options as options_lib


@pytest.fixture
def merge(tmp_path):
  """Merges into a place of no interest."""

  def run(anchor, models, **options):
    return files.merge(anchor, models, tmp_path / 'out', **options)

  yield run
  assert not list(tmp_path.glob('.out*'))


def test_too_few_models(family, save, merge):
  anchor, models = save(family())
  for given in ([], models[:1], str(models[0])):
    with pytest.raises(ValueError, match='the anchor and at least two models'):
      merge(anchor, given)


def test_all_wrong_options_at_once(family, save, merge):
  anchor, models = save(family())
  with pytest.raises(ValueError, match=r"dtype must be .*'int8'") as caught:
    merge(
      anchor,
      models,
      options=options_lib.StockOptions('filter'),
      dtype='int8',
      strength=float('nan'),
      threads=0,
      layers='(',
    )
  text = str(caught.value)
  for word in ('dtype', 'strength', 'threads'):
    assert f'{word} must be' in text
  assert "layers is for unit 'layer'" in text
  assert 'is no regular expression' in text


def test_layers_that_match_nothing(family, save, merge):
  anchor, models = save(family())
  with pytest.raises(ValueError, match="'q_proj' matches none of its arr"):
    merge(anchor, models, layers='q_proj')


def test_the_anchor_among_the_models(family, save, merge, tmp_path):
  trees = family()
  anchor, models = save(trees)
  with pytest.raises(ValueError, match='is the anchor'):
    merge(anchor, [models[0], anchor])
  with pytest.raises(ValueError, match='is given twice'):
    merge(anchor, [models[0], models[0]])
  link = tmp_path / 'link'
  link.symlink_to(anchor)
  with pytest.raises(ValueError, match='is the anchor'):
    merge(anchor, [models[0], link])
  copy = tmp_path / 'copy.safetensors'
  safetensors.numpy.save_file(trees[0], copy)
  with pytest.raises(ValueError, match=r'copy\.safetensors is equal to the an'):
    merge(anchor, [models[0], copy])


def test_shapes_that_differ(family, save, merge):
  trees = family()
  trees[1]['norm.weight'] = trees[1]['norm.weight'].reshape(8, 8)
  anchor, models = save(trees)
  for common in (False, True):
    with pytest.raises(ValueError, match=r'norm\.weight: shapes differ: .*64'):
      merge(anchor, models, common=common)


def test_quantised_weights(family, save, merge):
  trees = [
    {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in t.items()}
    for t in family()
  ]
  anchor, models = save(trees)
  with pytest.raises(ValueError, match='Quantised weights: take the checkp'):
    merge(anchor, models)


@pytest.mark.parametrize('which', [0, 1, 2])
@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('unit', ['layer', 'filter', 'model'])
def test_values_that_are_not_finite(family, save, merge, which, value, unit):
  trees = family()
  trees[which]['embed.weight'][3, :2] = value
  anchor, models = save(trees)
  path = (anchor, *models)[which]
  wanted = rf'embed\.weight: values that are not finite: 2 in {path}\. Take'
  with pytest.raises(ValueError, match=wanted):
    merge(anchor, models, options=options_lib.StockOptions(unit))


def test_nothing_there(family, save, merge, tmp_path):
  anchor, models = save(family())
  with pytest.raises(FileNotFoundError, match='nowhere: there is no such file'):
    merge(anchor, [*models, tmp_path / 'nowhere'])
  with pytest.raises(FileNotFoundError, match=r'`hf download meta/llama --loc'):
    merge('meta/llama', models)


@pytest.mark.parametrize('size', [0, 5, 8, 20, -1, +1])
def test_a_file_that_is_not_complete(family, save, merge, size):
  anchor, models = save(family(), form='file')
  data = models[1].read_bytes()
  models[1].write_bytes(data[:size] if size < 1 or size > 1 else data + b'x')
  with pytest.raises(ValueError, match='is not a whole safetensors file'):
    merge(anchor, models)


@pytest.mark.parametrize(
  'entry',
  [
    {'dtype': 'F99', 'shape': [1], 'data_offsets': [0, 4]},
    {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]},
    {'dtype': 'F32', 'shape': [-1], 'data_offsets': [4, 0]},
    {'dtype': 'F32', 'shape': [1], 'data_offsets': [-4, 0]},
    {'dtype': 'F32', 'shape': [1]},
    'F32',
  ],
)
def test_a_header_that_lies(family, save, merge, entry):
  anchor, models = save(family(), form='file')
  text = json.dumps({'w': entry}).encode()
  models[0].write_bytes(struct.pack('<Q', len(text)) + text + bytes(4))
  with pytest.raises(ValueError, match='is not a whole safetensors file'):
    merge(anchor, models)


@pytest.mark.parametrize(
  'name', ['../b/model.safetensors', '/etc/passwd', 'sub/x.safetensors']
)
def test_an_index_that_leads_away(family, save, merge, name):
  anchor, models = save(family(), form='sharded')
  index = models[0] / 'model.safetensors.index.json'
  actual = json.loads(index.read_text())
  actual['weight_map']['embed.weight'] = name
  index.write_text(json.dumps(actual))
  with pytest.raises(ValueError, match='names files outside its own folder'):
    merge(anchor, models)


def test_a_shard_that_is_a_link(family, save, merge, tmp_path):
  anchor, models = save(family(), form='sharded')
  shard = models[0] / 'model-00001-of-00003.safetensors'
  shard.rename(tmp_path / 'elsewhere')
  shard.symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(ValueError, match=r'is a link to .*outside its folder'):
    merge(anchor, models)


def test_the_cache_of_the_hub_is_links(family, save, load, merge, tmp_path):
  anchor, models = save(family(), form='sharded')
  home = tmp_path / 'models--a--b'
  snapshot = home / 'snapshots' / '0123abc'
  snapshot.mkdir(parents=True)
  (home / 'blobs').mkdir()
  for number, file in enumerate(sorted(models[0].iterdir())):
    blob = home / 'blobs' / str(number)
    os.replace(file, blob)
    (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
  merged = merge(anchor, [snapshot, models[1]])
  assert len(merged.cosine) == 6


def test_an_index_without_its_files(family, save, merge):
  anchor, models = save(family(), form='sharded')
  shard = models[0] / 'model-00002-of-00003.safetensors'
  kept = shard.read_bytes()
  shard.unlink()
  with pytest.raises(FileNotFoundError, match='names model-00002-of-00003'):
    merge(anchor, models)
  shard.write_bytes(kept)
  index = models[0] / 'model.safetensors.index.json'
  actual = json.loads(index.read_text())
  actual['weight_map']['more'] = shard.name
  index.write_text(json.dumps(actual))
  with pytest.raises(ValueError, match=r"do not hold: \['more'\]"):
    merge(anchor, models)
  index.write_text('{')
  with pytest.raises(ValueError, match='is not an index of weights'):
    merge(anchor, models)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('pytorch_model.bin', ': its content is made by os.system, which is not'),
    ('x.pt', ': its content is made by os.system, which is not called'),
    ('x.npy', ' is a pickle'),
  ],
)
def test_pickles_are_not_run(family, save, merge, tmp_path, name, message):
  anchor, models = save(family())
  folder = tmp_path / 'pickled'
  folder.mkdir()
  action = f'cos\nsystem\n(S"touch {tmp_path}/acted"\ntR.'
  (folder / name).write_bytes(action.encode())
  for path in (folder, folder / name):
    with pytest.raises(ValueError, match=f'{name}{message}'):
      merge(anchor, [models[0], path])
  assert not (tmp_path / 'acted').exists()


def test_a_merge_is_not_written_as_a_torch_file(family, save, tmp_path):
  anchor, models = save(family())
  with pytest.raises(ValueError, match=r'merged\.pt: .*end with \.safetensors'):
    files.merge(anchor, models, tmp_path / 'merged.pt')


def test_several_torch_files_in_a_folder(family, save, merge, tmp_path):
  anchor, models = save(family())
  folder = tmp_path / 'folder'
  folder.mkdir()
  for name in ('epoch_1.pt', 'epoch_2.pt'):
    (folder / name).write_bytes(b'')
  with pytest.raises(ValueError, match='several sets of weights'):
    merge(anchor, [models[0], folder])


def test_folders_of_something_else(family, save, merge, tmp_path):
  anchor, models = save(family())
  folder = tmp_path / 'folder'
  folder.mkdir()
  with pytest.raises(ValueError, match='folder holds no weights'):
    merge(anchor, [models[0], folder])
  (folder / 'adapter_config.json').write_text('{}')
  with pytest.raises(FileNotFoundError, match=r'model\.bin: there is no'):
    merge(anchor, [models[0], folder])
  (folder / 'adapter_config.json').unlink()
  for name in ('one', 'two'):
    path = folder / f'{name}.safetensors'
    safetensors.numpy.save_file({'w': np.zeros(1)}, path)
  with pytest.raises(ValueError, match='several sets of weights'):
    merge(anchor, [models[0], folder])
  (tmp_path / 'x.gguf').write_bytes(b'GGUF')
  with pytest.raises(ValueError, match='is of no known format'):
    merge(anchor, [models[0], tmp_path / 'x.gguf'])


def test_a_complete_file_comes_before_an_index(family, save, merge, tmp_path):
  """As transformers has it: what is left of a save before is not read."""
  anchor, models = save(family())
  index = models[0] / 'model.safetensors.index.json'
  gone = {'weight_map': {'norm.weight': 'model-00001-of-00003.safetensors'}}
  index.write_text(json.dumps(gone))
  merge(anchor, models)


def test_what_is_no_run_needs_nothing_of_runs(
  family, save, merge, tmp_path, monkeypatch
):
  anchor, models = save(family())
  monkeypatch.setitem(sys.modules, 'orbax.checkpoint', None)
  folder = tmp_path / 'folder'
  folder.mkdir()
  with pytest.raises(ValueError, match='folder holds no weights'):
    merge(anchor, [models[0], folder])
  (folder / 'x.npy').write_bytes(b'')
  with pytest.raises(ValueError, match='is a pickle'):
    merge(anchor, [models[0], folder])


def test_kinds_do_not_mix(family, save, merge, tmp_path):
  anchor, models = save(family())
  path = tmp_path / 'checkpoint_7'
  path.write_bytes(serialization.msgpack_serialize({'params': {'w': _ramp()}}))
  with pytest.raises(
    ValueError, match=r"of kind 'folder', .* of kind 'scenic'"
  ):
    merge(anchor, [path, models[1]])


def _ramp(*shape):
  return np.arange(np.prod(shape or (3,)), dtype=np.float32).reshape(
    shape or (3,)
  )


# Flax's files.


def _state(seed, *, step):
  """As Scenic's TrainState becomes a dict."""
  rng = np.random.default_rng(0)
  mine = np.random.default_rng(seed)

  def draw(*shape, dtype=np.float32):
    shared = rng.normal(size=shape)
    return (shared + 0.1 * seed * mine.normal(size=shape)).astype(dtype)

  return {
    'params': {
      'resblocks.0': {'kernel': draw(5, 7), 'bias': draw(7)},
      'head': {'kernel': draw(7, 3, dtype=ml_dtypes.bfloat16)},
    },
    'model_state': {'batch_stats': {'mean': draw(4)}},
    'opt_state': {'0': {'mu': draw(5, 7)}, 'count': np.int32(step)},
    'global_step': step,
    'rng': np.array([0, 2**32 - 1], np.uint32),
    'metadata': {'lr': 1e-3, 'none': None, 'flag': True, 'text': 'x' * 300},
    'many': {str(i): -i for i in range(20)},
    'list': [1, -70_000, 2**40, 2.5],
  }


def _scenic(tmp_path):
  paths = []
  for seed, name in enumerate('abc'):
    folder = tmp_path / name
    folder.mkdir()
    path = folder / f'checkpoint_{10 + seed}'
    data = serialization.msgpack_serialize(_state(seed, step=10 + seed))
    path.write_bytes(data)
    paths.append(path)
  return paths


@pytest.mark.parametrize('unit', ['layer', 'filter'])
def test_checkpoints_of_scenic(tmp_path, merge, unit):
  paths = _scenic(tmp_path)
  # a file, and workdirs
  models = [paths[1].parent, paths[2].parent]
  merge(paths[0], models, options=options_lib.StockOptions(unit))
  out = tmp_path / 'out' / 'checkpoint_11'
  actual = serialization.msgpack_restore(out.read_bytes())
  states = [_state(seed, step=10 + seed) for seed in range(3)]
  for keys in (('resblocks.0', 'kernel'), ('resblocks.0', 'bias')):
    center, *models = [
      np.float64(state['params'][keys[0]][keys[1]]) for state in states
    ]
    one, two = (model - center for model in models)
    # In Flax's layout filters are the last axis.
    axis = 0 if unit == 'filter' and center.ndim == 2 else None
    dot, left, right = (
      np.sum(x, axis=axis) for x in (one * two, one**2, two**2)
    )
    cosine = np.clip(dot / np.sqrt(left * right), 0, 1)
    expected = center + 2 * cosine / (1 + cosine) * (one + two) / 2
    np.testing.assert_allclose(
      actual['params'][keys[0]][keys[1]], expected, atol=1e-6
    )
  head = actual['params']['head']['kernel']
  assert head.dtype == ml_dtypes.bfloat16
  # Statistics are averaged, and all else is the first model's.
  means = [state['model_state']['batch_stats']['mean'] for state in states]
  np.testing.assert_allclose(
    actual['model_state']['batch_stats']['mean'],
    np.mean(means[1:], axis=0),
    atol=1e-6,
  )
  for key in states[1].keys() - {'params', 'model_state'}:
    left = serialization.msgpack_serialize({'': actual[key]})
    assert left == serialization.msgpack_serialize({'': states[1][key]})
  report = json.loads((tmp_path / 'out' / 'model_stock.json').read_text())
  assert 'params/head/kernel' in report['tensors']


@pytest.mark.parametrize('inner', ['params', None])
def test_older_checkpoints_of_scenic(tmp_path, merge, inner):
  """The parameters lie in the optimizer, and have the same merged bytes."""
  paths = _scenic(tmp_path)
  merge(paths[0], paths[1:])
  out = tmp_path / 'out' / 'checkpoint_11'
  wanted = serialization.msgpack_restore(out.read_bytes())
  shutil.rmtree(out.parent)
  for path in paths:
    state = serialization.msgpack_restore(path.read_bytes())
    params = state.pop('params')
    target = {inner: params} if inner else params
    state['optimizer'] = {'target': target, 'state': {'step': 3}}
    path.write_bytes(serialization.msgpack_serialize(state))
  merge(paths[0], paths[1:])
  actual = serialization.msgpack_restore(out.read_bytes())
  target = actual['optimizer']['target']
  for part, tree in (
    ('params', target[inner] if inner else target),
    ('model_state', actual['model_state']),
  ):
    expected = serialization.msgpack_serialize(wanted[part])
    assert serialization.msgpack_serialize(tree) == expected


def test_the_last_of_several_checkpoints(tmp_path):
  path = _scenic(tmp_path)[0]
  for step in (2, 9, 100):
    (path.parent / f'checkpoint_{step}').write_bytes(path.read_bytes())
  assert detect.read(path.parent).path.name == 'checkpoint_100'


def test_scenic_does_not_take_all_options(tmp_path, merge):
  anchor, *models = _scenic(tmp_path)
  with pytest.raises(ValueError, match='dtype and common are not for'):
    merge(anchor, models, dtype='float32')
  with pytest.raises(ValueError, match='Let --output name a folder'):
    files.merge(anchor, models, tmp_path / 'out.safetensors')


def test_a_checkpoint_of_flax_that_is_not_scenics(tmp_path, merge):
  for name in 'abc':
    (tmp_path / name).mkdir()
    data = serialization.msgpack_serialize({'target': {'w': _ramp()}})
    (tmp_path / name / 'checkpoint_3').write_bytes(data)
  with pytest.raises(ValueError, match=r"has no params. It holds \['target'\]"):
    merge(tmp_path / 'a', [tmp_path / 'b', tmp_path / 'c'])
