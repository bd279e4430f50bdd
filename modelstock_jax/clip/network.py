"""The two towers of CLIP in Flax Linen.

Pre-norm transformers as in Radford et al., *Learning Transferable Visual Models
From Natural Language Supervision* (arXiv:2103.00020). Parameters are float32;
products run in `dtype`; LayerNorm, softmax and the embeddings in float32.

Axes: B batch, T tokens, W width, H heads, D features of a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelstock_jax.clip import config as clip_config

Dtype = jax.typing.DTypeLike

# What is kept of a block for the backward pass; the rest is computed again.
REMAT = {
  'none': None,  # everything, nothing is computed again
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'block': jax.checkpoint_policies.nothing_saveable,
}


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """Cut images into flat patches, in reading order.

  Patches times a `[p * p * C, W]` kernel are what a convolution of stride p
  gives. Written as a product, because a convolution with per-model kernels
  becomes a grouped convolution under `vmap`.

  Args:
    images: float[B, Y, X, C]; `patch_size` divides Y and X.
    patch_size: height and width p of a patch, in pixels.

  Returns:
    float[B, (Y / p) * (X / p), p * p * C].

  >>> patchify(jnp.zeros((5, 8, 8, 3)), 2).shape
  (5, 16, 12)
  """
  batch, height, width, channels = images.shape
  p = patch_size
  x = images.reshape(batch, height // p, p, width // p, p, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, -1, p * p * channels)


def quick_gelu(x: jax.Array) -> jax.Array:
  """Return CLIP's GELU, x * sigmoid(1.702 x)."""
  return x * jax.nn.sigmoid(1.702 * x)


class LayerNorm(nn.Module):
  """LayerNorm (eps 1e-5) with float32 statistics; the result is in `dtype`."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalise the last axis of `x`."""
    ones = (1,) * (x.ndim - 1)
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    x = x.astype(jnp.float32)
    # Two passes: E[x^2] - E[x]^2 loses the digits that a large mean takes.
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-5)
    x = x * scale.reshape(*ones, -1) + bias.reshape(*ones, -1)
    return x.astype(self.dtype)


class Attention(nn.Module):
  """Multi-head self-attention.

  Query, key and value are three products: fusing them was within the noise on
  CPU, and three kernels are what other CLIP code stores in Flax.
  """

  heads: int
  causal: bool
  out_std: float
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map [B, T, W] to [B, T, W]."""
    batch, tokens, width = x.shape
    split = (batch, tokens, self.heads, width // self.heads)
    std = width**-0.5
    query = _dense(width, std, self.dtype, 'query')(x).reshape(split)
    key = _dense(width, std, self.dtype, 'key')(x).reshape(split)
    value = _dense(width, std, self.dtype, 'value')(x).reshape(split)

    scores = jnp.einsum(
      'bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32
    )
    scores = scores * split[-1] ** -0.5
    if self.causal:
      mask = jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))
      scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    x = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    x = x.reshape(batch, tokens, width)
    return _dense(width, self.out_std, self.dtype, 'out')(x)


class MLP(nn.Module):
  """Two dense layers, four times as wide in between, with an activation."""

  out_std: float
  activation: str
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map [B, T, W] to [B, T, W]."""
    width = x.shape[-1]
    x = _dense(4 * width, (2 * width) ** -0.5, self.dtype, 'fc')(x)
    if self.activation == 'quick_gelu':
      x = quick_gelu(x)
    else:
      x = jax.nn.gelu(x, approximate=False)
    return _dense(width, self.out_std, self.dtype, 'proj')(x)


class Block(nn.Module):
  """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

  heads: int
  causal: bool
  out_std: float
  activation: str
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Map [B, T, W] to [B, T, W]."""
    attention = Attention(
      self.heads, self.causal, self.out_std, self.dtype, name='attention'
    )
    mlp = MLP(self.out_std, self.activation, self.dtype, name='mlp')
    x = x + attention(LayerNorm(self.dtype, name='ln_1')(x))
    return x + mlp(LayerNorm(self.dtype, name='ln_2')(x))


class _Tower(nn.Module):
  """Settings of both towers."""

  config: clip_config.CLIPConfig
  dtype: Dtype
  remat: str = 'none'


