"""The analysis of models that a tiny run has left, from the command line."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.geometry import __main__ as geometry
from experiments.geometry import analyses
from experiments.geometry import distance
from experiments.geometry import family
from experiments.geometry import landscape
from experiments.geometry import study
from experiments.soups import members
from experiments.soups import random_search
from modelstock_jax import data
from modelstock_jax.report import plots
from modelstock_jax.training import clip_task
from modelstock_jax.training import loop


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Eight cost time to compile for."""
  devices = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: devices)
    patch.setattr(landscape, 'SIDE', 3)
    patch.setattr(distance, 'SCALES', (0.0, 1.0))
    patch.setitem(plots.STYLE, 'figure.dpi', 50)
    yield


@pytest.fixture(scope='module')
def draw(geometry_flags):
  """Makes a part of the analysis as `experiments.geometry.study` does."""

  def run(part, folder):
    arguments = ['study', part, f'--workdir={folder}', '--seeds=2']
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr('sys.argv', [*arguments, *geometry_flags()])
      study.main()

  return run


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, draw):
  folder = tmp_path_factory.mktemp('figures')
  draw('shell', folder)
  assert [path.name for path in (folder / 'analysis').iterdir()] == [
    'shell.json'
  ]
  others = '--only=consistency,landscape,distance,scatter'
  assert geometry.main([f'--workdir={folder}', others]) == 0
  return folder


def test_every_part_has_data_and_figures(workdir):
  for name in analyses.PARTS:
    assert json.loads((workdir / 'analysis' / f'{name}.json').read_text())
  stems = ('consistency', 'shell', 'landscape', 'distance')
  for stem in (*stems, 'scatter_wise_ft'):
    for suffix in ('svg', 'png'):
      assert (workdir / 'plots' / f'{stem}.{suffix}').stat().st_size > 1000


def test_the_next_figure_finds_the_models(workdir, draw, monkeypatch):
  monkeypatch.delattr(loop, 'fit')  # nothing is trained again
  before = (workdir / 'analysis' / 'consistency.json').read_text()
  draw('consistency', workdir)
  assert (workdir / 'analysis' / 'consistency.json').read_text() == before


def test_numbers_are_those_of_the_models(workdir):
  models, config = family.read(workdir)
  assert models.names[:3] == [
    'seed 0, model 0',
    'seed 0, model 1',
    'seed 1, model 0',
  ]
  # By a foreign way: the evaluation of single models, one by one.
  setup = clip_task.prepare(config)
  spec = data.find_benchmark('digits')
  scores = setup.evaluate([models.anchor, *models.models.values()], spec)
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


@pytest.mark.parametrize(
  ('only', 'number', 'classify', 'parts'),
  [
    ((), 4, True, list(analyses.PARTS)),
    ((), 2, True, ['consistency', 'landscape', 'scatter']),
    (('shell', 'scatter'), 4, True, ['shell', 'scatter']),
    ((), 2, False, ['consistency']),
    (('shell',), 4, False, ['shell']),
  ],
)
def test_parts_for_which_there_are_models(only, number, classify, parts):
  assert analyses.choose(only, number, classify) == parts


@pytest.mark.parametrize(
  ('only', 'number', 'classify', 'message'),
  [
    (('shell',), 2, True, 'shell: cannot be made of 2 models'),
    ((), 1, True, 'consistency, .* cannot be made of 1 models'),
    (('scatter',), 4, False, 'scatter: .* without a head'),
  ],
)
def test_parts_that_cannot_be_made(only, number, classify, message):
  with pytest.raises(ValueError, match=message):
    analyses.choose(only, number, classify)


def test_unfinished_comparison_names_every_run(workdir, tmp_path, capsys):
  folder = tmp_path / 'demo'
  shutil.copytree(workdir, folder)
  path = folder / 'seed_0' / 'end' / 'metrics.jsonl'
  path.write_text(''.join(path.read_text().splitlines(keepends=True)[:1]))
  (folder / 'seed_1' / 'end' / 'metrics.jsonl').unlink()
  assert geometry.main([f'--workdir={folder}']) == 1
  error = capsys.readouterr().err
  for seed in (0, 1):
    assert f'seed={seed} and merge.every=end is not finished' in error
  assert 'Rerun the' in error


def test_run_whose_end_was_not_saved(workdir, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(workdir / 'seed_0' / 'epoch', folder)
  checkpoints = folder / 'checkpoints'
  steps = sorted(int(path.name) for path in checkpoints.glob('[0-9]*'))
  assert steps[-1] == 10
  (checkpoints / '10').rename(checkpoints / '5')
  with pytest.raises(ValueError, match='end of the run was not saved'):
    family.read(folder)


def test_a_workdir_grants_itself_no_trust(workdir, tmp_path, capsys):
  folder = tmp_path / 'run'
  shutil.copytree(workdir, folder)
  np.save(tmp_path / 'clip.npy', np.array({}, object))
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  weights = str(tmp_path / 'clip.npy')
  config['anchor'] |= {'weights': weights, 'allow_pickle': True}
  path.write_text(json.dumps(config))
  arguments = [f'--workdir={folder}', '--only=consistency']
  assert geometry.main(arguments) == 1
  assert 'clip.npy is a pickle' in capsys.readouterr().err
  assert geometry.main([*arguments, '--allow-pickle']) == 1
  assert 'clip.npy is a pickle' not in capsys.readouterr().err


def test_grid_leaves_the_diverged_out_and_names_the_missing(
  tmp_path, geometry_flags
):
  flags = {
    'grid.num_models': 4,
    'grid.epochs': '(1, 2)',
    'grid.learning_rate': '(1e-3, 1e-3)',
    'grid.randaugment_count': 0,
  }
  config = members.load_config(study.CONFIG, geometry_flags(flags))
  random_search.train(config, tmp_path)
  path = tmp_path / members.FILE
  lines = json.loads(path.read_text())
  lines['models'][1].update(status='diverged', validation=None)
  path.write_text(json.dumps(lines))
  models, _ = family.read(tmp_path)
  assert models.names == ['model 0', 'model 2', 'model 3']
  assert models.diverged == ['model 1']
  del lines['models'][2:]
  path.write_text(json.dumps(lines))
  with pytest.raises(ValueError, match='The grid has 2 of 4 models'):
    family.read(tmp_path)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--only=shells', "there is no 'shells'; known are consistency, shell"),
    ('--benchmarks=noise', 'give one of digits, imagenet'),
    ('--benchmarks=digits,nois', "there is no benchmark 'nois'"),
    ('--benchmarks=imagenet,imagenet_r', 'imagenet'),
  ],
)
def test_wrong_flags_are_explained(workdir, capsys, flag, message):
  assert geometry.main([f'--workdir={workdir}', flag]) == 1
  assert message in capsys.readouterr().err


def test_the_config_is_not_to_be_changed(workdir, capsys):
  with pytest.raises(SystemExit):
    geometry.main([f'--workdir={workdir}', '--config.seed=1'])
  assert 'the config is that of the workdir' in capsys.readouterr().err


def test_no_workdir_at_all(tmp_path, capsys):
  assert geometry.main([f'--workdir={tmp_path}']) == 1
  assert 'there is no config.json' in capsys.readouterr().err
