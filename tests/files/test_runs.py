"""Runs of this library, written by the code that writes them in a run."""

import json
import shutil
import subprocess
import sys

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import files
from modelstock_jax import merging
from modelstock_jax.formats import runs
from modelstock_jax.merging import options as options_lib
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import loop
from modelstock_jax.training import state as state_lib

TOWER = {
  'embed_dim': 6,
  'image': {
    'image_size': 4,
    'patch_size': 2,
    'width': 8,
    'depth': 2,
    'heads': 2,
    'channels': 1,
  },
}


def _params(seed):
  """Return params of a tower with a head: float32, none of them zero."""
  rng = np.random.default_rng(seed)
  config = clip.CLIPConfig(6, clip.VisionConfig(**TOWER['image']), None)
  like = jax.eval_shape(clip.classifier(config, 3).init, jax.random.key(0))
  shared = np.random.default_rng(0)

  def draw(leaf):
    common = shared.normal(size=leaf.shape)
    individual = 0.1 * seed * rng.normal(size=leaf.shape)
    return jnp.asarray(common + individual, jnp.float32)

  return jax.tree.map(draw, like)


def _flat(tree):
  return {
    merging.path_name(path): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  tmp_path = tmp_path_factory.mktemp('runs')
  paths = []
  for seed in range(3):
    workdir = tmp_path / f'run_{seed}'
    workdir.mkdir()
    (workdir / 'config.json').write_text(json.dumps({'model': TOWER}))
    with checkpoints_lib.Checkpoints(workdir / 'checkpoints') as checkpoints:
      params = _params(seed)
      ones = jax.tree.map(lambda _: jnp.ones(()), params)
      state = state_lib.State(
        jnp.int32(7), params, {}, {}, jax.random.split(jax.random.key(0), 2)
      )
      merged = merging.Merged(params, ones, ones)
      checkpoints.save(7, checkpoints_lib.Checkpoint(state, merged, None))
      checkpoints.wait()
    paths.append(workdir)
  return paths


def test_runs_are_merged(workdirs, tmp_path):
  out = tmp_path / 'merged.safetensors'
  merged = files.merge(workdirs[0], workdirs[1:], out)
  models = [_params(1), _params(2)]
  expected = merging.model_stock(_params(0), models, layers=clip.clip_layers)
  actual = clip.load_pretrained(out).params
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    actual,
    expected.params,
  )
  for name, cosine in _flat(expected.cosine).items():
    np.testing.assert_allclose(merged.cosine[name], cosine, atol=1e-6)


def test_filters_of_flax_are_the_last_axis(workdirs, tmp_path):
  out = tmp_path / 'merged.safetensors'
  files.merge(
    workdirs[0], workdirs[1:], out, options=options_lib.StockOptions('filter')
  )
  expected = merging.model_stock(
    _params(0), [_params(1), _params(2)], unit='filter'
  )
  actual = clip.load_safetensors(out, like=_params(0))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6),
    actual,
    expected.params,
  )


def test_one_leaf_is_read_at_a_time(workdirs):
  step = runs.find(workdirs[1])
  tensors = runs.tensors(step)
  expected = _flat(_params(1))
  assert tensors.keys() == expected.keys()
  for name, tensor in tensors.items():
    array = tensor.load()
    assert isinstance(array, np.ndarray)
    assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    np.testing.assert_array_equal(array, expected[name])


def test_a_damaged_run(workdirs, tmp_path):
  damaged = shutil.copytree(workdirs[2], tmp_path / 'damaged')
  for path in (damaged / 'checkpoints/7/merged').rglob('*'):
    if path.is_file() and path.stat().st_size > 50:
      path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(ValueError, match=r'checkpoints/7/merged/\S+ is damaged'):
    files.merge(workdirs[0], [workdirs[1], damaged], tmp_path / 'm.safetensors')


