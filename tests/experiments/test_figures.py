"""The scripts of figures run, at a size that says nothing about merging."""

import json
import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parents[2] / 'experiments'
# Two epochs of five steps: too short to learn much.
SHORT = [
  '--config.train.batch_size=40',
  '--config.train.epochs=2',
  '--config.train.warmup_steps=2',
  '--config.evaluate.every_epochs=1',
  "--config.evaluate.benchmarks=('digits', 'noise')",
]


def _run(script, workdir, *flags):
  """What a script prints."""
  done = subprocess.run(
    [sys.executable, FOLDER / script, f'--workdir={workdir}', *flags, *SHORT],
    # one device, whatever these tests run on
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done


def test_a_figure_trains_what_it_needs_and_the_next_finds_it(tmp_path):
  _run('figure_shell.py', tmp_path, '--seeds=2')
  written = json.loads((tmp_path / 'analysis' / 'shell.json').read_text())
  assert len(written['models']) == 4
  again = _run('figure_consistency.py', tmp_path, '--seeds=2')
  assert 'Going on from' not in again.stderr
  assert (tmp_path / 'plots' / 'consistency.svg').exists()


def test_ablations(tmp_path):
  printed = _run('figure_ablations.py', tmp_path, '--seeds=1').stdout
  found = json.loads((tmp_path / 'analysis' / 'ablations.json').read_text())
  by_name = {
    (row['ablation'], row['setting']): row for row in found['validation']
  }
  assert len(by_name) == 3 + 3 + 4 + 3
  # The same merge stands in three ablations, as the default of each.
  default = by_name['unit', 'layer']['accuracy']['mean']
  assert by_name['number', 2]['accuracy']['mean'] == default
  assert by_name['period', 'end']['accuracy']['mean'] == default
  # What is chosen has the highest mean of both, and only it and the defaults
  # have seen the test set.
  for ablation, setting in found['chosen'].items():
    scores = {
      name: row['accuracy']['mean'] + row['shifts']['mean']
      for (of, name), row in by_name.items()
      if of == ablation
    }
    assert scores[setting] == max(scores.values())
  tested = {(row['ablation'], row['setting']) for row in found['test']}
  defaults = {'layer', 2, 'end', 'keep'}
  assert tested == {
    (ablation, setting)
    for ablation, setting in by_name
    if setting in defaults or found['chosen'][ablation] == setting
  }
  assert printed.count('*') >= 4
