"""Fixtures that the tests of the documentation share."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope='session')
def documented():
  """The module of the commands."""
  spec = importlib.util.spec_from_file_location(
    'documented', HERE / 'documented.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='session')
def belongings(imagenet, tmp_path_factory):
  """Make what a reader of any page is taken to have: data and checkpoints."""
  import jax
  import orbax.checkpoint as ocp
  import safetensors.numpy

  from modelstock_jax import clip
  from modelstock_jax.data import sources

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
  prompts = dict(
    names=[f'thing number {i}' for i in range(1000)],
    templates=['a photo of a {}.'],
    labels=list(sources.imagenet_wnids()),
  )
  (folder / 'prompts.json').write_text(json.dumps(prompts))

  # Checkpoints of no known architecture: what they learnt, and noise.
  rng = np.random.default_rng(0)
  names = [f'layers.0.{n}_proj.weight' for n in ('q', 'k', 'v', 'out')]
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
  for name, seed in (('pretrained', 0), ('seed_0', 1), ('seed_1', 2)):
    leaves = np.random.default_rng(seed).normal(size=(2, 4, 4))
    with ocp.CheckpointManager(folder / 'orbax' / name) as manager:
      params = {'encoder': {'w': leaves[0]}, 'head': {'w': leaves[1]}}
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
