"""The bundled data sets against the real TFDS builders, run again."""

import os
import pathlib
import subprocess
import sys

import pytest

from modelstock_jax.data import sources


@pytest.mark.oracle
def test_fresh_build_equals_the_committed_files(tmp_path):
  command = [sys.executable, '-m', 'experiments.digits.prepare']
  root = pathlib.Path(__file__).parents[2]
  environment = {**os.environ, 'PYTHONPATH': str(root)}
  for arguments in ([sources.BUNDLED_DIR, '--check'], [tmp_path]):
    done = subprocess.run(
      [*command, *map(str, arguments)],
      capture_output=True,
      text=True,
      timeout=300,
      cwd=tmp_path,
      env=environment,
      check=False,
    )
    assert done.returncode == 0, done.stderr
  assert sources.split_sizes('font_digits', data_dir=tmp_path) == {'test': 600}
