"""OpenAI's archives, made by OpenAI's own code, and the paper's layers.

The archives are genuine TorchScript: OpenAI's model, its weights in float16
by OpenAI's `convert_weights`, traced and saved with `torch.jit.save`. What
they compute is taken from OpenAI's `build_model`, its weights upcast, which is
how OpenAI loads an archive on a CPU.
"""

import warnings

import jax
import numpy as np
import pytest
import torch

import modelstock_jax as ms
from modelstock_jax import clip

pytestmark = pytest.mark.oracle
CONSTANTS = {'input_resolution', 'context_length', 'vocab_size'}


def _archive(model, size, path):
  """Writes a model as OpenAI did: a program and three constants beside it."""
  for name in ('context_length', 'vocab_size'):
    value = getattr(model, name)
    delattr(model, name)
    model.register_buffer(name, torch.tensor(value))
  model.register_buffer('input_resolution', torch.tensor(size.image_size))
  images = torch.zeros(1, 3, size.image_size, size.image_size)
  tokens = torch.zeros(1, size.context_length, dtype=torch.long)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # torch is moving on from TorchScript
    traced = torch.jit.trace_module(
      model.eval(),
      {'encode_image': images, 'encode_text': tokens},
      check_trace=False,
    )
    torch.jit.save(traced, path)


def _state(path):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return torch.jit.load(path, map_location='cpu').state_dict()


@pytest.mark.parametrize(
  ('name', 'half'), [('tiny', True), ('tiny', False), ('ViT-B/32', True)]
)
def test_archive(
  openai, create_openai, sizes, spread, inputs, close, tmp_path, name, half
):
  size = sizes[name]
  model = spread(create_openai(size))
  if half:
    openai.convert_weights(model)
  path = tmp_path / 'clip.pt'
  _archive(model, size, path)
  del model
  state = _state(path)
  assert state.keys() > CONSTANTS
  kernel = state['visual.conv1.weight']
  assert kernel.dtype == (torch.float16 if half else torch.float32)

  loaded, params = clip.load_pretrained(path)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  got = np.asarray(params['image']['patch_embedding']['kernel'])
  # [out, channels, y, x] there, [y x channels, out] here
  np.testing.assert_array_equal(
    got, kernel.float().numpy().transpose(2, 3, 1, 0).reshape(got.shape)
  )
  if half:
    theirs = openai.build_model(dict(state)).float()
  else:
    # build_model rounds to float16: float32 archives are not OpenAI's
    theirs = create_openai(size).eval()
    for constant in CONSTANTS:
      del state[constant]
    theirs.load_state_dict(state)
  images, tokens = inputs(size)
  tokens = tokens.reshape(15, -1)
  with torch.inference_mode():
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    image = theirs.encode_image(pixels)
    text = theirs.encode_text(torch.from_numpy(tokens).long())
  label = f'{name}, float{16 if half else 32} archive'
  got = jax.jit(loaded.encode_image)(params, images)
  close(f'{label}: image embeddings', got, image, 1e-5)
  got = jax.jit(loaded.encode_text)(params, tokens)
  close(f'{label}: text embeddings', got, text, 1e-5)


def test_state_dict_in_a_zip(create_openai, sizes, spread, same_bits, tmp_path):
  size = sizes['tiny']
  model = spread(create_openai(size)).half()
  torch.save(model.state_dict(), tmp_path / 'state.pt')
  _archive(model.float(), size, tmp_path / 'archive.pt')
  archive = clip.load_pretrained(tmp_path / 'archive.pt')
  path = tmp_path / 'state.pt'
  state = clip.load_pretrained(path, activation='quick_gelu')
  same_bits(state.params, archive.params)
  assert state.model.config == archive.model.config


def _tower(state):
  """The tensors that the paper merges: the image tower's."""
  return {key: x for key, x in state.items() if key.startswith('visual.')}


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('ViT-B/32', 154), ('ViT-B/16', 154), ('ViT-L/14', 298)],
)
def test_layers_of_the_paper(create_openai, sizes, name, expected):
  # The tensors of OpenAI's image tower, the kernel and the bias of the head.
  with torch.device('meta'):
    state = create_openai(sizes[name]).state_dict()
  assert len(_tower(state)) + 2 == expected
  model = clip.classifier(clip.SIZES[name], num_classes=10)
  params = jax.eval_shape(model.init, jax.random.key(0))
  layers = set()
  for path, leaf in jax.tree.leaves_with_path(params):
    path = '/'.join(key.key for key in path)
    layers.add(clip.clip_layers(path, leaf).group or path)
  assert len(layers) == expected


