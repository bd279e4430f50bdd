"""Layer and depth of each parameter of a CLIP.

Paths are as in 'image/block_0/attention/query/kernel'.
"""

import re
from typing import Any

from modelstock_jax import merging


def clip_layers(path: str, leaf: Any) -> merging.Layer:
  """Group leaves as the paper does: one cosine for q, k, v together.

  OpenAI's checkpoints hold query, key and value in one tensor and the paper's
  layer is a tensor. Here they are three leaves, so they share a cosine, kernels
  and biases apart. An image tower with a head then has 154 layers (ViT-B/32,
  ViT-B/16) or 298 (ViT-L/14).

  Args:
    path: names of the keys that lead to the leaf, joined by '/'.
    leaf: the parameter; not used.

  Returns:
    The layer, for `model_stock(..., layers=clip_layers)`.

  >>> clip_layers('image/block_0/attention/key/bias', None).group
  'image/block_0/attention/qkv/bias'
  >>> clip_layers('head/kernel', None).group is None
  True
  """
  del leaf
  shared = re.sub('(?<![^/])(query|key|value)(?=/(kernel|bias)$)', 'qkv', path)
  return merging.Layer(group=shared if shared != path else None)


def layer_depth(path: str) -> int | None:
  """Return the index of the block with a parameter; None outside blocks.

  >>> layer_depth('image/block_11/ln_1/scale')
  11
  """
  match = re.search(r'(?:^|/)block_(\d+)/', path)
  return int(match[1]) if match else None
