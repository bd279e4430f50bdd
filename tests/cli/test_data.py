import shutil

import pytest

from modelstock_jax import data
from modelstock_jax.cli import main
from modelstock_jax.data import tfds_prepare


def test_bundled_sets_are_checked_by_default(capsys):
  assert main.main(['data', 'check']) == 0
  text = capsys.readouterr().out
  assert 'test: 597 images, 10 classes' in text
  assert 'test: 600 images, 10 classes' in text


def test_the_paper_benchmarks_are_checked_of_a_folder(imagenet, capsys):
  assert main.main(['data', 'check', f'--data_dir={imagenet}']) == 0
  heads = [
    line.partition(':')[0]
    for line in capsys.readouterr().out.splitlines()
    if not line.startswith(' ')
  ]
  assert heads == ['imagenet', *data.IMAGENET_SHIFTS]


def test_status_says_that_one_cannot_be_used(imagenet, tmp_path, capsys):
  shutil.copytree(imagenet / 'imagenet_v2', tmp_path / 'imagenet_v2')
  names = ['imagenet_v2', 'imagenet_a', 'objectnet']
  assert main.main(['data', 'check', *names, f'--data_dir={tmp_path}']) == 1
  captured = capsys.readouterr()
  assert 'test: 3 images' in captured.out
  assert 'imagenet_a: NOT USABLE: no prepared data set' in captured.out
  assert (
    f'modelstock data prepare imagenet_a --data_dir={tmp_path}' in captured.out
  )
  assert 'objectnet: NOT USABLE' in captured.out
  assert '2 of 3 cannot be used: imagenet_a, objectnet' in captured.err


def test_prepare_shows_what_it_wrote(imagenet, tmp_path, monkeypatch, capsys):
  def prepare(name, data_dir, manual_dir):
    assert (name, manual_dir) == ('imagenet_r', 'there')
    shutil.copytree(imagenet / name, f'{data_dir}/{name}')

  monkeypatch.setattr(tfds_prepare, 'prepare', prepare)
  flags = [f'--data_dir={tmp_path}', '--manual_dir=there']
  assert main.main(['data', 'prepare', 'imagenet_r', *flags]) == 0
  assert '200 images, 200 classes' in capsys.readouterr().out


def test_convert_says_what_it_takes(imagenet, tmp_path, capsys):
  argv = ['data', 'convert', str(imagenet / 'imagenet_r'), str(tmp_path)]
  assert main.main(argv) == 1
  assert 'imagenet_r/0.2.0' in capsys.readouterr().err


def test_overrides_are_refused(capsys):
  assert main.main(['data', 'check', '--config.seed=3']) == 1
  assert '--config.seed=3' in capsys.readouterr().err


@pytest.mark.parametrize(
  'argv', [['data'], ['data', 'bake'], ['data', 'prepare']]
)
def test_wrong_usage(argv, capsys):
  with pytest.raises(SystemExit) as done:
    main.main(argv)
  assert done.value.code == 2
  assert 'usage: modelstock data' in capsys.readouterr().err
