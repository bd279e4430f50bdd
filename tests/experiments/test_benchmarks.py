"""The benchmarks run, at a size that says nothing about speed."""

import json
import math
import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parents[2] / 'experiments' / 'benchmarks'


def _run(script, folder, *flags):
  """What a script prints, and what it writes as JSON."""
  path = folder / 'result.json'
  done = subprocess.run(
    [sys.executable, FOLDER / script, *flags, '--json', path],
    # one device, whatever these tests run on
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, json.loads(path.read_text())


def test_merge(tmp_path):
  flags = ['--sizes', 'tiny', '--dtypes', 'float32', 'bfloat16']
  flags += ['--repeats', '1', '--devices', '2']
  printed, written = _run('merge.py', tmp_path, *flags)
  assert written['setting']['devices'] == 2
  results = written['results']
  assert [r['dtype'] for r in results] == ['float32', 'bfloat16']
  for result in results:
    rows = dict(result['merges'])
    if rows['mergekit'] is None:  # not installed
      del rows['mergekit']
    assert {
      'ours, list',
      'ours, stacked',
      "ours, list, user's jit",
      "ours, stacked, user's jit",
      'ours, sharded',
      "ours, sharded, user's jit",
      'naive jnp, jit',
    } <= set(rows)
    for name, row in rows.items():
      assert all(math.isfinite(x) and x > 0 for x in row.values()), name
      assert f'| tiny, {result["dtype"]} | {name} |' in printed
    # three arrays are read, and read again, and one is written
    size = {'float32': 4, 'bfloat16': 2}[result['dtype']]
    assert result['bytes_moved'] == 7 * size * result['parameters']


def test_merge_of_some_rows(tmp_path):
  flags = ['--sizes', 'tiny', '--dtypes', 'bfloat16', '--repeats', '1']
  flags += ['--devices', '2', '--rows', 'list']
  _, written = _run('merge.py', tmp_path, *flags)
  (result,) = written['results']
  assert set(result['merges']) == {'ours, list', "ours, list, user's jit"}
