"""The examples run, and print what their weights say.

What they merge is merged again in float64 from the paper's formula, and what
they print is computed again in numpy from the weights of their `main()`.
"""

import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets

FOLDER = pathlib.Path(__file__).parents[2] / 'docs' / 'examples'
# A program that runs the example and keeps the arrays of what it returns.
KEEP = """
import pickle, runpy, sys
import jax, numpy
trees = runpy.run_path(sys.argv[1])['main']()
arrays = [
  [numpy.asarray(x) for x in jax.tree.leaves(tree) if hasattr(x, 'dtype')]
  for tree in trees
]
with open(sys.argv[2], 'wb') as file:
  pickle.dump(arrays, file)
"""


def _bias_first(b0, w0, b1, w1):
  return (w0, b0), (w1, b1)


# From the leaves of a tree, in jax's order, to layers: ((w, b), (w, b)).
LAYERS = {
  'linen.py': _bias_first,
  'nnx.py': _bias_first,
  'equinox_loop.py': lambda w0, b0, w1, b1: ((w0.T, b0), (w1.T, b1)),
  'haiku_loop.py': _bias_first,
  'optax_loop.py': lambda v, w: ((w, 0.0), (v, 0.0)),
}


def _merge(anchor, models):
  """Equation 3 of one leaf for two models, in float64."""
  left, right = (model - anchor for model in models)
  norms = np.linalg.norm(left) * np.linalg.norm(right)
  cosine = np.clip(np.sum(left * right) / norms, 0, 1)
  t = 2 * cosine / (1 + cosine)
  return t * models.mean(axis=0) + (1 - t) * anchor


def _accuracy(layers):
  (w0, b0), (w1, b1) = layers
  digits = datasets.load_digits()
  hidden = np.maximum(digits.data[1200:] / 16 @ w0 + b0, 0)
  answers = (hidden @ w1 + b1).argmax(axis=-1)
  return np.mean(answers == digits.target[1200:])


def test_every_library_has_an_example():
  names = {path.name for path in FOLDER.glob('*.py')}
  # Those that train by the library's trainer: test_own_network.py.
  assert {name for name in names if not name.startswith('train_')} == set(
    LAYERS
  )


@pytest.mark.parametrize('name', LAYERS)
def test_examples_are_short_programs(name):
  text = (FOLDER / name).read_text('utf-8')
  assert len(text.splitlines()) < 60
  assert text.endswith("\n\nif __name__ == '__main__':\n  main()\n")


@pytest.mark.parametrize('name', LAYERS)
def test_example(name, tmp_path):
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', KEEP, FOLDER / name, tmp_path / 'w'],
    env={
      **os.environ,
      'JAX_NUM_CPU_DEVICES': '1',
    },  # one device, as most readers have
    capture_output=True,
    check=False,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  anchor, stack, merged = pickle.loads((tmp_path / 'w').read_bytes())

  for a, models, got in zip(anchor, stack, merged, strict=True):
    assert models.shape == (2, *a.shape)
    assert (models[0] != models[1]).any()
    expected = _merge(a.astype(float), models.astype(float))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

  accuracy = {
    model: _accuracy(LAYERS[name](*leaves))
    for model, leaves in {
      'anchor': anchor,
      'single': [models[0] for models in stack],
      'average': [models.mean(axis=0) for models in stack],
      'merge': merged,
    }.items()
  }
  assert done.stdout.splitlines() == [
    f'{model}: {value:.1%}' for model, value in accuracy.items()
  ]
  # Five times as many digits teach more; the anchor itself knows most of them.
  assert accuracy['anchor'] > 0.7
  for model in ('single', 'average', 'merge'):
    assert accuracy[model] > accuracy['anchor']
