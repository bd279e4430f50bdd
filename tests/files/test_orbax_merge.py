"""Merged checkpoints of Orbax: as of trees, and restored by their owners."""

import jax
from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
import pytest
import safetensors.numpy

import modelstock_jax as ms
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


FORMS = {
  'standard': (_standard, _restore_standard),
  'pytree': (
    lambda folder, tree: ocp.PyTreeCheckpointer().save(folder, tree),
    _restore_pytree,
  ),
  'manager': (_manager, _restore_manager),
  'v1': (lambda folder, tree: v1.save(folder, tree), v1.load),
}


@pytest.mark.parametrize('form', FORMS)
def test_the_merge_is_restored_by_its_owner(form, tmp_path, caplog):
  write, restore = FORMS[form]
  trees = [_tree(seed) for seed in range(3)]
  paths = [tmp_path / str(seed) for seed in range(3)]
  for path, tree in zip(paths, trees, strict=True):
    write(path, tree)
  anchor, *models = map(str, paths)
  out = tmp_path / 'out'
  arguments = ['--anchor', anchor, '--models', *models, '--output', str(out)]
  with caplog.at_level('INFO'):
    assert main.main(['merge', *arguments]) == 0
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
  restored = restore(out, like)
  assert restored['params']['dense']['kernel'].sharding == sharding
  for name, value in expected['dense'].items():
    np.testing.assert_allclose(
      restored['params']['dense'][name], value, rtol=0, atol=3e-7
    )


def test_bfloat16_arrays_have_the_bytes_of_safetensors(tmp_path):
  paths = [tmp_path / str(seed) for seed in range(3)]
  for seed, path in enumerate(paths):
    tree = _tree(seed, jnp.bfloat16)['params']
    _standard(path, tree)
    flat = {f'dense/{name}': np.asarray(x) for name, x in tree['dense'].items()}
    safetensors.numpy.save_file(flat, f'{path}.safetensors')
  files = [f'{path}.safetensors' for path in paths]
  merged = []
  for anchor, *models in (map(str, paths), files):
    out = str(tmp_path / f'out{len(merged)}.safetensors')
    arguments = ['--anchor', anchor, '--models', *models, '--output', out]
    assert main.main(['merge', *arguments]) == 0
    merged.append(safetensors.numpy.load_file(out))
  for name, value in merged[0].items():
    assert value.tobytes() == merged[1][name].tobytes()
  assert merged[0].keys() == merged[1].keys()


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
