"""Sizes, weights and inputs that the tests against foreign CLIPs share."""

import contextlib
import importlib.metadata
import importlib.util
import pathlib
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import pytest


class Size(NamedTuple):
  """A CLIP in plain numbers; every head has 64 features, as OpenAI's have."""

  embed_dim: int
  image_size: int
  patch_size: int
  width: int
  depth: int
  text_width: int
  text_depth: int = 12
  context_length: int = 77
  vocab_size: int = 49408

  @property
  def heads(self) -> int:
    return self.width // 64

  @property
  def text_heads(self) -> int:
    return self.text_width // 64


# Table 20 of the CLIP paper (arXiv:2103.00020). In the tiny one all sizes
# differ, so that no axis passes for another.
SIZES = {
  'tiny': Size(24, 32, 8, 128, 2, 192, 3, 12, 99),
  'ViT-B/32': Size(512, 224, 32, 768, 12, 512),
  'ViT-B/16': Size(512, 224, 16, 768, 12, 512),
  'ViT-L/14': Size(768, 224, 14, 1024, 24, 768),
}


@pytest.fixture(scope='module', autouse=True)
def optimize(optimized):
  """Parity is promised of the programs that users get."""


@pytest.fixture(scope='session')
def sizes():
  return SIZES


@pytest.fixture(scope='session')
def openai():
  """The file clip/model.py; the package around it needs torchvision."""
  files = importlib.metadata.files('clip-anytorch') or []
  [path] = [file for file in files if str(file) == 'clip/model.py']
  spec = importlib.util.spec_from_file_location('openai_clip', path.locate())
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='session')
def undrawn():
  """A context in which torch draws no weights: of models that are filled."""
  import torch

  # MultiheadAttention has imported some by their names.
  modules = torch.nn.init, torch.nn.modules.activation

  @contextlib.contextmanager
  def skip():
    with pytest.MonkeyPatch.context() as patch:
      for module in modules:
        for name in dir(module):
          if name.endswith('_') and not name.startswith('_'):
            patch.setattr(module, name, lambda tensor, *_, **__: tensor)
      yield

  return skip


@pytest.fixture(scope='session')
def create_openai(openai, undrawn):
  """Creates OpenAI's model of a `Size`, to be filled."""

  def create(size):
    with undrawn():
      return openai.CLIP(
        embed_dim=size.embed_dim,
        image_resolution=size.image_size,
        vision_layers=size.depth,
        vision_width=size.width,
        vision_patch_size=size.patch_size,
        context_length=size.context_length,
        vocab_size=size.vocab_size,
        transformer_width=size.text_width,
        transformer_heads=size.text_heads,
        transformer_layers=size.text_depth,
      )

  return create


@pytest.fixture
def tmp_path():
  """A folder that goes with the test: pytest keeps those of three runs."""
  with tempfile.TemporaryDirectory() as folder:
    yield pathlib.Path(folder)


@pytest.fixture(scope='session')
def spread():
  """Fills a torch module: no bias stays 0, no scale 1, no attention uniform.

  Libraries start biases at 0 and scales at 1, where swapped ones do not show,
  and some start queries and keys so near 0 that swapping them hardly does.
  """
  import torch

  def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for name, leaf in module.named_parameters():
        mean, std = 0.0, 0.1
        if name.endswith('logit_scale'):
          mean = 3.0
        elif leaf.ndim == 1 and name.endswith('weight'):
          mean = 1.0  # the scale of a LayerNorm
        elif leaf.ndim > 1 and 'embedding' not in name:
          # a matrix, which OpenAI keeps [in, out] in 'proj' alone
          turned = name.endswith(('text_projection', 'proj'))
          std = (leaf.shape[0] if turned else leaf[0].numel()) ** -0.5
        elif 'patch' in name:
          std = leaf[0].numel() ** -0.5
        leaf.normal_(mean, std, generator=generator)
    return module.eval()

  return fill


@pytest.fixture(scope='session')
def inputs():
  """Images float32[2, Y, X, 3], tokens int32[5, 3, context] of a size.

  Tokens are start, ids, end, zeros: 5 classes of 3 descriptions each. No id
  before the end is 0, which some text towers take for padding.
  """

  def draw(size, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, size.image_size, size.image_size, 3)
    images = rng.normal(size=shape).astype(np.float32)
    length, end = size.context_length, size.vocab_size - 1
    tokens = rng.integers(1, end - 1, (5, 3, length)).astype(np.int32)
    tokens[..., 0] = end - 1
    for text in tokens.reshape(-1, length):
      stop = rng.integers(3, length)
      text[stop:] = 0
      text[stop] = end
    return images, tokens

  return draw


@pytest.fixture(scope='session')
def close():
  """Asserts a bound on the max abs difference, and prints what it was."""

  def check(label, got, expected, limit):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    difference = float(np.max(np.abs(got - expected)))
    rms = float(np.sqrt(np.mean(np.square(expected))))
    print(f'{label}: max abs difference {difference:.2e}, rms {rms:.2f}')
    # a bound on nearly nothing, or on equal rows, would say nothing
    assert rms > 0.1
    assert np.max(np.std(expected, axis=0)) > 0.01
    assert difference < limit

  return check


@pytest.fixture(scope='session')
def same_bits():
  """Asserts that two trees are float32 and equal bit for bit."""

  def check(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    leaves = zip(
      jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    )
    for (path, a), b in leaves:
      assert a.dtype == b.dtype == np.float32, path
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path

  return check
