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


PREFIX = 'base_model.model.'
EMBED = 'model.embed_tokens'
ADAPTED = {
  'model.layers.0.q_proj': (8, 6),
  'model.layers.0.k_proj': (8, 6),
  'model.conv': (5, 3, 2, 2),
  EMBED: (20, 6),
}
CONFIG = {
  'peft_type': 'LORA',
  'base_model_name_or_path': 'someone/base',
  'revision': None,
  'r': 3,
  'lora_alpha': 5,
  'fan_in_fan_out': False,
  'target_modules': ['q_proj', 'k_proj', 'conv', 'embed_tokens'],
  'modules_to_save': None,
}


def _factors(rng, module, shape, rank):
  """A and B as peft names them."""
  if module == EMBED:
    return {
      f'{module}.lora_embedding_A': rng.normal(size=(rank, shape[0])),
      f'{module}.lora_embedding_B': rng.normal(size=(shape[1], rank)),
    }
  ones = (1,) * (len(shape) - 2)
  return {
    f'{module}.lora_A.weight': rng.normal(size=(rank, *shape[1:])),
    f'{module}.lora_B.weight': rng.normal(size=(shape[0], rank, *ones)),
  }


@pytest.fixture
def save_adapters(tmp_path, save_torch):
  """Writes a base and adapters of it; gives the folders."""

  def write(
    ranks=(3, 3), *, form='safetensors', stored=(), shapes=ADAPTED, **config
  ):
    rng = np.random.default_rng(0)
    base = {f'{name}.weight': rng.normal(size=s) for name, s in shapes.items()}
    base['model.norm.weight'] = rng.normal(size=6)
    base['head.weight'] = rng.normal(size=(4, 6))
    (tmp_path / 'base').mkdir()
    base = {name: array.astype(np.float32) for name, array in base.items()}
    safetensors.numpy.save_file(base, tmp_path / 'base' / 'model.safetensors')
    (tmp_path / 'base' / 'config.json').write_text('{"vocab_size": 20}')
    # So that directions agree, one adapter is the other and noise.
    shared = np.random.default_rng(1).bit_generator.state
    folders = []
    for number, rank in enumerate(ranks):
      folder = tmp_path / f'adapter_{number}'
      folder.mkdir()
      folders.append(folder)
      tensors = {}
      for module, shape in shapes.items():
        common, noise = np.random.default_rng(), np.random.default_rng(number)
        common.bit_generator.state = shared
        moved = _factors(noise, module, shape, rank)
        tensors |= {
          PREFIX + name: np.float32(array + 0.8 * moved[name])
          for name, array in _factors(common, module, shape, rank).items()
        }
      for name in stored:
        moved = base[name] + rng.normal(size=base[name].shape)
        tensors[PREFIX + name] = np.float32(moved)
      if form == 'bin':
        save_torch(folder / 'adapter_model.bin', tensors)
      else:
        file = folder / 'adapter_model.safetensors'
        safetensors.numpy.save_file(tensors, file)
      text = json.dumps(CONFIG | {'r': rank} | config)
      (folder / 'adapter_config.json').write_text(text)
    return tmp_path / 'base', folders

  return write


@pytest.fixture
def edit_adapter():
  """Changes an adapter: tensors, None for gone, and keys of its config."""

  def edit(folder, tensors=(), **config):
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
      path = folder / 'adapter_model.safetensors'
      stored = safetensors.numpy.load_file(path) | dict(tensors)
      kept = {name: x for name, x in stored.items() if x is not None}
      safetensors.numpy.save_file(kept, path)

  return edit
