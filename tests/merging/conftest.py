"""A float64 merge of one layer, written from the paper's formulas."""

import itertools

import jax
import numpy as np
import pytest


def _merge_layer(anchor, models, *, average='cosine', clip=True, strength=1.0):
  """One layer, whatever its shape, in float64: (w_H, cosine, t).

  cosine: mean over pairs of d_i.d_j / (|d_i| |d_j|), or the cosine of the
  mean angle; t = N cos / (1 + (N - 1) cos); w_H = t mean + (1 - t) anchor.
  """
  anchor = np.asarray(anchor, np.float64)
  models = [np.asarray(model, np.float64) for model in models]
  steps = [(model - anchor).ravel() for model in models]
  cosines = []
  for left, right in itertools.combinations(steps, 2):
    length = np.linalg.norm(left) * np.linalg.norm(right)
    cosines.append(left @ right / length if length else 0.0)
  if average == 'angle':
    cosine = np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1))))
  else:
    cosine = np.mean(cosines)
  N = len(models)
  used = np.clip(cosine, 0, 1) if clip else cosine
  t = strength * N * used / (1 + (N - 1) * used)
  return t * np.mean(models, axis=0) + (1 - t) * anchor, cosine, t


@pytest.fixture(scope='session')
def merge_layer():
  return _merge_layer


def _make_family(shapes, num_models=2, *, agreement=0.5, seed=0, scale=0.1):
  """An anchor and models with cosines near `agreement`, float32 numpy.

  A displacement is sqrt(agreement) of what is common to all models and
  sqrt(1 - agreement) of its own.
  """
  rng = np.random.default_rng(seed)

  def draw(shape):
    anchor = rng.normal(size=shape)
    common = rng.normal(size=shape) * agreement**0.5
    individual = rng.normal(size=(num_models, *shape)) * (1 - agreement) ** 0.5
    models = anchor + scale * (common + individual)
    return anchor.astype(np.float32), models.astype(np.float32)

  leaves = {name: draw(shape) for name, shape in shapes.items()}
  anchor = {name: leaf for name, (leaf, _) in leaves.items()}
  models = [
    {name: models[i] for name, (_, models) in leaves.items()}
    for i in range(num_models)
  ]
  return anchor, models


@pytest.fixture(scope='session')
def make_family():
  return _make_family


@pytest.fixture
def x64():
  """Lets a test use float64."""
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)
