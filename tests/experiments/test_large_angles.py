"""The search for a setting with large angles, at a size that says nothing."""

import types

import jax
import numpy as np
import pytest

from experiments import large_angles
from experiments import table_comparison
from modelstock_jax import merging
from modelstock_jax.data import sources
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import evaluation

FLAGS = {
  'data.train': 'train[:80]',
  'train.batch_size': 40,
  'train.epochs': 1,
  'train.warmup_steps': 1,
  'evaluate.every_epochs': 1,
  'evaluate.benchmarks': "('digits','noise')",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs a phase; returns the names of the sources that it opened."""
  devices = jax.devices()[:1]  # eight cost time to compile for
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  monkeypatch.setattr(large_angles, 'SEARCH_SEEDS', range(100, 102))
  monkeypatch.setattr(large_angles, 'CANDIDATES', {'demo': ()})
  names, make = [], sources.TfdsSource.__init__

  def recorded(self, *args, **kwargs):
    make(self, *args, **kwargs)
    names.append(self.name)

  monkeypatch.setattr(sources.TfdsSource, '__init__', recorded)

  def main(phase):
    names.clear()
    flags = [f'--config.{key}={value}' for key, value in FLAGS.items()]
    arguments = ['large_angles', phase, f'--workdir={tmp_path}', '--seeds=2']
    monkeypatch.setattr('sys.argv', [*arguments, *flags])
    large_angles.main()
    return set(names)

  return main


def test_search_never_opens_a_test_split(run, capsys):
  opened = run('search')
  assert opened == {'digits/1.0.0/train[:80]', 'digits/1.0.0/validation'}
  assert 'Chosen: none found' in capsys.readouterr().out  # two steps
  # Without a choice, or with all measured, nothing is opened at all.
  assert not run('compare')
  assert not run('search')


def test_cosines_and_ratios_of_two_layers():
  # Lengths 1 and 2, cosines 0.5 and 0: ratios 2c / (1 + c) of 2/3 and 0, and
  # |w_1 - w_2|^2 = 2 l^2 (1 - c) of 1 and 8.
  models = [
    {'block_0': {'attention': {'kernel': np.float32(a)}, 'mlp': {'kernel': m}}}
    for a, m in (
      ([1.0, 0.0], np.float32([2.0, 0.0])),
      ([0.5, np.sqrt(0.75)], np.float32([0.0, 2.0])),
    )
  ]
  anchor = jax.tree.map(np.zeros_like, models[0])
  stack = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
  merged = types.SimpleNamespace(params=merging.model_stock(anchor, models))
  end = types.SimpleNamespace(models=stack, merged=merged)
  fake = types.SimpleNamespace(
    train=lambda name: end,
    setup=types.SimpleNamespace(anchor=anchor),
    validate=lambda params: [0.1 * i for i in range(len(params))],
  )
  actual = large_angles.measure(fake)
  expected = {
    'block_0/attention/kernel': 0.5,
    'block_0/mlp/kernel': 0.0,
    'attention': 0.5,
    'mlp': 0.0,
    'block 0': 0.25,
    'ratio': 1 / 3,
    'by distance': 2 / 27,
    'zero-shot': 0.0,
    'first': 10.0,
    'second': 20.0,
    'average': 30.0,
    'Model Stock': 40.0,
  }
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, atol=1e-7)


@pytest.mark.parametrize('state', ['keep', 'reset'])
def test_runs_do_to_moments_what_their_flags_say(monkeypatch, state):
  given = []
  monkeypatch.setattr(
    table_comparison.loop,
    'train',
    lambda config, *_, **__: given.append(config),
  )
  flag = f'--config.merge.opt_state={state}'
  path = table_comparison.ROOT / table_comparison.DIGITS
  config = config_lib.load(path, [flag])
  table_comparison.Run(config, None, path.parent).train('epoch', 'epoch')
  [trained] = given
  assert (trained.merge.every, trained.merge.opt_state) == ('epoch', state)


def test_choice_is_by_single_models_among_those_in_range():
  fits = dict.fromkeys(large_angles.CRITERION, 0.5)
  fits |= {'zero-shot': 70.0, 'first': 90.0, 'second': 92.0}
  table = {
    'small angles': {**fits, 'block 1': 0.61, 'first': 98.0},
    'large angles': {**fits, 'mlp': 0.39, 'first': 98.0},
    'worse': {**fits, 'second': 91.0, 'average': 99.0, 'Model Stock': 99.0},
    'best': {**fits, 'average': 0.0, 'Model Stock': 0.0},
  }
  assert large_angles.choose(table) == 'best'
  behind = {**fits, 'first': 69.0, 'second': 70.0}
  assert large_angles.choose({'behind': behind}) is None


def test_differences_are_paired_by_seed():
  # Single models 0.8 and 0.6, merges 0.9 and 0.8: 10 and 20 points ahead, a
  # mean of 15; t of one degree of freedom is 12.706, the standard error 5.
  rows = [
    evaluation.Row(method, benchmark, seed, accuracy, 10)
    for benchmark in ('digits', 'noise')
    for method, accuracies in (('one', (0.8, 0.6)), ('two', (0.9, 0.8)))
    for seed, accuracy in enumerate(accuracies)
  ]
  regimes = {'demo': rows, 'other': rows}
  *_, line = large_angles.compare_table(regimes, 'one').splitlines()
  cells = [cell.strip() for cell in line.strip('|').split('|')]
  assert cells == ['two', *(['85.0', '+15.0 ± 63.5'] * 4)]
