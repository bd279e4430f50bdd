"""Checkpoints on disk, small, of whatever architecture."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

SHAPES = {
  'embed.weight': (40, 8),
  'blocks.0.attn.q_proj.weight': (8, 8),
  'blocks.0.attn.k_proj.weight': (8, 8),
  'blocks.0.attn.q_proj.bias': (8,),
  'blocks.0.conv.weight': (6, 3, 2, 2),
  'norm.weight': (64,),
}
DTYPES = {'bfloat16': ml_dtypes.bfloat16}


def _family(num_models=2, *, shapes=None, dtype='float32', agreement=0.5):
  """An anchor, and models that agree so far: a list of dicts of arrays."""
  shapes = shapes or SHAPES
  rng = np.random.default_rng(0)
  trees = [{} for _ in range(1 + num_models)]
  for name, shape in shapes.items():
    anchor = rng.normal(size=shape)
    shared = rng.normal(size=shape)
    trees[0][name] = anchor
    for tree in trees[1:]:
      individual = rng.normal(size=shape)
      step = agreement**0.5 * shared + (1 - agreement) ** 0.5 * individual
      tree[name] = anchor + 0.1 * step
  dtype = DTYPES.get(dtype, dtype)
  return [{k: np.asarray(v, dtype) for k, v in tree.items()} for tree in trees]


@pytest.fixture(scope='session')
def family():
  """Makes an anchor and models, of which each array is a tensor."""
  return _family


@pytest.fixture
def save(tmp_path):
  """Writes checkpoints; gives the paths of the anchor and the models."""

  def write(trees, *, form='folder'):
    paths = []
    for name, tree in zip('abcdefgh', trees, strict=False):
      path = tmp_path / name
      if form == 'file':
        path = path.with_suffix('.safetensors')
        safetensors.numpy.save_file(tree, path, {'format': 'pt'})
      else:
        path.mkdir()
        config = {'vocab_size': 40, 'torch_dtype': 'float32'}
        (path / 'config.json').write_text(json.dumps(config))
        (path / 'tokenizer.json').write_text(f'{{"of": "{name}"}}')
        (path / 'README.md').write_text('a model card')
        (path / 'training_args.bin').write_bytes(b'a pickle')
        _write(path, tree, parts=3 if form == 'sharded' else 1)
      paths.append(path)
    return paths[0], paths[1:]

  return write


def _write(path, tree, parts):
  if parts == 1:
    safetensors.numpy.save_file(
      tree, path / 'model.safetensors', {'format': 'pt'}
    )
    return
  names = list(tree)
  files = {}
  for number in range(parts):
    file = f'model-{number + 1:05d}-of-{parts:05d}.safetensors'
    part = {name: tree[name] for name in names[number::parts]}
    files |= dict.fromkeys(part, file)
    safetensors.numpy.save_file(part, path / file, {'format': 'pt'})
  index = {'metadata': {'total_size': 0}, 'weight_map': files}
  text = json.dumps(index)
  (path / 'model.safetensors.index.json').write_text(text)


@pytest.fixture
def load():
  """Reads what was written, with safetensors' own code: a dict of arrays."""

  def read(path):
    paths = [path] if path.is_file() else sorted(path.glob('*.safetensors'))
    tensors = {}
    for file in paths:
      tensors |= safetensors.numpy.load_file(file)
    return tensors

  return read
