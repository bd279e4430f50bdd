"""`import modelstock_jax` brings jax and the merge, nothing else."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = {
  'array_record',
  'equinox',
  'flax',
  'grain',
  'ml_collections',
  'optax',
  'orbax',
  'pydantic',
  'sklearn',
  'tensorflow',
  'tensorflow_datasets',
  'torch',
}


def _loaded_by(statement):
  """Top-level names of the modules loaded in a process of its own."""
  program = f'{statement}\nimport sys\nprint(*sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    check=True,
    cwd=ROOT,
    text=True,
  )
  return {name.split('.')[0] for name in done.stdout.split()}


def test_import_loads_the_merge_only():
  loaded = _loaded_by('import modelstock_jax as ms; ms.model_stock')
  assert {'jax', 'modelstock_jax'} <= loaded
  assert not loaded & HEAVY


@pytest.mark.parametrize(
  'module', ['modelstock_jax.clip', 'modelstock_jax.data']
)
def test_reading_needs_no_tensorflow(module):
  assert not _loaded_by(f'import {module}') & {'tensorflow', 'torch'}


@pytest.mark.parametrize(
  'statement',
  [
    'import modelstock_jax',
    'import modelstock_jax as ms; ms.StockOptions()',
    'import modelstock_jax.merging.options',
    'import modelstock_jax.files',
  ],
)
def test_options_and_files_need_no_jax(statement):
  assert 'jax' not in _loaded_by(statement)


def test_the_command_sets_the_threads_of_numpy():
  """Which numpy reads when it is imported, so that none may do so before."""
  imported = 'import os\nfrom modelstock_jax.cli import main\n'
  assert 'numpy' not in _loaded_by(imported)
  run = "try: main.main(['merge', '-h'])\nexcept SystemExit: pass\n"
  # Prints it among the names of modules.
  threads = "print('THREADS', os.environ['OPENBLAS_NUM_THREADS'])"
  assert {'THREADS', '1'} <= _loaded_by(imported + run + threads)
