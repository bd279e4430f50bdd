import json
import pathlib

import pytest

from modelstock_jax.cli import main
from modelstock_jax.training import config as config_lib

DIGITS = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'


@pytest.fixture
def workdir(tmp_path):
  """Return the workdir of a run that has only logged a step."""
  config = config_lib.load(DIGITS)
  (tmp_path / 'config.json').write_text(config.to_json())
  line = {'step': 1, 'kind': 'train', 'loss': [1.0, 2.0]}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  return tmp_path


def test_writes_the_report_and_says_what_is_missing(workdir, capsys):
  assert main.main(['report', f'--workdir={workdir}']) == 0
  text = (workdir / 'report.html').read_text('utf-8')
  out, err = capsys.readouterr()
  assert out == f'Wrote {workdir / "report.html"}.\n'
  assert 'is not finished: 0 of 30 epochs.' in err
  assert 'is not finished: 0 of 30 epochs.' in text
  assert f'modelstock evaluate --workdir={workdir}' in err


def test_without_a_run(tmp_path, capsys):
  assert main.main(['report', f'--workdir={tmp_path}']) == 1
  assert 'config.json: there is no such file' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_overrides_are_refused(workdir, capsys):
  arguments = ['report', f'--workdir={workdir}', '--config.seed=3']
  assert main.main(arguments) == 1
  error = capsys.readouterr().err
  assert '--config.seed=3: `modelstock report` has no config' in error


def test_damaged_results_are_named(workdir, capsys):
  (workdir / 'results.json').write_text('[{}]')
  assert main.main(['report', f'--workdir={workdir}']) == 1
  assert 'results.json does not hold results' in capsys.readouterr().err
  assert not (workdir / 'report.html').exists()
