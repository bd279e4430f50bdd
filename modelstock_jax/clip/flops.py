"""Floating-point operations (FLOPs) of the networks, by formula.

They are those of matrix products and attention, where a multiplication and an
addition count as two. Operations by element, and what the backward pass
computes again, do not count: so the share of the peak (MFU) compares between
programs.
"""

from modelstock_jax.clip import config as clip_config


def forward(config: clip_config.CLIPConfig, num_classes: int) -> int:
  """Return the FLOPs of the classifier (`clip.classifier`) on one image.

  With T tokens, width W, L blocks, patches of p x p pixels of C channels, an
  embedding of E features and K classes:

    2 (T - 1) p^2 C W + L (24 T W^2 + 4 T^2 W) + 2 W E + 2 E K

  24 T W^2 is four products of W x W (query, key, value, out) and two of
  W x 4 W (the MLP); 4 T^2 W is scores and weighted values.

  Args:
    config: the sizes; the text tower is not used.
    num_classes: number K of classes.

  Returns:
    Floating-point operations of one image; B images take B times as many.

  >>> from modelstock_jax import clip
  >>> forward(clip.SIZES['ViT-B/32'], 1000) / 1e9
  8.81864704
  """
  vision = config.vision
  tokens, width = vision.tokens, vision.width
  block = 24 * tokens * width**2 + 4 * tokens**2 * width
  return (
    _patches(config)
    + vision.depth * block
    + 2 * width * config.embed_dim
    + 2 * config.embed_dim * num_classes
  )


def train(config: clip_config.CLIPConfig, num_classes: int) -> int:
  """Return the FLOPs of the forward and backward pass on one image.

  Every product has two gradients of the same size, except for that of the
  patches: images have no gradient.

  >>> from modelstock_jax import clip
  >>> train(clip.SIZES['ViT-B/32'], 1000) / 1e9
  26.224730112
  """
  return 3 * forward(config, num_classes) - _patches(config)


def _patches(config: clip_config.CLIPConfig) -> int:
  """Return 2 (T - 1) p^2 C W, the FLOPs of the embedding of the patches."""
  vision = config.vision
  pixels = vision.patch_size**2 * vision.channels
  return 2 * (vision.tokens - 1) * pixels * vision.width
