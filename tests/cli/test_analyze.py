import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from modelstock_jax import data
from modelstock_jax.analysis import analyses
from modelstock_jax.analysis import distance
from modelstock_jax.analysis import family
from modelstock_jax.analysis import landscape
from modelstock_jax.analysis import points
from modelstock_jax.cli import main
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import grid
from modelstock_jax.training import loop

# Two epochs of five steps: too short to learn much.
SHORT = [
  '--config.train.batch_size=40',
  '--config.train.epochs=2',
  '--config.train.warmup_steps=2',
  '--config.evaluate.every_epochs=1',
  "--config.evaluate.benchmarks=('digits', 'noise')",
]


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Eight cost time to compile for."""
  devices = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: devices)
    patch.setattr(landscape, 'SIDE', 3)
    patch.setattr(distance, 'SCALES', (0.0, 1.0))
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, one_device):
  folder = tmp_path_factory.mktemp('demo')
  assert main.main(['demo', f'--workdir={folder}', '--seeds=2', *SHORT]) == 0
  assert main.main(['analyze', f'--workdir={folder}']) == 0
  return folder


def test_every_part_has_data_and_figures(workdir):
  for name in analyses.PARTS:
    assert json.loads((workdir / 'analysis' / f'{name}.json').read_text())
  stems = ('consistency', 'shell', 'shell_identities', 'landscape', 'distance')
  for stem in (*stems, 'scatter_wise_ft'):
    for suffix in ('svg', 'png'):
      assert (workdir / 'plots' / f'{stem}.{suffix}').stat().st_size > 1000


def test_numbers_are_those_of_the_models(workdir):
  found, config = family.read(workdir)
  assert found.names[:3] == [
    'seed 0, model 0',
    'seed 0, model 1',
    'seed 1, model 0',
  ]
  # By a foreign way: the evaluation of single models, one by one.
  setup = loop.prepare(config)
  spec = data.find_benchmark('digits')
  scores = setup.evaluate([found.anchor, *found.models], spec)
  written = json.loads((workdir / 'analysis' / 'scatter.json').read_text())
  chosen = [
    point['accuracy']['digits']
    for point in written['points']
    if point['method'] in ('zero_shot', 'fine_tuned')
  ]
  # Products in another order may turn an image that is on the fence.
  np.testing.assert_allclose(
    chosen, [score.accuracy for score in scores], atol=1.5 / scores[0].n
  )


def test_points_need_not_fill_chunks(workdir):
  found, config = family.read(workdir)
  shares = np.linspace(0, 1, 5, dtype=np.float32)
  shares = np.stack([1 - shares, shares], 1)
  ends = points.stack([found.anchor, found.models[0]])
  by_three, at_once = (
    points.scorer(config, found.anchor, chunk=chunk)(
      points.combine, ends, shares, ['digits']
    )['digits']
    for chunk in (3, 8)
  )
  assert len(by_three) == 5
  np.testing.assert_allclose(by_three, at_once, atol=1.5 / 597)


def test_run_of_two_models(workdir, tmp_path, capsys):
  folder = tmp_path / 'run'
  shutil.copytree(workdir / 'seed_0' / 'end', folder)
  assert main.main(['analyze', f'--workdir={folder}', '--only=shell']) == 1
  assert 'shell takes 4 or more' in capsys.readouterr().err
  assert main.main(['analyze', f'--workdir={folder}']) == 0
  written = {path.stem for path in (folder / 'analysis').iterdir()}
  assert written == {'consistency', 'landscape', 'scatter'}


def _train(folder, name):
  config = pathlib.Path(__file__).parents[2] / 'configs' / name
  flags = [f'--config={config}', f'--workdir={folder}', *SHORT]
  flags += ['--config.merge.num_models=2', '--config.merge.every=end']
  assert main.main(['train', *flags]) == 0


def test_layers_that_have_not_moved(tmp_path):
  """Of two linear probes: they have no angle, and are not drawn."""
  folder = tmp_path / 'probes'
  _train(folder, 'digits_linear_probe.py')
  assert (
    main.main(['analyze', f'--workdir={folder}', '--only=consistency']) == 0
  )
  text = (folder / 'analysis' / 'consistency.json').read_text()
  found = json.loads(text)
  assert found['kinds']['mlp']['angle']['mean'] is None
  assert found['kinds']['head']['angle']['mean'] > 0
  assert set(found['epochs']['angle']['mlp'][0]) == {None}


def test_what_has_no_classifier_is_not_evaluated(tmp_path, capsys):
  folder = tmp_path / 'flyp'
  _train(folder, 'digits_flyp.py')
  analyze = ['analyze', f'--workdir={folder}']
  assert main.main([*analyze, '--only=scatter']) == 1
  assert 'which scatter cannot evaluate' in capsys.readouterr().err
  assert main.main(analyze) == 0
  written = {path.stem for path in (folder / 'analysis').iterdir()}
  assert written == {'consistency'}


def test_unfinished_comparison_names_every_run(workdir, tmp_path, capsys):
  folder = tmp_path / 'demo'
  shutil.copytree(workdir, folder)
  shutil.rmtree(folder / 'seed_0' / 'end' / 'checkpoints' / '10')
  shutil.rmtree(folder / 'seed_1' / 'end')
  assert main.main(['analyze', f'--workdir={folder}']) == 1
  error = capsys.readouterr().err
  assert 'seed_0/end: ' in error
  assert 'seed_1/end: has not begun' in error
  assert 'Run the command that made it again' in error


def test_unfinished_run_says_how_many_steps(workdir, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(workdir / 'seed_0' / 'epoch', folder)
  checkpoints = folder / 'checkpoints'
  steps = sorted(int(path.name) for path in checkpoints.glob('[0-9]*'))
  assert steps[-1] == 10
  (checkpoints / '10').rename(checkpoints / '5')
  with pytest.raises(ValueError, match='5 of 10 steps are done'):
    family.read(folder)


def test_grid_leaves_the_diverged_out_and_names_the_missing(tmp_path, workdir):
  config = config_lib.from_json(workdir / 'config.json')
  config = config_lib.override(
    config,
    [
      '--config.grid.num_models=4',
      '--config.grid.epochs=(1, 2)',
      '--config.grid.learning_rate=(1e-3, 1e-3)',
      '--config.grid.randaugment_count=0',
    ],
  )
  grid.train(config_lib.validate(config), tmp_path)
  path = tmp_path / grid.FILE
  lines = json.loads(path.read_text())
  lines['models'][1].update(status='diverged', validation=None)
  path.write_text(json.dumps(lines))
  found, _ = family.read(tmp_path)
  assert found.names == ['model 0', 'model 2', 'model 3']
  assert found.diverged == ['model 1']
  del lines['models'][2:]
  path.write_text(json.dumps(lines))
  with pytest.raises(ValueError, match=r'2 of 4 models; missing are \[2, 3\]'):
    family.read(tmp_path)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--only=shells', "there is no 'shells'; known are consistency, shell"),
    ('--benchmarks=noise', 'give one of digits, imagenet'),
    ('--benchmarks=digits,nois', "there is no benchmark 'nois'"),
    ('--benchmarks=imagenet,imagenet_r', 'imagenet_r: '),
    ('--config.seed=1', 'the config is that of the workdir'),
  ],
)
def test_wrong_flags_are_explained(workdir, capsys, flag, message):
  assert main.main(['analyze', f'--workdir={workdir}', flag]) == 1
  assert message in capsys.readouterr().err


def test_no_workdir_at_all(tmp_path, capsys):
  assert main.main(['analyze', f'--workdir={tmp_path}']) == 1
  assert 'there is no config.json' in capsys.readouterr().err
