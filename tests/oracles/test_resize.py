"""Resized positional embeddings against PyTorch, as open_clip resizes them."""

import numpy as np
import pytest

from modelstock_jax import clip

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize('image_size', [336, 192, 96])
def test_positional_embeddings(image_size, tmp_path):
  import jax
  import torch

  patch, width = 48, 64
  config = clip.CLIPConfig(8, clip.VisionConfig(240, patch, width, 1, 1), None)
  model = clip.create(config)
  params = model.init(jax.random.key(0))
  clip.save_pretrained(params, tmp_path / 'clip', config=config)
  _, found = clip.load_pretrained(tmp_path / 'clip', image_size=image_size)

  table = np.array(params['image']['positional_embedding'])
  grid = torch.from_numpy(table[1:]).reshape(5, 5, width).permute(2, 0, 1)
  size = image_size // patch
  resized = torch.nn.functional.interpolate(
    grid[None], size=(size, size), mode='bicubic', antialias=True
  )
  expected = resized[0].permute(1, 2, 0).reshape(size * size, width).numpy()
  ours = np.asarray(found['image']['positional_embedding'])
  np.testing.assert_array_equal(ours[0], table[0])
  # Values reach 0.5; products are of float32, 16 and more of them a sum.
  np.testing.assert_allclose(ours[1:], expected, rtol=0, atol=5e-7)