def _cosine(w0, w1, w2):
  """Between the displacements of one tensor, in float64."""
  d1, d2 = (w.astype(np.float64) - w0.astype(np.float64) for w in (w1, w2))
  return np.sum(d1 * d2) / np.sqrt(np.sum(d1 * d1) * np.sum(d2 * d2))


def _layer(path):
  """Return OpenAI's name of a leaf of our image tower."""
  names = {
    'class_embedding': 'class_embedding',
    'positional_embedding': 'positional_embedding',
    'patch_embedding/kernel': 'conv1.weight',
    'projection/kernel': 'proj',
    'ln_pre/scale': 'ln_pre.weight',
    'ln_pre/bias': 'ln_pre.bias',
    'ln_post/scale': 'ln_post.weight',
    'ln_post/bias': 'ln_post.bias',
  }
  if path in names:
    return f'visual.{names[path]}'
  block, *rest = path.split('/')
  start = f'visual.transformer.resblocks.{block.removeprefix("block_")}'
  if rest[0] == 'attention' and rest[1] != 'out':
    kind = {'kernel': 'weight', 'bias': 'bias'}[rest[2]]
    return f'{start}.attn.in_proj_{kind}'
  inner = {
    'attention/out': 'attn.out_proj',
    'mlp/fc': 'mlp.c_fc',
    'mlp/proj': 'mlp.c_proj',
    'ln_1': 'ln_1',
    'ln_2': 'ln_2',
  }['/'.join(rest[:-1])]
  kind = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}[rest[-1]]
  return f'{start}.{inner}.{kind}'


def test_cosines_are_those_of_the_fused_tensors(
  create_openai, sizes, spread, tmp_path
):
  # Displacements of 0.1 of the weights, some 60 degrees apart, the angle
  # another for q, k and v: only the tensor as a whole has the right one.
  size = sizes['tiny']
  states = [
    {key: x.numpy() for key, x in _tower(model.state_dict()).items()}
    for model in (spread(create_openai(size), seed) for seed in range(4))
  ]
  rng = np.random.default_rng(0)
  heads = [rng.normal(size=(size.embed_dim, 7)) for _ in range(4)]
  w0, shared, *individual = states
  family, head_family = [w0], [heads[0]]
  for other, head in zip(individual, heads[2:], strict=True):
    moved = {}
    for key, anchor in w0.items():
      mine = other[key].copy()
      if 'in_proj' in key:
        thirds = np.split(mine, 3)
        mine = np.concatenate([0.2 * thirds[0], thirds[1], 3 * thirds[2]])
      moved[key] = anchor + np.float32(0.1) * (shared[key] + mine)
    family.append(moved)
    head_family.append(heads[0] + 0.1 * (heads[1] + head))

  trees = []
  for i, (state, head) in enumerate(zip(family, head_family, strict=True)):
    path = tmp_path / f'w{i}.npy'
    np.save(path, np.array(state), allow_pickle=True)
    params = clip.load_pretrained(path, allow_pickle=True).params
    kernel = head.astype(np.float32)
    bias = np.asarray(head[0], np.float32)
    head = {
      'kernel': jax.numpy.asarray(kernel),
      'bias': jax.numpy.asarray(bias),
    }
    trees.append({'image': params['image'], 'head': head})

  merged = ms.model_stock(trees[0], trees[1:], layers=clip.clip_layers)
  expected = {key: _cosine(*(state[key] for state in family)) for key in w0}
  apart, worst, seen = [], 0.0, set()
  for path, cosine in jax.tree.leaves_with_path(merged.cosine['image']):
    path = '/'.join(key.key for key in path)
    key = _layer(path)
    seen.add(key)
    worst = max(worst, abs(float(cosine) - expected[key]))
    if path.endswith('query/kernel'):
      query, key_, value = zip(
        *(np.split(state[key], 3) for state in family), strict=True
      )
      apart += [abs(_cosine(*x) - expected[key]) for x in (query, key_, value)]
  assert seen == w0.keys()
  print(f'cosines: max abs difference {worst:.2e}')
  assert worst < 1e-6
  assert max(apart) > 0.1  # q, k and v each for itself would be wrong
  got = float(merged.cosine['head']['kernel'])
  assert got == pytest.approx(_cosine(*head_family), abs=1e-6)

  # and the merge itself, on the fused tensor: t = 2 cos / (1 + cos)
  block = merged.params['image']['block_0']['attention']
  key = 'visual.transformer.resblocks.0.attn.in_proj_weight'
  fused = np.concatenate(
    [np.asarray(block[part]['kernel']).T for part in ('query', 'key', 'value')]
  )
  t = 2 * expected[key] / (1 + expected[key])
  mean = (family[1][key].astype(np.float64) + family[2][key]) / 2
  np.testing.assert_allclose(
    fused, t * mean + (1 - t) * w0[key], rtol=0, atol=1e-6
  )
