import json
import pathlib

import pytest

from modelstock_jax.cli import demo
from modelstock_jax.cli import main
from modelstock_jax.training import evaluation

pytestmark = pytest.mark.usefixtures('two_devices')

METHODS = [
  'zero_shot',
  'fine_tuned',
  'uniform_soup',
  'wise_ft_0.5',
  'model_stock_end',
  'model_stock_epoch',
  'model_stock_epoch_reset',
]
BENCHMARKS = [
  'digits',
  'noise',
  'blur',
  'rotate_ccw',
  'rotate_cw',
  'contrast',
  'occlusion',
  'shift',
  'fonts',
]
# Two epochs of five steps: too short to learn much.
SHORT = {
  'data.train': 'train[:40]',
  'train.epochs': 2,
  'evaluate.batch_size': 200,
}


@pytest.fixture(scope='module')
def flags(tiny_flags):
  """Return flags of a demo with a tiny network from an untrained anchor."""
  return tiny_flags(SHORT)


@pytest.fixture(scope='module')
def workdir(flags, tmp_path_factory, two_devices):
  folder = tmp_path_factory.mktemp('demo')
  assert main.main(['demo', f'--workdir={folder}', '--seeds=2', *flags]) == 0
  return folder


def test_config_is_the_file_in_configs():
  expected = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'
  assert pathlib.Path(demo.digits_config()).samefile(expected)


def test_results_have_every_row(workdir):
  rows = json.loads((workdir / 'results.json').read_text())
  actual = {(row['method'], row['benchmark'], row['seed']) for row in rows}
  assert actual == {
    (method, benchmark, seed)
    for method in METHODS
    for benchmark in BENCHMARKS
    for seed in (0, 1)
  }
  assert len(rows) == len(actual)
  for row in rows:
    assert set(row) == set(evaluation.Row._fields)
    assert row['num_classes'] == 10
    assert row['n'] == (600 if row['benchmark'] == 'fonts' else 597)
    correct = row['accuracy'] * row['n']
    assert abs(correct - round(correct)) < 1e-6
    assert 0 <= correct <= row['n']


def test_zero_shot_does_not_depend_on_the_seed(workdir):
  rows = json.loads((workdir / 'results.json').read_text())
  zero_shot = {
    seed: {
      row['benchmark']: row['accuracy']
      for row in rows
      if row['method'] == 'zero_shot' and row['seed'] == seed
    }
    for seed in (0, 1)
  }
  assert zero_shot[0] == zero_shot[1]


def test_leaves_report_plots_events_and_checkpoints(workdir):
  report = (workdir / 'report.html').read_text('utf-8')
  assert 'What is missing' not in report
  assert '<th scope="row">Peak memory</th>' in report
  for name in ('scatter', 'merge_end', 'merge_epoch', 'merge_epoch_reset'):
    assert (workdir / 'plots' / f'{name}.svg').is_file()
    assert (workdir / 'plots' / f'{name}.png').is_file()
  for seed in (0, 1):
    for mode in ('end', 'epoch', 'epoch_reset'):
      run = workdir / f'seed_{seed}' / mode
      assert list(run.glob('events.out.tfevents.*'))
      assert (run / 'checkpoints' / '10').is_dir()


def test_again_trains_nothing_and_finds_the_same(workdir, flags, capsys):
  before = (workdir / 'results.json').read_text()
  events = sorted(workdir.rglob('events.out.tfevents.*'))
  assert main.main(['demo', f'--workdir={workdir}', '--seeds=2', *flags]) == 0
  assert (workdir / 'results.json').read_text() == before
  assert sorted(workdir.rglob('events.out.tfevents.*')) == events
  assert 'Model Stock' in capsys.readouterr().out


def test_workdir_of_another_config_is_refused(workdir, flags, capsys):
  arguments = [*flags, '--config.train.learning_rate=0.5']
  assert main.main(['demo', f'--workdir={workdir}', *arguments]) == 1
  error = capsys.readouterr().err
  assert 'train.learning_rate: ' in error
  assert '-> 0.5' in error


@pytest.mark.parametrize('mode', ['end', 'epoch', 'epoch_reset'])
def test_evaluate_prints_what_the_demo_printed(workdir, mode, capsys):
  run = workdir / 'seed_1' / mode
  status = main.main(
    ['evaluate', f'--workdir={run}', '--benchmarks=digits,noise']
  )
  assert status == 0
  assert 'Zero-shot' in capsys.readouterr().out
  rows = json.loads((run / 'results.json').read_text())
  demo_rows = json.loads((workdir / 'results.json').read_text())
  # The demo has no second model alone, and no model that went on from a merge.
  other = 'restarted' if 'epoch' in mode else 'fine_tuned_2'
  ours = [row for row in rows if other not in row['method']]
  assert len(rows) == 12
  assert len(ours) == (4 if 'epoch' in mode else 10)
  assert all(row in demo_rows for row in ours)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--benchmarks=digits,noize'], "there is no benchmark 'noize'"),
    (['--config.train.epochs=3'], 'the config of a run is that of its workdir'),
  ],
)
def test_evaluate_refuses(workdir, capsys, arguments, message):
  run = workdir / 'seed_0' / 'end'
  assert main.main(['evaluate', f'--workdir={run}', *arguments]) == 1
  assert message in capsys.readouterr().err


def test_evaluate_without_a_run(tmp_path, capsys):
  assert main.main(['evaluate', f'--workdir={tmp_path}']) == 1
  assert 'config.json: there is no such file' in capsys.readouterr().err


def test_no_seeds(tmp_path, capsys):
  assert main.main(['demo', f'--workdir={tmp_path}', '--seeds=0']) == 1
  assert '--seeds=0' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_train_then_evaluate(flags, tmp_path, capsys):
  config = demo.digits_config()
  arguments = [f'--config={config}', f'--workdir={tmp_path}', *flags]
  assert main.main(['train', *arguments, '--config.merge.every=2']) == 0
  assert 'Finished at step 10' in capsys.readouterr().out
  assert main.main(['evaluate', f'--workdir={tmp_path}']) == 0
  rows = json.loads((tmp_path / 'results.json').read_text())
  assert {row['method'] for row in rows} == {
    'zero_shot',
    'fine_tuned',
    'fine_tuned_2',
    'uniform_soup',
    'wise_ft_0.5',
    'model_stock_2_reset',
  }
  assert {row['benchmark'] for row in rows} == set(BENCHMARKS)


def test_pretraining_needs_a_clone(tmp_path, monkeypatch, capsys):
  installed = tmp_path / 'modelstock_jax' / 'configs' / 'digits.py'
  monkeypatch.setattr(demo, 'digits_config', lambda: str(installed))
  arguments = ['demo', '--pretrain', f'--workdir={tmp_path / "run"}']
  assert main.main(arguments) == 1
  assert '--pretrain needs a clone' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