class VisionTower(_Tower):
  """Images to embeddings: patches, class token, blocks, projection."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Map normalised images, float[B, Y, X, C], to float32[B, embed_dim]."""
    config = self.config.vision
    expected = (config.image_size, config.image_size, config.channels)
    if images.shape[1:] != expected:
      raise ValueError(
        f'images have shape {images.shape}, the tower takes (batch, '
        f'{", ".join(map(str, expected))}). Resize them, or change the config.'
      )
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f'images are {images.dtype}, the tower takes floats. Subtract the mean '
        'and divide by the standard deviation of the pixels first.'
      )
    std = config.width**-0.5
    normal = nn.initializers.normal(std)
    patches = patchify(images.astype(self.dtype), config.patch_size)
    x = nn.Dense(
      config.width,
      use_bias=False,
      dtype=self.dtype,
      # Uniform within +- fan_in**-0.5, as PyTorch starts a convolution.
      kernel_init=nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
      name='patch_embedding',
    )(patches)
    class_embedding = self.param('class_embedding', normal, (config.width,))
    grid = (config.tokens, config.width)
    positions = self.param('positional_embedding', normal, grid)
    first = class_embedding.astype(self.dtype).reshape(1, 1, -1)
    first = jnp.broadcast_to(first, (x.shape[0], 1, config.width))
    x = jnp.concatenate([first, x], axis=1)
    x = x + positions.astype(self.dtype)[None]
    x = LayerNorm(self.dtype, name='ln_pre')(x)
    x = _blocks(self, config, x, causal=False)
    x = LayerNorm(self.dtype, name='ln_post')(x[:, 0])
    return _project(self, std, x)


class TextTower(_Tower):
  """Tokens to embeddings: causal blocks, pooled at the end-of-text token."""

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Map token ids, int[B, T], to float32[B, embed_dim]."""
    config = self.config.text
    assert config is not None  # or there is no text tower
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= config.context_length:
      raise ValueError(
        f'tokens have shape {tokens.shape}, the tower takes (batch, length) '
        f'with length in 1..{config.context_length}. Truncate the texts, or '
        'raise context_length.'
      )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(f'tokens are {tokens.dtype}, the tower takes integers.')
    normal = nn.initializers.normal
    table = (config.vocab_size, config.width)
    embedding = self.param('token_embedding', normal(0.02), table)
    grid = (config.context_length, config.width)
    positions = self.param('positional_embedding', normal(0.01), grid)
    # 'fill' turns an id outside the vocabulary into NaN, not a wrong neighbour.
    x = jnp.take(embedding, tokens, axis=0, mode='fill').astype(self.dtype)
    x = x + positions[: tokens.shape[1]].astype(self.dtype)[None]
    x = _blocks(self, config, x, causal=True)
    # Pool before the norm: it acts on each token alone.
    x = x[jnp.arange(x.shape[0]), tokens.argmax(axis=-1)]
    x = LayerNorm(self.dtype, name='ln_final')(x)
    return _project(self, config.width**-0.5, x)


def _blocks(
  tower: _Tower,
  sizes: clip_config.VisionConfig | clip_config.TextConfig,
  x: jax.Array,
  *,
  causal: bool,
) -> jax.Array:
  # Each block adds two branches to the residual stream: 2 * depth in all.
  out_std = sizes.width**-0.5 * (2 * sizes.depth) ** -0.5
  settings = (sizes.heads, causal, out_std, tower.config.activation)
  block_class = Block
  if tower.remat != 'none':
    block_class = nn.remat(Block, policy=REMAT[tower.remat])
  for i in range(sizes.depth):
    x = block_class(*settings, tower.dtype, name=f'block_{i}')(x)
  return x


def _project(tower: _Tower, std: float, x: jax.Array) -> jax.Array:
  size, dtype = tower.config.embed_dim, tower.dtype
  x = _dense(size, std, dtype, 'projection', use_bias=False)(x)
  return x.astype(jnp.float32)


def _dense(
  features: int, std: float, dtype: Dtype, name: str, use_bias: bool = True
) -> nn.Dense:
  init = nn.initializers.normal(std)
  return nn.Dense(features, use_bias, dtype, kernel_init=init, name=name)
