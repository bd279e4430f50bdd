"""What every test runs under: eight CPU devices, and jax at its strictest."""

import os
import pathlib

# Read by jax when it starts its backend, so set before anyone imports it.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    *os.environ.get('XLA_FLAGS', '').split(),
    '--xla_force_host_platform_device_count=8',
  ]
)

import jax

# No silent float32 of a bfloat16 and a float32, no silent new axes.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

ORACLES = pathlib.Path(__file__).parent / 'oracles'


def pytest_ignore_collect(collection_path, config):
  """Leaves foreign code alone unless it is asked for.

  pytest does not call this for paths given on its command line: both
  `pytest tests/oracles` and `pytest -m oracle` run the oracles, and fail
  where the foreign code is not installed.
  """
  if collection_path == ORACLES and config.option.markexpr != 'oracle':
    return True
  return None
