"""Endless batches of drawn characters, made to look like the real digits."""

from typing import Any

import numpy as np
from scipy import ndimage

from modelstock_jax.data import pipeline
from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources

_SIDE = 32  # of the glyphs, pixels
_BLOCK = 4  # a pixel of a batch is the mean of 4x4 of them
_MARGIN = 1  # of black around a glyph, where places outside it fall

# Ranges of the uniform draws; lengths in pixels of the 32x32 glyph.
_ANGLE = np.deg2rad(15)
_HEIGHT = (0.9, 1.15)
_WIDTH = (0.6, 1.05)
_SLANT = 0.3
_MOVE = 1.5
_ELASTIC = 2.0  # of each node's move, standard deviation
_NODES = 5  # per side, of the grid of elastic moves
_GAIN = (0.9, 1.4)  # above 1 the core of a stroke saturates, as real ones do
_NOISE = 0.03  # standard deviation, of the full range


def glyph_batches(*, batch_size: int, seed: int) -> pipeline.Batches:
  """Draw characters, each turned, scaled, slanted, moved, bent and inked.

  The deformed 32x32 glyph is averaged in blocks of 4x4 to 8x8 pixels, which is
  how the real digits were made from bitmaps of that size.

  Args:
    batch_size: B.
    seed: with the number of a batch, all that the batch depends on.

  Returns:
    An endless iterator of `dict(image=uint8[B, 8, 8, 1], label=int32[B])`, the
    labels those of the data set `glyphs`; `close()` ends its thread.

  Raises:
    ValueError: the seed is negative, or the size is less than 1.

  >>> batches = glyph_batches(batch_size=4, seed=0)
  >>> {name: array.shape for name, array in next(batches).items()}
  {'image': (4, 8, 8, 1), 'label': (4,)}
  >>> batches.close()
  """
  if batch_size < 1 or seed < 0:
    raise ValueError(
      f'batch_size={batch_size} must be at least 1, seed={seed} at least 0.'
    )
  glyphs, labels = _load()

  def batch(number: int, pool: Any) -> pipeline.Batch:
    del pool  # drawing is fast
    rng = np.random.default_rng((seed, number))
    chosen = rng.integers(len(labels), size=batch_size)
    weight = rng.integers(len(glyphs), size=batch_size)
    # Flat, with the choice of glyph as an offset into one long array.
    first = (weight * len(labels) + chosen) * glyphs[0, 0].size
    ink = _sample(glyphs.reshape(-1), first, _places(batch_size, rng))
    return {'image': _expose(ink, rng), 'label': labels[chosen]}

  return pipeline.Batches(batch, num_threads=1)


def _load() -> tuple[np.ndarray, np.ndarray]:
  """Load all glyphs in two stroke weights.

  Returns:
    `float32[2, n, 34, 34]` in 0..1, with a black margin, and `int32[n]`.
  """
  source = sources.open_source('glyphs', 'train')
  records = [source[index] for index in range(len(source))]
  drawn = np.stack(
    [preprocessing.decode(record['image'])[..., 0] for record in records]
  )
  thick = ndimage.grey_dilation(drawn, size=(1, 2, 2))
  margins = [(0, 0), (0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)]
  glyphs = np.pad(np.stack([drawn, thick]), margins).astype(np.float32) / 255
  labels = np.array([record['label'] for record in records], np.int32)
  return glyphs, labels


def _places(batch_size: int, rng: np.random.Generator) -> np.ndarray:
  """Draw the place in its glyph of each pixel of the result.

  Returns:
    `float32[B, 2, 32, 32]`: rows and columns, relative to the centre.
  """

  def draw(low, high) -> np.ndarray:
    return rng.uniform(low, high, size=batch_size)

  angle, slant = draw(-_ANGLE, _ANGLE), draw(-_SLANT, _SLANT)
  height, width = draw(*_HEIGHT), draw(*_WIDTH)
  cos, sin = np.cos(angle), np.sin(angle)
  # Inverse of (turn after slant after scale), for (row, column) pairs.
  matrix = np.stack(
    [
      np.stack([cos / height, sin / height], -1),
      np.stack([(slant * cos - sin) / width, (slant * sin + cos) / width], -1),
    ],
    axis=1,
  )
  move = rng.uniform(-_MOVE, _MOVE, size=(batch_size, 2, 1, 1))
  bend = rng.normal(0, _ELASTIC, size=(batch_size, 2, _NODES, _NODES))
  grid = np.arange(_SIDE) - (_SIDE - 1) / 2
  rows, columns = np.meshgrid(grid, grid, indexing='ij')
  pixels = np.stack([rows.ravel(), columns.ravel()])
  affine = (matrix @ pixels).reshape(batch_size, 2, _SIDE, _SIDE)
  spread = _spread()
  return (affine + move + spread @ bend @ spread.T).astype(np.float32)


def _spread() -> np.ndarray:
  """Return `float64[32, 5]`: linear weights of the nodes at each pixel."""
  nodes = np.arange(_NODES)
  pixels = np.linspace(0, _NODES - 1, _SIDE)
  return np.maximum(1 - abs(pixels[:, None] - nodes), 0)


def _sample(
  flat: np.ndarray, first: np.ndarray, places: np.ndarray
) -> np.ndarray:
  """Read glyphs between pixels, linearly in both directions.

  Args:
    flat: `float32[...]`, all glyphs with their margins, one after another.
    first: `int[B]`, where each glyph starts.
    places: `float32[B, 2, 32, 32]`, relative to the glyph's centre.

  Returns:
    `float32[B, 32, 32]`.
  """
  side = _SIDE + 2 * _MARGIN
  # The upper bound keeps the neighbour to the right and below inside.
  places = np.clip(places + np.float32((side - 1) / 2), 0, side - 1.001)
  corner = places.astype(np.int32)
  down, right = np.moveaxis(places - corner, 1, 0)
  index = first[:, None, None] + corner[:, 0] * side + corner[:, 1]
  above = flat[index] * (1 - right) + flat[index + 1] * right
  index += side
  below = flat[index] * (1 - right) + flat[index + 1] * right
  return above * (1 - down) + below * down


def _expose(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Average blocks, then draw gain and noise: `uint8[B, 8, 8, 1]`."""
  side = _SIDE // _BLOCK
  blocks = ink.reshape(-1, side, _BLOCK, side, _BLOCK).mean(axis=(2, 4))
  gain = rng.uniform(*_GAIN, size=(len(ink), 1, 1))
  noise = rng.normal(0, _NOISE, size=blocks.shape)
  pixels = np.round(np.clip(blocks * gain + noise, 0, 1) * 255)
  return pixels.astype(np.uint8)[..., None]
