import shlex

from modelstock_jax.cli import main
from modelstock_jax.training import config as config_lib


def test_the_config_and_three_commands_are_written(tmp_path, capsys):
  folder = tmp_path / 'new' / 'birds'
  assert main.main(['init', str(folder)]) == 0
  assert str(folder / 'README.md') in capsys.readouterr().out
  assert sorted(path.name for path in folder.iterdir()) == [
    'README.md',
    'own_data.py',
  ]
  assert config_lib.load(folder / 'own_data.py') == config_lib.load('own_data')
  lines = (folder / 'README.md').read_text().splitlines()
  commands = [shlex.split(line) for line in lines if line.startswith('    ')]
  assert [command[:2] for command in commands] == [
    ['modelstock', 'data'],
    ['modelstock', 'train'],
    ['modelstock', 'evaluate'],
  ]
  data = config_lib.load('own_data').data
  assert f'--data_dir={data.data_dir}' in commands[0]
  assert data.dataset in commands[0]


def test_a_folder_that_has_files_is_left_alone(tmp_path, capsys):
  (tmp_path / 'own_data.py').write_text('mine')
  assert main.main(['init', str(tmp_path)]) == 1
  assert 'is not empty. Name a new folder' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['own_data.py']
  empty = tmp_path / 'empty'
  empty.mkdir()
  assert main.main(['init', str(empty)]) == 0
