"""Layer, kind and depth of each parameter of a CLIP.

Paths are as in 'image/block_0/attention/query/kernel'.
"""

import re
from typing import Any

from modelstock_jax import merging

# The kinds of the paper's figure on angles by layer.
KINDS = ('attention', 'mlp', 'norm', 'bias', 'embedding', 'head')


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
  shared = re.sub(
    r'(^|/)(query|key|value)/(kernel|bias)$',
    r'\1qkv/\3',
    path,
  )
  return merging.Layer(group=shared if shared != path else None)


def layer_kind(path: str) -> str:
  """Return the kind of a parameter, one of `KINDS`.

  Scales and biases of LayerNorm are 'norm'; the biases of attention and MLP are
  'bias'; the projections to the common space, the classification head and the
  temperature are 'head'.

  Args:
    path: names of the keys that lead to the leaf, joined by '/'.

  Raises:
    ValueError: no parameter of our CLIP ends like `path`.

  >>> layer_kind('image/block_0/mlp/fc/kernel')
  'mlp'
  """
  for kind, pattern in _PATTERNS.items():
    if re.search(rf'(^|/)({pattern})$', path):
      return kind
  raise ValueError(
    f'{path!r} is not a parameter of CLIP; expected a path like '
    "'image/block_0/attention/query/kernel'."
  )


def layer_depth(path: str) -> int | None:
  """Return the index of the block with a parameter; None outside blocks.

  >>> layer_depth('image/block_11/ln_1/scale')
  11
  """
  match = re.search(r'(?:^|/)block_(\d+)/', path)
  return int(match[1]) if match else None


_PATTERNS = {
  'norm': r'ln_(1|2|pre|post|final)/(scale|bias)',
  'bias': r'attention/(query|key|value|out)/bias|mlp/(fc|proj)/bias',
  'attention': r'attention/(query|key|value|out)/kernel',
  'mlp': r'mlp/(fc|proj)/kernel',
  'embedding': (r'(class|positional|token)_embedding|patch_embedding/kernel'),
  'head': r'projection/kernel|head/(kernel|bias)|logit_scale',
}
