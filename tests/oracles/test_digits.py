"""The bundled data sets against the real TFDS builders, run again."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from modelstock_jax.data import preprocessing
from modelstock_jax.data import sources

SIZES = {
  'digits': {'train': 800, 'validation': 400, 'test': 597},
  'font_digits': {'test': 600},
  'glyphs': {'train': 576},
}


@pytest.mark.oracle
def test_fresh_build_equals_the_committed_files(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.digits.prepare', str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(root)},
    check=False,
  )
  assert done.returncode == 0, done.stderr
  for path in sources.BUNDLED_DIR.rglob('*.*'):
    if path.suffix in ('.json', '.txt'):
      fresh = tmp_path / path.relative_to(sources.BUNDLED_DIR)
      assert fresh.read_bytes() == path.read_bytes(), path
  for dataset, sizes in SIZES.items():
    assert sources.split_sizes(dataset, data_dir=tmp_path) == sizes
    assert sources.split_sizes(dataset) == sizes
    for split in sizes:
      pairs = zip(
        sources.open_source(dataset, split),
        sources.open_source(dataset, split, data_dir=tmp_path),
        strict=True,
      )
      for place, records in enumerate(pairs):
        for record in records:
          # Two PNG libraries may pack the same image differently.
          record['image'] = preprocessing.decode(record['image']).tolist()
        one, other = records
        assert one.keys() == other.keys()
        for name in one:
          same = np.array_equal(one[name], other[name])
          assert same, f'{dataset}/{split}[{place}][{name!r}]'
