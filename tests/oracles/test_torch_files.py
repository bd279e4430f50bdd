"""Files of PyTorch, as torch itself writes and reads them."""

import argparse
import collections
import json
import pickle
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

from modelstock_jax import files
from modelstock_jax.formats import detect
from modelstock_jax.formats import torch as torch_lib

pytestmark = pytest.mark.oracle
OLD = (
  *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
  *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
  *(torch.bool, torch.complex64, torch.complex128),
)
# torch writes these to legacy files too, but cannot read them back.
NEW = (
  *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz),
  *(torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
  *(torch.uint64, torch.uint32, torch.uint16),
)


@pytest.fixture(autouse=True)
def quiet():
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # torch is moving on from TorchScript
    yield


def _bytes(tensor):
  flat = tensor.detach().contiguous().reshape(-1)
  return flat.view(torch.uint8).numpy().tobytes()


def _check(path, expected):
  """Names in order, shapes, dtypes and bits, as a whole and by windows."""
  tensors = torch_lib.read(path)
  assert list(tensors) == list(expected)
  for name, theirs in expected.items():
    ours = tensors[name]
    assert ours.shape == tuple(theirs.shape), name
    assert f'torch.{ours.dtype.name}' == str(theirs.dtype), name
    assert ours.load().tobytes() == _bytes(theirs), name
    parts = [
      ours.read(n, min(n + 7, ours.size)) for n in range(0, ours.size, 7)
    ]
    assert b''.join(part.tobytes() for part in parts) == _bytes(theirs), name


def _draw(dtype, shape=(3, 5)):
  generator = torch.Generator().manual_seed(0)
  numbers = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
  return numbers.to(dtype)


def _views():
  table = _draw(torch.float32, (6, 8))
  volume = _draw(torch.bfloat16, (2, 3, 4, 5))
  return {
    'table': table,
    'transposed': table.T,
    'columns': table[1:4, ::3],
    'expanded': table[:1].expand(5, 8),
    'sliding': table.reshape(-1).unfold(0, 5, 3),
    'scalar': table[2, 3],
    'empty': torch.zeros(0, 4),
    'no columns': table[:, :0],
    'permuted': volume.permute(3, 1, 0, 2),
    'channels last': volume.to(memory_format=torch.channels_last),
    'flipped': table.flip(0),
    'parameter': torch.nn.Parameter(table * 2),
    'frozen': torch.nn.Parameter(table.T, requires_grad=False),
    'one': torch.ones(1, 1, 1)[:, 0],
  }


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('zipped', [True, False])
def test_state_dicts(zipped, protocol, tmp_path):
  state = collections.OrderedDict(_views())
  for dtype in OLD + (NEW if zipped else ()):
    state[str(dtype)] = _draw(dtype)
  state._metadata = collections.OrderedDict({'': {'version': 1}})
  for content in (state, {'state_dict': state, 'epoch': 3}, {'model': state}):
    path = tmp_path / 'state.pt'
    torch.save(
      content,
      path,
      pickle_protocol=protocol,
      _use_new_zipfile_serialization=zipped,
    )
    theirs = torch.load(path, weights_only=False)
    _check(path, theirs.get('state_dict', theirs.get('model', theirs)))


