"""Runs of one model, at every command."""

import json
import pathlib

import pytest

from modelstock_jax.cli import main

pytestmark = pytest.mark.usefixtures('two_devices')

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.fixture(scope='module')
def of_one(tmp_path_factory, two_devices, one_epoch):
  """A run of one model."""
  workdir = tmp_path_factory.mktemp('one')
  config = f'--config={CONFIGS}/digits_fine_tuned.py'
  one = '--config.merge.num_models=1'
  arguments = ['train', config, f'--workdir={workdir}', one, *one_epoch]
  assert main.main(arguments) == 0
  return workdir


def test_one_model_is_reported_as_fine_tuned(of_one):
  arguments = ['evaluate', f'--workdir={of_one}', '--benchmarks=noise']
  assert main.main(arguments) == 0
  rows = json.loads((of_one / 'results.json').read_text('utf-8'))
  assert 'fine_tuned' in json.dumps(rows)
  assert 'model_stock' not in json.dumps(rows)
  assert main.main(['report', f'--workdir={of_one}']) == 0
  page = (of_one / 'report.html').read_text('utf-8')
  assert 'Fine-tuned' in page
  assert 'Merged once' not in page


def test_one_model_is_converted_without_a_merge(of_one, tmp_path):
  out = tmp_path / 'out'
  arguments = ['convert', str(of_one), str(out), '--format=huggingface']
  assert main.main(arguments) == 0
  card = (out / 'README.md').read_text('utf-8')
  assert 'The merge by layer' not in card
