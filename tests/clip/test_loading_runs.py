import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.training import checkpoints as checkpoints_lib
from modelstock_jax.training import state as state_lib


@pytest.fixture
def workdir(tiny, randomize, tmp_path):
  """Return what a run leaves, written by the code that writes it in a run."""
  model = clip.classifier(tiny, 3)
  like = jax.eval_shape(model.init, jax.random.key(0))
  sizes = dict(
    embed_dim=tiny.embed_dim,
    image=vars(tiny.vision),
    text=vars(tiny.text),
    dtype='bfloat16',
  )
  (tmp_path / 'config.json').write_text(json.dumps({'model': sizes}))
  with checkpoints_lib.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    for step in (5, 30):
      params = randomize(like, seed=step)
      ones = jax.tree.map(lambda _: jnp.ones(()), params)
      state = state_lib.State(
        jnp.int32(step), params, {}, {}, jax.random.split(jax.random.key(0), 2)
      )
      merged = merging.Merged(params, ones, ones)
      checkpoints.save(step, checkpoints_lib.Checkpoint(state, merged, None))
    checkpoints.wait()
  return tmp_path


def equal(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def expected(tiny, randomize, step):
  model = clip.classifier(tiny, 3)
  like = jax.eval_shape(model.init, jax.random.key(0))
  return randomize(like, seed=step)


def test_latest_merge(workdir, tiny, randomize):
  model, params = clip.load_pretrained(workdir)
  assert model.config == clip.CLIPConfig(tiny.embed_dim, tiny.vision, None)
  assert equal(params, expected(tiny, randomize, 30))
  assert params['head']['kernel'].shape == (10, 3)


def test_one_checkpoint(workdir, tiny, randomize, monkeypatch):
  _, params = clip.load_pretrained(workdir / 'checkpoints/5')
  assert equal(params, expected(tiny, randomize, 5))
  monkeypatch.chdir(workdir)  # paths may be relative
  _, params = clip.load_pretrained(pathlib.Path('checkpoints/5'))
  assert equal(params, expected(tiny, randomize, 5))


def test_into_shardings(workdir, tiny, randomize):
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  actual = clip.load_pretrained(workdir, shardings=sharding).params
  assert {leaf.sharding for leaf in jax.tree.leaves(actual)} == {sharding}
  assert equal(actual, expected(tiny, randomize, 30))


def test_no_checkpoint_yet(workdir):
  for step in (5, 30):
    (workdir / 'checkpoints' / str(step)).rename(workdir / str(step))
  with pytest.raises(FileNotFoundError, match='Train until the first merge'):
    clip.load_pretrained(workdir)


def test_damaged_checkpoint(workdir):
  for file in (workdir / 'checkpoints/30/merged').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  with pytest.raises(
    ValueError, match=r'30/merged/\S+ is damaged.*checkpoints/5\.$'
  ):
    clip.load_pretrained(workdir)


def test_config_of_something_else(workdir):
  (workdir / 'config.json').write_text('{"layers": 3}')
  with pytest.raises(ValueError, match=r"config.json .* has no 'model'"):
    clip.load_pretrained(workdir)


def test_images_keep_their_size(workdir):
  with pytest.raises(ValueError, match='image_size=8: a run keeps the size'):
    clip.load_pretrained(workdir, image_size=8)