class Block(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.linear = torch.nn.Linear(4, 6)
    self.norm = torch.nn.BatchNorm1d(6)
    self.register_buffer('ids', torch.arange(3), persistent=False)
    self.scale = torch.nn.Parameter(torch.tensor(2.0))
    self.register_parameter('absent', None)

  def forward(self, x):
    return self.norm(self.linear(x)) * self.scale


class Model(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.blocks = torch.nn.ModuleList([Block(), Block()])
    self.tied = self.blocks[0].linear
    self.head = torch.nn.Sequential(torch.nn.Linear(6, 2, bias=False))

  def forward(self, x):
    return self.head(self.blocks[0](x) + self.blocks[1](x) + self.tied(x))


@pytest.fixture
def model():
  torch.manual_seed(0)
  return Model()


@pytest.mark.parametrize('zipped', [True, False])
def test_training_checkpoints(zipped, model, tmp_path):
  optimizer = torch.optim.Adam(model.parameters())
  model(torch.ones(3, 4)).sum().backward()
  optimizer.step()
  scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
  path = tmp_path / 'checkpoint.pth'
  for weights in (
    {'state_dict': model.state_dict()},
    {'model': model.state_dict()},
    {'model': model},
    {'model_state_dict': {'model': model.state_dict()}},
  ):
    content = {
      'epoch': 3,
      'args': argparse.Namespace(lr=0.1, sizes=(1, 2)),
      'optimizer': optimizer.state_dict(),
      'scheduler': scheduler.state_dict(),
      'rng': [torch.get_rng_state(), np.random.get_state()],
      'best': np.float64(0.5),
      'device': torch.device('cpu'),
      'dtype': torch.bfloat16,
      **weights,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    _check(path, model.state_dict())


@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_modules(zipped, model, tmp_path):
  path = tmp_path / 'model.pt'
  torch.save(model, path, _use_new_zipfile_serialization=zipped)
  _check(path, model.state_dict())


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_modules_of_pickle_dump(protocol, model, tmp_path):
  """As WiSE-FT and FLYP save them, with storages that are shared and cut."""
  model.register_buffer('part', torch.arange(5000.0)[7:4000:3])
  model.extra = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
  model.large = torch.nn.Linear(300, 40)  # of more than one frame
  path = tmp_path / 'checkpoint_1.pt'
  with path.open('wb') as file:
    pickle.dump(model, file, protocol)
  _check(path, model.state_dict())


@pytest.mark.parametrize('how', ['script', 'trace'])
def test_torchscript(how, model, tmp_path):
  model.half() if how == 'script' else model.eval()
  made = (
    torch.jit.script(model)
    if how == 'script'
    else torch.jit.trace(model, torch.ones(3, 4))
  )
  path = tmp_path / 'model.pt'
  torch.jit.save(made, path)
  state = torch.jit.load(path).state_dict()
  assert state.keys() > {
    'blocks.0.linear.weight',
    'tied.weight',
    'blocks.1.ids',
  }
  _check(path, state)


class Writer(torch.nn.Module):
  """A scripted module that creates a file when it is loaded."""

  def __init__(self, path: str):
    super().__init__()
    self.path = path
    self.weight = torch.nn.Parameter(torch.ones(2))

  def forward(self, x):
    return x

  @torch.jit.export
  def __getstate__(self):
    return (self.path, self.weight, self.training)

  @torch.jit.export
  def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
    self.path = state[0]
    self.weight = state[1] + torch.from_file(state[0], True, 2)
    self.training = state[2]


def test_torchscript_that_acts(tmp_path):
  acted, path = tmp_path / 'acted', tmp_path / 'model.pt'
  torch.jit.save(torch.jit.script(Writer(str(acted))), path)
  with pytest.raises(ValueError, match=r'is made by __torch__\..*Writer'):
    torch_lib.read(path)
  assert not acted.exists()
  torch.jit.load(path)  # so it would be
  assert acted.exists()


class Tagged(torch.Tensor):
  """A subclass of tensors."""


def test_subclasses_of_tensors(tmp_path):
  path = tmp_path / 'state.pt'
  tagged = _draw(torch.float32).as_subclass(Tagged)
  parameter = torch.nn.Parameter(_draw(torch.float32))
  parameter.note = 'kept by torch'
  torch.save({'tagged': tagged, 'parameter': parameter}, path)
  _check(
    path, {'tagged': tagged.as_subclass(torch.Tensor), 'parameter': parameter}
  )


@pytest.mark.parametrize(
  ('make', 'name'),
  [
    (lambda x: x.to_sparse(), '_rebuild_sparse_tensor'),
    (lambda x: x.to('meta'), '_rebuild_meta_tensor_no_storage'),
    (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 'qtensor'),
    (lambda x: torch.complex(x, x).conj(), '_rebuild_tensor_v2'),
    (lambda x: torch.nested.nested_tensor([x, x]), '_rebuild_nested_tensor'),
  ],
)
def test_tensors_that_are_not_dense(make, name, tmp_path):
  path = tmp_path / 'state.pt'
  torch.save({'w': make(_draw(torch.float32))}, path)
  with pytest.raises(
    ValueError, match=rf'w is made by torch\._utils\..*{name}'
  ):
    torch_lib.read(path)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('form', ['zip', 'legacy', 'sharded'])
def test_merges_are_those_of_safetensors(form, dtype, tmp_path):
  torch.manual_seed(0)
  anchor = {'a': torch.randn(40, 8), 'b': torch.randn(8, 8), 'c': torch.ones(9)}
  states = [anchor] + [
    {name: x + 0.1 * torch.randn_like(x) for name, x in anchor.items()}
    for _ in range(2)
  ]
  paths, copies = [], []
  for number, state in enumerate(states):
    state = {name: x.to(dtype) for name, x in state.items()}
    paths.append(tmp_path / f'{number}.safetensors')
    safetensors.torch.save_file(state, paths[-1], {'format': 'pt'})
    copies.append(tmp_path / f'{number}.pt')
    if form == 'sharded':
      copies[-1] = tmp_path / f'{number}'
      copies[-1].mkdir()
      names = {name: f'pytorch_model-{name}.bin' for name in state}
      for name, file in names.items():
        torch.save({name: state[name]}, copies[-1] / file)
      index = copies[-1] / 'pytorch_model.bin.index.json'
      index.write_text(json.dumps({'weight_map': names}))
    else:
      # A transposed one is written as its elements in order.
      state['b'] = state['b'].T.contiguous().T
      zipped = form == 'zip'
      torch.save(state, copies[-1], _use_new_zipfile_serialization=zipped)
  outputs = [tmp_path / f'{name}.safetensors' for name in ('one', 'two')]
  files.merge(paths[0], paths[1:], outputs[0])
  files.merge(copies[0], copies[1:], outputs[1])
  assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_folders_of_transformers(tmp_path):
  """Beside the weights lie pickles that no merge needs."""
  torch.save({'w': torch.ones(2)}, tmp_path / 'pytorch_model.bin')
  for name in ('optimizer.pt', 'scheduler.pt', 'training_args.bin'):
    torch.save(argparse.Namespace(lr=1), tmp_path / name)
  actual = detect.read(tmp_path)
  assert actual.kind == 'folder'
  assert list(actual.tensors) == ['w']
