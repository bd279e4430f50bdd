"""Merged checkpoints of Orbax: as of trees, and restored by their owners."""

import json
import os
import pathlib
import re
import shutil
import warnings

from flax import serialization
import jax
from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
import pytest
import safetensors.numpy

import modelstock_jax as ms
from modelstock_jax import files
from modelstock_jax.cli import main

SHAPES = {'kernel': (4, 8), 'scale': (8,), 'blocks': (2, 4, 4)}


def _tree(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  leaves = {
    name: jnp.asarray(rng.normal(size=shape), dtype)
    for name, shape in SHAPES.items()
  }
  return {'params': {'dense': leaves}, 'step': jnp.array(seed)}


def _standard(folder, tree):
  with ocp.StandardCheckpointer() as writer:
    writer.save(folder, tree)


def _pytree(folder, tree, **options):
  ocp.PyTreeCheckpointer(**options).save(folder, tree)


def _zarr3(folder, tree):
  _pytree(folder, tree, use_ocdbt=True, use_zarr3=True)


def _manager(folder, tree):
  with ocp.CheckpointManager(folder) as manager:
    manager.save(7, args=ocp.args.StandardSave(tree))


def _restore_standard(folder, like):
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(folder, like)


def _restore_pytree(folder, like):
  args = ocp.checkpoint_utils.construct_restore_args(like)
  with ocp.PyTreeCheckpointer() as reader:
    return reader.restore(folder, item=like, restore_args=args)


def _restore_manager(folder, like):
  with ocp.CheckpointManager(folder) as manager:
    step = manager.latest_step()
    return manager.restore(step, args=ocp.args.StandardRestore(like))


def _load_pytree(folder, like):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # `load` is its new name
    return v1.load_pytree(folder, like)


FORMS = {
  'standard': (_standard, _restore_standard),
  'pytree': (_pytree, _restore_pytree),
  'zarr3': (_zarr3, _restore_pytree),
  'manager': (_manager, _restore_manager),
  'v1': (v1.save, v1.load),
  'v1 load_pytree': (v1.save, _load_pytree),
}


def _oracle(center, one, two):
  """Equation 3 of two models in float64."""
  center, one, two = (np.asarray(x, np.float64) for x in (center, one, two))
  left, right = one - center, two - center
  norms = np.linalg.norm(left) * np.linalg.norm(right)
  cosine = np.clip(np.sum(left * right) / norms, 0, 1)
  return center + 2 * cosine / (1 + cosine) * (left + right) / 2


def _write_and_merge(form, folder):
  """Merge checkpoints of a form; give the trees, and where the merge is."""
  trees = [_tree(seed) for seed in range(3)]
  paths = [folder / str(seed) for seed in range(3)]
  for path, tree in zip(paths, trees, strict=True):
    FORMS[form][0](path, tree)
  anchor, *models = map(str, paths)
  out = folder / 'out'
  arguments = ['--anchor', anchor, '--models', *models, '--output', str(out)]
  assert main.main(['merge', *arguments]) == 0
  return trees, out


@pytest.mark.parametrize('form', FORMS)
def test_the_merge_is_restored_by_its_owner(form, tmp_path, caplog):
  with caplog.at_level('INFO'):
    trees, out = _write_and_merge(form, tmp_path)
  assert "its sub-tree params, of ['params', 'step']" in caplog.text

  expected = ms.model_stock(
    trees[0]['params'], [tree['params'] for tree in trees[1:]]
  ).params
  mesh = jax.make_mesh((4,), ('data',), devices=jax.devices()[:4])
  sharding = jax.NamedSharding(mesh, jax.P(None, 'data'))
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=sharding if x.ndim == 2 else jax.NamedSharding(mesh, jax.P()),
    ),
    {'params': expected},
  )
  restored = FORMS[form][1](out, like)
  assert restored['params']['dense']['kernel'].sharding == sharding
  for name, value in expected['dense'].items():
    right = _oracle(*(tree['params']['dense'][name] for tree in trees))
    for actual in (restored['params']['dense'][name], value):
      atol = 1e-6 * np.abs(right).max()
      np.testing.assert_allclose(actual, right, rtol=0, atol=atol)


@pytest.mark.hosts
def test_two_processes_restore_the_merge(tmp_path, run_processes):
  """Each has half of every kernel, equal to the merge of the same arrays."""
  for form in ('standard', 'manager', 'v1'):
    trees, out = _write_and_merge(form, tmp_path / form)
    leaves = [tree['params']['dense'] for tree in trees]
    expected = {name: _oracle(*(x[name] for x in leaves)) for name in SHAPES}
    np.savez(tmp_path / f'{form}.npz', **expected)
    assert out.is_dir()
  script = pathlib.Path(__file__).with_name('restore_process.py')
  for printed in run_processes(script, 2, tmp_path, devices=2):
    restored = re.findall(r'^restored (\w+)$', printed, re.MULTILINE)
    assert restored == ['standard', 'manager', 'v1']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_each_format_has_the_same_merged_bytes(tmp_path, save_torch, dtype):
  merged = {}
  for form in ('orbax', 'zarr3', 'safetensors', 'pt', 'npz', 'msgpack'):
    paths = [tmp_path / f'{seed}.{form}' for seed in range(3)]
    for seed, path in enumerate(paths):
      tree = _tree(seed, dtype)['params']
      flat = {f'dense/{n}': np.asarray(x) for n, x in tree['dense'].items()}
      match form:
        case 'orbax':
          _standard(path, tree)
        case 'zarr3':
          _zarr3(path, tree)
        case 'safetensors':
          safetensors.numpy.save_file(flat, path)
        case 'pt':
          save_torch(path, flat)
        case 'npz':
          np.savez(path, **flat)
        case 'msgpack':
          path.write_bytes(serialization.to_bytes(tree))
    anchor, *models = map(str, paths)
    out = str(tmp_path / f'{form}.safetensors')
    arguments = ['--anchor', anchor, '--models', *models, '--output', out]
    assert main.main(['merge', *arguments]) == 0
    tensors = safetensors.numpy.load_file(out)
    merged[form] = {name: x.tobytes() for name, x in tensors.items()}
  first, *others = merged.values()
  assert first.keys() == {f'dense/{name}' for name in SHAPES}
  assert others == [first] * 5