@pytest.mark.parametrize('hashed', [True, False])
def test_arrays_that_are_gone_take_one_error(workdirs, tmp_path, hashed):
  """What Orbax and TensorStore print about it, from threads too, is not."""
  damaged = shutil.copytree(workdirs[2], tmp_path / 'damaged')
  step = damaged / 'checkpoints/7'
  for folder in [*step.rglob('d')]:
    shutil.rmtree(folder)
  if not hashed:  # as of a run that was killed
    (step / 'sha256.process_0.txt').unlink()
  command = [sys.executable, '-c', READ, str(step)]
  ended = subprocess.run(command, capture_output=True, text=True, check=True)
  assert 'merged' in ended.stdout or 'cannot be read' in ended.stdout
  lines = ended.stderr.splitlines()
  assert [line for line in lines if 'not verified' not in line] == []


READ = """
import pathlib, sys
from modelstock_jax.formats import runs
try:
  runs.read(pathlib.Path(sys.argv[1]))
except ValueError as error:
  print(error)
"""


def test_runs_become_one_file(workdirs, tmp_path):
  with pytest.raises(ValueError, match=r'Let --output end with \.safetensors'):
    files.merge(workdirs[0], workdirs[1:], tmp_path / 'out')


@pytest.mark.parametrize('unit', ['layer', 'filter'])
def test_an_anchor_in_a_file(workdirs, tmp_path, unit):
  """As grids keep their members: the same names, and Flax's axes."""
  options = options_lib.StockOptions(unit)
  anchor = tmp_path / 'anchor.safetensors'
  clip.save_safetensors(_params(0), anchor)
  one, two = (tmp_path / f'{name}.safetensors' for name in 'ab')
  files.merge(anchor, workdirs[1:], one, options=options)
  files.merge(workdirs[0], workdirs[1:], two, options=options)
  left, right = (clip.load_safetensors(p, like=_params(0)) for p in (one, two))
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope='module')
def trained(setup, tiny_config, tmp_path_factory):
  """Two models of a run as runs of one model, and the merge of the trainer."""
  folder = tmp_path_factory.mktemp('trained')
  config = tiny_config({'merge.every': 'end'})
  result = loop.train(config, folder / 'both', setup=setup)
  record = {**config.to_dict(), 'inputs': setup.inputs}
  ones = jax.tree.map(lambda _: jnp.ones(()), setup.anchor)
  for name, params in zip('ab', merging.unstack(result.models), strict=True):
    workdir = folder / name
    workdir.mkdir()
    shutil.copy(folder / 'both/config.json', workdir)
    with checkpoints_lib.Checkpoints(
      workdir / 'checkpoints', config=record
    ) as checkpoints:
      state = state_lib.State(jnp.int32(12), params, {}, {}, jax.random.key(0))
      merged = merging.Merged(params, ones, ones)
      checkpoints.save(12, checkpoints_lib.Checkpoint(state, merged, None))
  return [folder / 'a', folder / 'b'], result.merged


def test_runs_merge_as_in_training(trained, weights, tmp_path):
  """The anchor is the weights, without a head, which the runs record."""
  workdirs, expected = trained
  out = tmp_path / 'merged.safetensors'
  merged = files.merge(
    weights, workdirs, out, anchor_of_runs=anchor_lib.of_runs
  )
  cosines = _flat(expected.cosine)
  assert merged.cosine.keys() == cosines.keys() >= {'head/kernel'}
  for name, cosine in cosines.items():
    np.testing.assert_allclose(merged.cosine[name], cosine, atol=1e-5)
  actual = _flat(clip.load_pretrained(out).params)
  for name, leaf in _flat(expected.params).items():
    limit = 1e-6 * np.abs(leaf).max()
    np.testing.assert_allclose(actual[name], leaf, rtol=0, atol=limit)


def test_the_anchor_of_other_runs(trained, weights, tmp_path):
  other = tmp_path / 'other.safetensors'
  like = clip.load_pretrained(weights)
  clip.save_safetensors(
    jax.tree.map(lambda x: x + 1, like.params),
    other,
    clip.read_metadata(weights),
  )
  with pytest.raises(ValueError, match=r'did not start from \S+other'):
    files.merge(
      other,
      trained[0],
      tmp_path / 'merged.safetensors',
      anchor_of_runs=anchor_lib.of_runs,
    )
