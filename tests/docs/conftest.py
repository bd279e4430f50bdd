"""Fixtures that the tests of the documentation share."""

import json
import re
import shlex

import numpy as np
import pytest
from xdist import scheduler

from tests.docs import documented

# Modules whose tests share a site, or runs, that take long to make.
TOGETHER = ('test_site.py', 'test_own_network.py')


class ByPage(scheduler.LoadScopeScheduling):
  """Keeps the commands of a page, and some modules, in one process."""

  def _split_scope(self, nodeid):
    if page := re.search(r'\[(\S+): \d+\]$', nodeid):
      return page[1]
    module = nodeid.partition('::')[0]
    return module if module.endswith(TOGETHER) else nodeid


def pytest_xdist_make_scheduler(config, log):
  return ByPage(config, log)


@pytest.fixture(scope='session')
def belongings(imagenet, save_torch, tmp_path_factory):
  """Make what a reader of any page is taken to have: data and checkpoints."""
  import jax
  import orbax.checkpoint as ocp
  import safetensors.numpy

  from modelstock_jax import clip
  from modelstock_jax.data import sources
  from modelstock_jax.training import config as config_lib

  folder = tmp_path_factory.mktemp('belongings')
  (folder / 'data').symlink_to(imagenet)
  # A CLIP of random weights, as narrow as documented.IMAGENET says.
  sizes = clip.CLIPConfig(
    embed_dim=16,
    vision=clip.VisionConfig(
      image_size=224, patch_size=32, width=64, depth=2, heads=1
    ),
    text=clip.TextConfig(
      context_length=77, vocab_size=49408, width=64, depth=1, heads=1
    ),
  )
  params = jax.jit(clip.create(sizes).init)(jax.random.key(0))
  clip.save_pretrained(params, folder / 'clip', config=sizes)
  path = documented.ROOT / 'configs' / 'digits.py'
  tiny = config_lib.load(path, shlex.split(documented.TINY)).model
  weights = clip.create(tiny.network()).init(jax.random.key(0))
  path = folder / 'tiny.safetensors'
  clip.save_safetensors(weights, path, {'model': tiny.to_json()})
  _classifiers(folder, params, sizes, save_torch)
  _pictures(folder / 'pictures')
  prompts = dict(
    names=[f'thing number {i}' for i in range(1000)],
    templates=['a photo of a {}.'],
    labels=list(sources.imagenet_wnids()),
  )
  (folder / 'prompts.json').write_text(json.dumps(prompts))

  # Checkpoints of no known architecture: what they learnt, and noise.
  rng = np.random.default_rng(0)
  names = [
    f'layers.{block}.{n}_proj.weight'
    for block in (0, 1)
    for n in ('q', 'k', 'v', 'out')
  ]
  learnt = {name: rng.normal(size=(8, 8)) for name in names}
  for name, file, moved in (
    ('pretrained', 'pretrained', 0),
    ('seed_0', 'a', 1),
    ('seed_1', 'b', 1),
  ):
    tensors = {
      key: np.float32(moved * (value + rng.normal(size=value.shape)))
      for key, value in learnt.items()
    }
    (folder / name).mkdir()
    (folder / name / 'config.json').write_text('{"model_type": "own"}')
    for path in (f'{name}/model.safetensors', f'{file}.safetensors'):
      safetensors.numpy.save_file(tensors, folder / path)
  for name in ('adapter_0', 'adapter_1'):
    (folder / name).mkdir()
    config = {'base_model_name_or_path': 'pretrained', 'lora_alpha': 8}
    config |= {'peft_type': 'LORA', 'r': 4, 'target_modules': ['q_proj']}
    (folder / name / 'adapter_config.json').write_text(json.dumps(config))
    module = 'base_model.model.layers.0.q_proj'
    factors = {
      f'{module}.lora_{x}.weight': rng.normal(size=size).astype(np.float32)
      for x, size in (('A', (4, 8)), ('B', (8, 4)))
    }
    file = folder / name / 'adapter_model.safetensors'
    safetensors.numpy.save_file(factors, file)
  for name, seed in (('pretrained', 0), ('seed_0', 1), ('seed_1', 2)):
    leaves = np.random.default_rng(seed).normal(size=(2, 4, 4))
    with ocp.CheckpointManager(folder / 'orbax' / name) as manager:
      encoder = {'blocks': {'w': leaves}}  # two layers, stacked
      params = {'encoder': encoder, 'head': {'w': leaves[1]}}
      tree = {'params': params, 'opt_state': {'count': np.array(seed)}}
      manager.save(100, args=ocp.args.StandardSave(tree))
  recipe = {
    'merge_method': 'model_stock',
    'base_model': 'pretrained',
    'models': [{'model': 'seed_0'}, {'model': 'seed_1'}],
  }
  # JSON is YAML.
  (folder / 'mergekit.yaml').write_text(json.dumps(recipe))
  return folder


def _pictures(folder):
  """Write 40 pictures of two classes."""
  from PIL import Image

  rng = np.random.default_rng(0)
  for label, color in (('red_fox', 'red'), ('blue_jay', 'blue')):
    (folder / label).mkdir(parents=True)
    for number in range(20):
      image = Image.new('RGB', (48, 32), color)
      noise = Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8))
      image = Image.blend(image, noise, 0.3)
      image.save(folder / label / f'{number}.jpg')


def _classifiers(folder, params, sizes, save_torch):
  """Write the CLIP as open_clip's training does, and as Model Soups'."""
  import safetensors.numpy

  from modelstock_jax import clip

  clip.save_pretrained(params, folder / 'as_state', 'open_clip', config=sizes)
  [file] = (folder / 'as_state').glob('*.safetensors')
  state = safetensors.numpy.load_file(file)
  save_torch(
    folder / 'epoch_3.pt', {f'module.{k}': x for k, x in state.items()}
  )
  tower = {
    f'model.{name}': x
    for name, x in state.items()
    if not name.startswith('transformer.')
  }
  rng = np.random.default_rng(0)
  tower['classification_head.weight'] = np.ones((1000, 16), np.float32)
  tower['classification_head.bias'] = np.ones(1000, np.float32)
  for number, name in enumerate(('zeroshot', 'model_1', 'model_2')):
    moved = {
      key: x + np.float32(number and rng.normal(0.1, 0.1, x.shape))
      for key, x in tower.items()
    }
    save_torch(folder / f'{name}.pt', moved)
