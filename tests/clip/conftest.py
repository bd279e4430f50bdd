import jax
import numpy as np
import pytest

from modelstock_jax import clip


@pytest.fixture(scope='session')
def tiny():
  """Towers whose sizes all differ, so that no axis passes for another."""
  return clip.CLIPConfig(
    embed_dim=10,
    vision=clip.VisionConfig(
      image_size=6, patch_size=2, width=12, depth=2, heads=3, channels=2
    ),
    text=clip.TextConfig(
      context_length=7, vocab_size=19, width=8, depth=2, heads=2
    ),
  )


@pytest.fixture(scope='session')
def randomize():
  """Fills a tree of shapes; no bias stays 0 and no scale 1, as init has it."""

  def fill(abstract, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
      name = path[-1].key
      if name == 'scale':
        value = rng.normal(1, 0.3, leaf.shape)
      elif name == 'kernel':
        value = rng.normal(0, 1, leaf.shape) / leaf.shape[0] ** 0.5
      else:
        value = rng.normal(0, 0.5, leaf.shape)
      return jax.numpy.asarray(value, leaf.dtype)

    return jax.tree.map_with_path(draw, abstract)

  return fill