def test_other_dtypes_and_selected_arrays(tmp_path):
  paths = [tmp_path / str(seed) for seed in range(3)]
  for seed, path in enumerate(paths):
    _manager(path, _tree(seed))
  out = tmp_path / 'out'
  anchor, *models = map(str, paths)
  arguments = ['--anchor', anchor, '--models', *models, '--output', str(out)]
  flags = ['--dtype=bfloat16', '--select=params/dense/(kernel|scale)']
  assert main.main(['merge', *arguments, *flags]) == 0
  with ocp.CheckpointManager(out) as manager:
    restored = manager.restore(7, args=ocp.args.StandardRestore())
  assert jax.tree.map(lambda x: (x.shape, x.dtype.name), restored) == {
    'params': {
      'dense': {'kernel': ((4, 8), 'bfloat16'), 'scale': ((8,), 'bfloat16')}
    }
  }


def test_selected_tensors_of_files(tmp_path):
  paths = [str(tmp_path / f'{seed}.safetensors') for seed in range(3)]
  for seed, path in enumerate(paths):
    leaves = _tree(seed)['params']['dense']
    flat = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    safetensors.numpy.save_file(flat, path)
  anchor, *models = paths
  out = str(tmp_path / 'out.safetensors')
  arguments = ['--anchor', anchor, '--models', *models, '--output', out]
  assert main.main(['merge', *arguments, '--select=kern']) == 1
  assert main.main(['merge', *arguments, '--select=kern.*']) == 0
  assert [*safetensors.numpy.load_file(out)] == ['kernel']


def test_steps_of_a_manager_are_interpolated(tmp_path):
  """Write two alphas, each a folder of steps that its owner restores."""
  trees = [_tree(seed) for seed in range(2)]
  folder = tmp_path / 'run'
  with ocp.CheckpointManager(folder) as manager:
    for step, tree in enumerate(trees):
      manager.save(step, args=ocp.args.StandardSave(tree))
  paths = ['--anchor', str(folder / '0'), '--models', str(folder / '1')]
  out = tmp_path / 'out'
  flags = ['--method=wise_ft', '--alphas', '0.25', '0.75', f'--output={out}']
  assert main.main(['merge', *paths, *flags]) == 0
  for alpha in (0.25, 0.75):
    with ocp.StandardCheckpointer() as reader:
      actual = reader.restore(out / f'alpha_{alpha}' / 'default')
    for name in SHAPES:
      one, two = (np.float64(x['params']['dense'][name]) for x in trees)
      np.testing.assert_allclose(
        actual['params']['dense'][name],
        (1 - alpha) * one + alpha * two,
        atol=1e-6,
      )


def _unfinished(path):
  for marker in path.rglob('*'):
    if marker.name == 'commit_success.txt':
      marker.unlink()
    elif marker.name == '_CHECKPOINT_METADATA':
      meta = json.loads(marker.read_text())
      marker.write_text(json.dumps({**meta, 'commit_timestamp_nsecs': None}))


def _rewrite(change, write=_standard):
  def damage(path):
    shutil.rmtree(path)
    write(path, change(_tree(2)))

  return damage


def _data(damage):
  """Damage the largest file of the data."""

  def apply(path):
    files = [file for file in path.rglob('d/*') if file.is_file()]
    damage(max(files, key=lambda file: file.stat().st_size))

  return apply


def _json_item(path):
  shutil.rmtree(path)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
    writer.save(path, args=ocp.args.JsonSave({'params': [1.0, 2.0]}))


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (_unfinished, '2 is not complete: the run that wrote it was interrupted'),
    (_data(pathlib.Path.unlink), 'array params/dense/.* cannot be read: .*NOT'),
    (
      _data(lambda file: os.truncate(file, file.stat().st_size // 2)),
      'array params/dense/.* cannot be read: ',
    ),
    (
      _rewrite(lambda tree: jax.tree.map(lambda x: x[..., None], tree)),
      r'params/dense/scale: shapes differ: .* float32\[8, 1\]',
    ),
    (
      _rewrite(lambda _: _tree(2, jnp.bfloat16)),
      r'params/dense/scale: dtypes differ: .* bfloat16\[8\]',
    ),
    (
      _rewrite(lambda tree: {'params': {'dense': tree['params']}}),
      'params/dense/dense/scale: not in ',
    ),
    (_json_item, '2 holds no weights: .*metadata'),
    (
      _rewrite(lambda _: {'params': {'name': 'text'}}, _pytree),
      r"2: '.*' matches none of its arrays: \[\]",
    ),
  ],
)
def test_models_that_are_refused(damage, message, tmp_path):
  paths = [tmp_path / str(seed) for seed in range(3)]
  for seed, path in enumerate(paths):
    _standard(path, _tree(seed))
  damage(paths[2])
  with pytest.raises(ValueError, match=message):
    files.merge(paths[0], paths[1:], tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
