import dataclasses
import json
import os
import subprocess
import sys

import jax
from jax import numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import clip
from modelstock_jax.formats import torch


@pytest.fixture(scope='session')
def rgb(tiny):
  """Sizes that every format can hold: three channels, heads of 64."""
  vision = dataclasses.replace(tiny.vision, channels=3, width=128, heads=2)
  text = dataclasses.replace(tiny.text, width=64, heads=1)
  return clip.CLIPConfig(tiny.embed_dim, vision, text)


@pytest.fixture(scope='session')
def params(rgb, randomize):
  model = clip.create(rgb)
  return randomize(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture
def folder(params, rgb, tmp_path):
  clip.save_pretrained(params, tmp_path / 'clip', config=rgb)
  return tmp_path / 'clip'


def equal(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def edit(folder, change):
  """Rewrites the tensors of a Hugging Face folder."""
  path = folder / 'model.safetensors'
  tensors = change(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(tensors, path, {'format': 'pt'})


def edit_config(folder, tower, **values):
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  config[tower].update(values)
  path.write_text(json.dumps(config))


@pytest.mark.parametrize(
  ('format', 'name'),
  [
    ('huggingface', ''),
    ('open_clip', ''),
    ('scenic', 'clip.npy'),
  ],
)
def test_every_format(format, name, params, rgb, tmp_path):
  clip.save_pretrained(params, tmp_path / 'out', format, config=rgb)
  actual = clip.load_pretrained(tmp_path / 'out' / name, allow_pickle=True)
  assert actual.model.config == rgb
  assert jax.tree.structure(actual.params) == jax.tree.structure(params)
  assert equal(actual.params, params)


def test_files_of_torch(params, rgb, folder, save_torch, tmp_path, monkeypatch):
  """OpenAI's names in a .pt, Hugging Face's in a .bin; none needs torch."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  clip.save_pretrained(params, tmp_path / 'out', 'scenic', config=rgb)
  arrays = np.load(tmp_path / 'out' / 'clip.npy', allow_pickle=True).item()
  save_torch(tmp_path / 'clip.pt', arrays)
  weights = folder / 'model.safetensors'
  save_torch(folder / 'pytorch_model.bin', safetensors.numpy.load_file(weights))
  weights.unlink()
  for path in (tmp_path / 'clip.pt', folder):
    actual = clip.load_pretrained(path, activation='quick_gelu')
    assert actual.model.config == rgb
    assert equal(actual.params, params)
  index = folder / 'pytorch_model.bin.index.json'
  actual = torch.read(folder / 'pytorch_model.bin')
  index.write_text(
    json.dumps({'weight_map': dict.fromkeys(actual, 'part.bin')})
  )
  (folder / 'pytorch_model.bin').rename(folder / 'part.bin')
  assert equal(clip.load_pretrained(folder).params, params)


def test_shipped_weights():
  model, params = clip.load_pretrained(
    clip.__path__[0] + '/pretrained/mini_clip.safetensors'
  )
  like = jax.eval_shape(model.init, jax.random.key(0))
  assert model.config.vision.tokens == 17
  again = clip.load_safetensors(
    clip.__path__[0] + '/pretrained/mini_clip.safetensors', like
  )
  assert equal(params, again)


def test_half_precision_becomes_float32(folder, params):
  edit(folder, lambda ts: {k: x.astype(np.float16) for k, x in ts.items()})
  actual = clip.load_pretrained(folder).params
  rounded = jax.tree.map(
    lambda x: np.asarray(x, np.float16).astype(np.float32), params
  )
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual))
  assert equal(actual, rounded)


def test_constants_of_older_files(folder, params):
  ids = np.arange(7, dtype=np.int64)[None]
  constants = {'text_model.embeddings.position_ids': ids, 'context_length': ids}
  edit(folder, lambda t: t | constants)
  assert equal(clip.load_pretrained(folder).params, params)


def test_a_number_of_one_element(folder, params):
  edit(folder, lambda t: t | {'logit_scale': t['logit_scale'].reshape(1)})
  assert equal(clip.load_pretrained(folder).params, params)


def test_image_tower_alone(params, rgb, tmp_path):
  image = {'image': params['image']}
  clip.save_pretrained(image, tmp_path / 'vision', config=rgb)
  model, actual = clip.load_pretrained(tmp_path / 'vision')
  assert model.config == dataclasses.replace(rgb, text=None)
  assert equal(actual, image)
  with pytest.raises(ValueError, match='no text tower'):
    model.encode_text(actual, jnp.zeros((1, 3), jnp.int32))


def test_straight_into_shardings(folder, params):
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  spec = jax.sharding.PartitionSpec
  replicated = jax.sharding.NamedSharding(mesh, spec())
  actual = clip.load_pretrained(folder, shardings=replicated).params
  assert equal(actual, params)
  assert {leaf.sharding for leaf in jax.tree.leaves(actual)} == {replicated}

  # A tree to any depth, as for jax.jit.
  rows = jax.sharding.NamedSharding(mesh, spec('data'))
  tree = jax.tree.map(lambda _: replicated, params)
  tree['image']['block_1']['mlp']['fc']['kernel'] = rows
  actual = clip.load_pretrained(folder, shardings=tree).params
  kernel = actual['image']['block_1']['mlp']['fc']['kernel']
  assert kernel.sharding == rows
  assert kernel.addressable_shards[0].data.shape == (16, 512)
  assert equal(actual, params)


def test_shardings_of_another_tree(folder):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with pytest.raises(ValueError, match='image'):
    clip.load_pretrained(folder, shardings={'visual': sharding})


def test_larger_images(folder, params):
  """Resize a linear ramp: cubic interpolation is exact on it, in the grid."""
  size = 12  # 6 x 6 patches in place of 3 x 3
  y, x = np.meshgrid(np.arange(3.0), np.arange(3.0), indexing='ij')
  ramp = np.stack([y, x] * 64, axis=-1).reshape(9, 128)
  class_token = np.full((1, 128), 7.0)
  name = 'vision_model.embeddings.position_embedding.weight'
  table = np.concatenate([class_token, ramp]).astype(np.float32)
  edit(folder, lambda tensors: tensors | {name: table})

  model, actual = clip.load_pretrained(folder, image_size=size)
  assert model.config.vision.image_size == size
  resized = np.asarray(actual['image']['positional_embedding'])
  assert resized.shape == (37, 128)
  np.testing.assert_array_equal(resized[0], 7.0)
  grid = resized[1:].reshape(6, 6, 128)
  # Centres of the new patches in units of the old: (i + 0.5) / 2 - 0.5. Four
  # old neighbours on a side are needed, so compare by symmetry at the middle.
  np.testing.assert_allclose(grid[2, :, 0] + grid[3, :, 0], 2.0, atol=1e-5)
  np.testing.assert_allclose(grid[:, 2, 1] + grid[:, 3, 1], 2.0, atol=1e-5)
  assert (np.diff(grid[:, 0, 0]) > 0).all()
  np.testing.assert_allclose(np.diff(grid[0, :, 0]), 0, atol=1e-6)
  images = jnp.zeros((1, size, size, 3))
  assert model.encode_image(actual, images).shape == (1, 10)


def test_image_size_that_patches_do_not_divide(folder):
  with pytest.raises(ValueError, match='patch_size=2 does not divide'):
    clip.load_pretrained(folder, image_size=7)


def test_every_wrong_tensor_at_once(folder):
  def change(tensors):
    tensors = {k.replace('ln_final', 'other'): x for k, x in tensors.items()}
    del tensors['logit_scale']
    tensors['extra'] = np.zeros(3, np.float32)
    tensors['visual_projection.weight'] = np.zeros((2, 2), np.float32)
    name = 'vision_model.pre_layrnorm.bias'
    tensors[name] = tensors[name].astype(np.int32)
    return tensors

  edit(folder, change)
  with pytest.raises(ValueError, match='not those of its config') as caught:
    clip.load_pretrained(folder)
  message = str(caught.value)
  assert str(folder) in message
  assert 'missing logit_scale: []' in message
  assert 'extra extra: [3]' in message
  assert (
    'visual_projection.weight: file has [2, 2], the model takes [10, 128]'
  ) in message
  assert 'vision_model.pre_layrnorm.bias: is int32, must be' in message
  assert len(message.splitlines()) == 5


def test_config_that_disagrees(folder):
  edit_config(folder, 'vision_config', num_hidden_layers=1, patch_size=3)
  with pytest.raises(ValueError, match='not those of its config') as caught:
    clip.load_pretrained(folder)
  message = str(caught.value)
  assert 'extra vision_model.encoder.layers.1.mlp.fc1.bias: [512]' in message
  assert 'file has [128, 3, 2, 2], the model takes [128, 3, 3, 3]' in message


def test_weights_that_are_not_finite(folder):
  def change(tensors):
    tensors['visual_projection.weight'][0, :2] = np.nan
    tensors['logit_scale'] = np.array(np.inf, np.float32)
    return tensors

  edit(folder, change)
  with pytest.raises(ValueError, match='not finite') as caught:
    clip.load_pretrained(folder)
  message = str(caught.value)
  assert 'visual_projection.weight: 2 of 1280 values' in message
  assert 'logit_scale: 1 of 1 values' in message


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{', 'config.json: Expecting'),
    ('[]', 'config.json'),
    ('{"model_type": "bert"}', "config.json: model_type is 'bert'"),
  ],
)
def test_broken_config(text, message, folder):
  (folder / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    clip.load_pretrained(folder)


def test_configs_that_nobody_can_build(folder):
  """Each is refused before a network of such sizes is made."""
  config = json.loads((folder / 'config.json').read_text())
  texts = ['[' * 10**5, '{"a": 1, "a": 2}', '3', '"text"', 'null']
  for key, values in (
    ('num_hidden_layers', [10**6, 2**70, 10**30, -1, 2.0, True, '2', [2], {}]),
    ('hidden_size', [2**40, 0, [128], '128', 1e400]),
    ('vocab_size', [2**64, None, 'a' * 10**6]),
    ('hidden_act', [[], 'relu\x1b[2J']),
  ):
    for value in values:
      for tower in ('vision_config', 'text_config'):
        content = config | {tower: config[tower] | {key: value}}
        if key in config[tower]:
          texts.append(json.dumps(content))
  for text in [*texts, json.dumps(config | {'vision_config': [1]})]:
    (folder / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=r'config') as caught:
      clip.load_pretrained(folder)
    assert max(map(len, str(caught.value).split('\n'))) < 800
    assert '\x1b' not in str(caught.value)


def test_a_file_that_says_it_is_huge(tmp_path):
  tower = dict(width=8, depth=10**6, heads=1)
  image = dict(tower, image_size=4, patch_size=2)
  for sizes, message in (
    (dict(embed_dim=4, image=image, text=None), 'describes 1000000 blocks'),
    ([1], 'does not describe a CLIP'),
    ('[' * 10**5, 'nested more than 100 deep'),
  ):
    model = sizes if isinstance(sizes, str) else json.dumps(sizes)
    path = tmp_path / 'w.safetensors'
    clip.save_safetensors({'w': np.zeros(1)}, path, {'model': model})
    with pytest.raises(ValueError, match=message):
      clip.load_pretrained(path)


def test_openai_shapes_of_another_rank(tmp_path):
  names = ('visual.conv1.weight', 'visual.positional_embedding', 'visual.proj')
  for shape in ((), (0, 0, 0, 0), (2, 2)):
    np.save(
      tmp_path / 'clip.npy',
      np.array({name: np.zeros(shape) for name in names}, object),
    )
    with pytest.raises(
      ValueError, match='are not the tensors of a vision transformer'
    ):
      clip.load_pretrained(tmp_path / 'clip.npy', allow_pickle=True)


def test_truncated_weights(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(ValueError, match='not a whole safetensors file'):
    clip.load_pretrained(folder)


@pytest.mark.parametrize('form', ['huggingface', 'open_clip'])
def test_the_file_inside_a_folder(form, params, rgb, tmp_path):
  """Its config says GELU and heads of 32, which nothing in the file does."""
  vision = dataclasses.replace(rgb.vision, heads=4)
  config = dataclasses.replace(rgb, vision=vision, activation='gelu')
  clip.save_pretrained(params, tmp_path / 'clip', form, config=config)
  [file] = (tmp_path / 'clip').glob('*.safetensors')
  actual = clip.load_pretrained(file)
  assert actual.model.config == config
  assert equal(actual.params, params)
  lone = file.rename(tmp_path / 'lone.safetensors')
  message = (
    'pass the folder' if form == 'huggingface' else 'neither the activat'
  )
  with pytest.raises(ValueError, match=message):
    clip.load_pretrained(lone)


def test_files_of_timm_beside_those_of_open_clip(params, rgb, tmp_path):
  clip.save_pretrained(params, tmp_path / 'clip', 'open_clip', config=rgb)
  stated = {'architecture': 'vit_base_patch16_clip_224', 'num_classes': 512}
  (tmp_path / 'clip' / 'config.json').write_text(json.dumps(stated))
  weights = {'cls_token': np.zeros((1, 1, 64), np.float32)}
  safetensors.numpy.save_file(weights, tmp_path / 'clip' / 'model.safetensors')
  assert equal(clip.load_pretrained(tmp_path / 'clip').params, params)


@pytest.mark.parametrize('complete', [True, False])
def test_a_wrong_half_of_hugging_face(params, rgb, tmp_path, complete):
  """Its config is of another patch size; open_clip's file, named, is right."""
  folder = tmp_path / 'clip'
  clip.save_pretrained(params, folder, config=rgb)
  clip.save_pretrained(params, tmp_path / 'other', 'open_clip', config=rgb)
  for file in (tmp_path / 'other').glob('open_clip_*'):
    file.rename(folder / file.name)
  edit_config(folder, 'vision_config', patch_size=3)
  if not complete:
    edit(folder, lambda tensors: {'logit_scale': tensors['logit_scale']})
  with pytest.raises(ValueError, match=r'name the file of other weights in th'):
    clip.load_pretrained(folder)
  actual = clip.load_pretrained(folder / 'open_clip_model.safetensors')
  assert actual.model.config == rgb
  assert equal(actual.params, params)


def test_a_scale_of_one_element(folder, params):
  scale = 'logit_scale'
  edit(folder, lambda tensors: tensors | {scale: tensors[scale].reshape(1)})
  assert equal(clip.load_pretrained(folder).params, params)


def test_a_tower_without_projection(folder):
  def change(tensors):
    del tensors['visual_projection.weight']
    return tensors

  edit(folder, change)
  with pytest.raises(
    ValueError, match='Save a CLIPModel or CLIPVisionModelWit'
  ):
    clip.load_pretrained(folder)


def test_no_checkpoint(tmp_path):
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(ValueError, match=r"no weights.*\['notes.txt'\]"):
    clip.load_pretrained(tmp_path)
  with pytest.raises(ValueError, match='of no known format'):
    clip.load_pretrained(tmp_path / 'notes.txt')
  with pytest.raises(FileNotFoundError, match='there is no such file'):
    clip.load_pretrained(tmp_path / 'nothing')


OFFLINE = """
import sys
from modelstock_jax import clip
try:
  print(sorted(clip.load_pretrained(sys.argv[1]).params))
except FileNotFoundError as error:
  print(error)
"""


def test_id_of_the_hub(folder, tmp_path):
  """From the hub's own cache, which it fills when there is a network."""
  commit = 40 * 'a'
  cached = tmp_path / 'hub' / 'models--someone--clip'
  (cached / 'refs').mkdir(parents=True)
  (cached / 'refs' / 'main').write_text(commit)
  (cached / 'snapshots').mkdir()
  folder.rename(cached / 'snapshots' / commit)

  def load(name):
    # Its settings are read when it is imported.
    env = os.environ | {
      'HF_HUB_CACHE': str(tmp_path / 'hub'),
      'HF_HUB_OFFLINE': '1',
    }
    command = [sys.executable, '-c', OFFLINE, name]
    return subprocess.run(
      command, env=env, capture_output=True, text=True, check=True
    ).stdout

  assert load('someone/clip') == "['image', 'logit_scale', 'text']\n"
  assert 'hub did not give a model of that id' in load('someone/else')
