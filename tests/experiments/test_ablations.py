"""The ablations run, at a size that says nothing about merging."""

import jax
import numpy as np

from experiments.geometry import ablations


def test_ablations(tmp_path, geometry_flags, monkeypatch, capsys):
  devices = jax.devices()[:1]  # eight cost time to compile for
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  measured, measure = [], ablations.measure

  def recorded(setup, models, benchmarks):
    measured.append(measure(setup, models, benchmarks))
    return measured[-1]

  monkeypatch.setattr(ablations, 'measure', recorded)
  arguments = ['ablations', f'--workdir={tmp_path}', '--seeds=4']
  monkeypatch.setattr('sys.argv', [*arguments, *geometry_flags()])
  ablations.main()
  validation, test = measured
  assert len(validation) == 3 + 3 + 2
  # The same merge stands in three ablations, as the default of each.
  default = validation['unit', 'layer']
  assert default.shape == (2, 2)  # both accuracies, of twice two seeds
  np.testing.assert_array_equal(validation['number', 2], default)
  np.testing.assert_array_equal(validation['period', 'end'], default)
  # What is chosen has the highest mean of both, and only it and the defaults
  # have seen the test set.
  expected = {('unit', 'layer'), ('number', 2), ('period', 'end')}
  for ablation in ('unit', 'number', 'period'):
    settings = [key for key in validation if key[0] == ablation]
    expected.add(max(settings, key=lambda key: validation[key].mean()))
  assert set(test) == expected
  assert capsys.readouterr().out.count('*') == 6
