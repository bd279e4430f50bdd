"""Checkpoints that Orbax wrote, in each of its forms."""

import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
import pytest

from modelstock_jax.formats import orbax

PARAMS = {
  'tok.emb': jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4),
  'layers': [jnp.arange(24.0).reshape(2, 3, 4), {'value': jnp.ones((5,))}],
  'count': jnp.array(7, jnp.int32),
}
TREE = {
  'params': PARAMS,
  'opt_state': [jnp.zeros(3), None],
  'step': np.int64(3),
}
NAMES = ['layers/0', 'layers/1/value', 'tok.emb', 'count']


def _pytree(**options):
  def write(folder):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as writer:
      writer.save(folder, args=ocp.args.PyTreeSave(TREE | {'name': 'text'}))

  return write


def _standard(folder):
  with ocp.StandardCheckpointer() as writer:
    writer.save(folder, TREE)


def _manager(item):
  def write(folder):
    save = ocp.args.StandardSave(TREE)
    if item:
      save = ocp.args.Composite(**{item: ocp.args.PyTreeSave(TREE)})
    with ocp.CheckpointManager(folder) as manager:
      for step in (5, 10):
        manager.save(step, args=save)

  return write


def _v1(folder):
  v1.save(folder, {**TREE, 'step': 3})


FORMS = {
  'standard': (_standard, '.'),
  'a folder an array': (_pytree(use_ocdbt=False), '.'),
  'zarr3': (_pytree(use_ocdbt=True, use_zarr3=True), '.'),
  'manager': (_manager(None), '10/default'),
  'manager of items': (_manager('items'), '10/items'),
  'manager of a pytree': (_manager('pytree'), '10/pytree'),
  'manager of params': (_manager('params'), '10/params'),
  'v1': (_v1, 'state'),
}


@pytest.fixture(scope='module', params=FORMS)
def form(request, tmp_path_factory):
  write, inner = FORMS[request.param]
  folder = tmp_path_factory.mktemp('form') / 'checkpoint'
  write(folder)
  return folder, inner


def test_reads_what_orbax_wrote(form):
  folder, inner = form
  item = orbax.find(folder)
  assert item == (folder / inner)
  arrays = orbax.read(item)
  assert sorted(arrays) == sorted(f'params/{name}' for name in NAMES)
  expected = {
    'params/layers/0': PARAMS['layers'][0],
    'params/layers/1/value': PARAMS['layers'][1]['value'],
    'params/tok.emb': PARAMS['tok.emb'],
    'params/count': PARAMS['count'],
  }
  for name, tensor in arrays.items():
    value = np.asarray(expected[name])
    assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
    np.testing.assert_array_equal(tensor.load(), value)
  everything = orbax.read(item, '.*')
  assert everything['step'].load() == 3
  assert list(orbax.read(item, 'opt_state/0')) == ['opt_state/0']


@pytest.mark.parametrize('limit', [1, 5, 12, 100])
def test_windows_are_elements_in_order(tmp_path, monkeypatch, limit):
  monkeypatch.setattr(orbax, '_WINDOW', limit)
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  sharding = jax.NamedSharding(
    jax.sharding.Mesh(devices, ('a', 'b')), jax.P('a', 'b')
  )
  values = np.arange(4 * 6 * 5.0, dtype=np.float32).reshape(4, 6, 5)
  with ocp.StandardCheckpointer() as writer:
    writer.save(tmp_path / 'w', {'w': jax.device_put(values, sharding)})
  tensor = orbax.read(tmp_path / 'w')['w']
  for start, stop in [(0, 120), (0, 0), (7, 8), (3, 61), (29, 31), (90, 120)]:
    actual = tensor.read(start, stop)
    np.testing.assert_array_equal(actual, values.reshape(-1)[start:stop])


