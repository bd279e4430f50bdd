"""Arrays, and whether tensors on disk are these arrays."""

import numpy as np
import pytest


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return {
    'a': rng.normal(size=(2, 3)).astype(np.float16),
    'b': rng.normal(size=4).astype(np.float32),
    'scalar': np.array(0.5, np.float32),
  }


@pytest.fixture(scope='session')
def same():
  """Compares tensors with arrays: whole, and through windows."""

  def check(tensors, arrays):
    assert tensors.keys() == arrays.keys()
    for name, expected in arrays.items():
      tensor = tensors[name]
      assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
      assert tensor.load().tobytes() == expected.tobytes()
      middle = tensor.size // 2
      flat = [tensor.read(0, middle), tensor.read(middle, tensor.size)]
      assert np.concatenate(flat).tobytes() == expected.tobytes()

  return check
