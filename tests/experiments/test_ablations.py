"""The ablations run, at a size that says nothing about merging."""

import json

import jax

from experiments.geometry import ablations


def test_ablations(tmp_path, geometry_flags, monkeypatch, capsys):
  devices = jax.devices()[:1]  # eight cost time to compile for
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  arguments = ['ablations', f'--workdir={tmp_path}', '--seeds=1']
  monkeypatch.setattr('sys.argv', [*arguments, *geometry_flags()])
  ablations.main()
  printed = capsys.readouterr().out
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