def test_chunks_larger_than_the_cache_are_decoded_once(tmp_path, monkeypatch):
  values = np.arange(6000, dtype=np.float32).reshape(50, 120)
  with ocp.StandardCheckpointer() as writer:
    writer.save(tmp_path / 'w', {'w': jnp.asarray(values)})
  for limit, whole in ((values.nbytes, False), (values.nbytes - 1, True)):
    monkeypatch.setattr(orbax, '_CACHE', limit)
    tensor = orbax.read(tmp_path / 'w')['w']
    assert (tensor.window is None) == whole
    np.testing.assert_array_equal(tensor.load(), values)
    cached = tensor.cached()
    for start in range(0, 6000, 700):
      actual = cached.read(start, min(start + 700, 6000))
      expected = values.reshape(-1)[start : start + 700]
      np.testing.assert_array_equal(actual, expected)


def test_a_chunk_larger_than_memory(tmp_path, monkeypatch):
  """TensorStore would end the process."""
  with ocp.StandardCheckpointer() as writer:
    writer.save(tmp_path / 'w', {'w': jnp.zeros((50, 100))})
  sizes = {'SC_PAGE_SIZE': 100, 'SC_PHYS_PAGES': 199}
  monkeypatch.setattr(orbax.os, 'sysconf', sizes.__getitem__)
  with pytest.raises(
    ValueError, match=r'w cannot be read: a chunk of it takes'
  ):
    orbax.read(tmp_path / 'w')
  monkeypatch.setitem(sizes, 'SC_PHYS_PAGES', 200)
  assert orbax.read(tmp_path / 'w')['w'].shape == (50, 100)


def test_a_step_that_is_not_complete(tmp_path):
  _manager(None)(tmp_path / 'run')
  marker = tmp_path / 'run' / '10' / '_CHECKPOINT_METADATA'
  stated = json.loads(marker.read_text())
  marker.write_text(json.dumps({**stated, 'commit_timestamp_nsecs': None}))
  (marker.parent / 'commit_success.txt').unlink()
  assert orbax.find(tmp_path / 'run') == tmp_path / 'run' / '5' / 'default'
  with pytest.raises(ValueError, match='10 is not complete: the run'):
    orbax.find(tmp_path / 'run' / '10')


def test_several_items_need_a_name(tmp_path):
  for name in ('a', 'b'):
    _standard(tmp_path / '5' / name)
  with pytest.raises(ValueError, match=r'5 holds several items.*Name the fold'):
    orbax.find(tmp_path)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda meta: meta.pop('tree_metadata'), 'is not the metadata of an item'),
    (lambda meta: meta.update(tree_metadata=[1]), 'is not the metadata of an'),
    (lambda meta: _key(meta, '../x'), "'../x' cannot be the name of an array"),
    (lambda meta: _key(meta, 'none'), 'the array none cannot be read: NOT_F'),
  ],
)
def test_metadata_that_is_damaged(tmp_path, damage, message):
  with ocp.StandardCheckpointer() as writer:
    writer.save(tmp_path / 'w', {'w': jnp.ones(3)})
  path = tmp_path / 'w' / '_METADATA'
  meta = json.loads(path.read_text())
  damage(meta)
  path.write_text(json.dumps(meta))
  with pytest.raises(ValueError, match=message) as error:
    orbax.read(tmp_path / 'w')
  assert str(error.value).count('\n') == 0


def _key(meta, name):
  (entry,) = meta['tree_metadata'].values()
  entry['key_metadata'][0]['key'] = name


@pytest.mark.parametrize('damage', ['missing', 'other bytes'])
def test_a_chunk_is_damaged(tmp_path, damage):
  folder = tmp_path / 'w'
  _pytree(use_ocdbt=False)(folder)
  chunk = folder / 'params.tok.emb' / '0.0'
  chunk.unlink() if damage == 'missing' else chunk.write_bytes(b'not zstd')
  tensor = orbax.read(folder)['params/tok.emb']
  with pytest.raises(ValueError, match=r'params/tok\.emb cannot be read: '):
    tensor.load()


def test_nothing_is_selected(tmp_path):
  _standard(tmp_path / 'w')
  with pytest.raises(ValueError, match="'bias' matches none of its arrays"):
    orbax.read(tmp_path / 'w', 'bias')


def test_there_is_none(tmp_path):
  (tmp_path / '5').mkdir()
  pathlib.Path(tmp_path, 'notes.txt').write_text('')
  assert orbax.find(tmp_path) is None
