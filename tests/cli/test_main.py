import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

from modelstock_jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]


def test_help_imports_nothing_heavy():
  script = (
    'import sys\n'
    'from modelstock_jax.cli import main\n'
    'try:\n'
    '  main.main(sys.argv[1:])\n'
    'except SystemExit as done:\n'
    '  assert done.code == 0, done.code\n'
    'heavy = {"jax", "numpy", "flax", "matplotlib", "ml_collections"}\n'
    'print("heavy:", sorted(heavy & set(sys.modules)))\n'
  )
  for arguments in (['--help'], ['train', '--help'], ['demo', '--help']):
    done = subprocess.run(
      [sys.executable, '-c', script, *arguments],
      capture_output=True,
      text=True,
      check=True,
    )
    assert 'usage: modelstock' in done.stdout
    assert 'heavy: []' in done.stdout


def test_every_command_is_listed(capsys):
  with pytest.raises(SystemExit) as done:
    main.main(['--help'])
  assert done.value.code == 0
  text = capsys.readouterr().out
  assert all(command in text for command in main.COMMANDS)


@pytest.mark.parametrize('argv', [[], ['bake'], ['train']])
def test_wrong_usage(argv, capsys):
  with pytest.raises(SystemExit) as done:
    main.main(argv)
  assert done.value.code == 2
  assert 'usage: modelstock' in capsys.readouterr().err


def test_alone_it_prints_its_help(capsys):
  with pytest.raises(SystemExit):
    main.main([])
  text = capsys.readouterr().err
  assert all(command in text for command in main.COMMANDS)


def test_help_of_a_command(capsys):
  for argv in (['help', 'plan'], ['plan', '--help']):
    with pytest.raises(SystemExit) as done:
      main.main(argv)
    assert done.value.code == 0
    assert 'usage: modelstock plan' in capsys.readouterr().out


def test_version(capsys):
  with pytest.raises(SystemExit) as done:
    main.main(['--version'])
  assert done.value.code == 0
  installed = importlib.metadata.version('modelstock_jax')
  assert capsys.readouterr().out == f'modelstock {installed}\n'


def test_run_as_a_module():
  done = subprocess.run(
    [sys.executable, '-m', 'modelstock_jax', '--version'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.startswith('modelstock ')


def test_misspelt_command_names_the_nearest(capsys):
  with pytest.raises(SystemExit) as done:
    main.main(['evalute', '--workdir=runs'])
  assert done.value.code == 2
  error = capsys.readouterr().err
  assert "no command 'evalute'; did you mean 'evaluate'?" in error


def test_config_flags_with_a_space(capsys, tmp_path):
  argv = ['train', f'--workdir={tmp_path}', '--config=configs/digits.py']
  argv += ['--config.train.epochs', '0', '--config.train.learning_rate', '-1']
  assert main.main(argv) == 1
  error = capsys.readouterr().err
  assert 'train.epochs: must be' in error
  assert 'train.learning_rate: must be' in error


def test_unknown_flag_points_to_the_config(capsys, tmp_path):
  with pytest.raises(SystemExit) as done:
    main.main(['train', '--config=c.py', f'--workdir={tmp_path}', '--epochs=3'])
  assert done.value.code == 2
  assert '--epochs=3' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_missing_config_is_named(capsys, tmp_path):
  status = main.main(['train', '--config=absent.py', f'--workdir={tmp_path}'])
  assert status == 1
  assert '--config=absent.py: there is no such file' in capsys.readouterr().err


def test_data_that_are_not_there_come_before_the_hub(
  capsys, monkeypatch, tmp_path
):
  """What the hub says without a network is several lines."""
  import huggingface_hub

  def offline(*_, **__):
    raise OSError('no network\nCheck your connection.')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  config = ROOT / 'configs' / 'clip_vit_b32.py'
  argv = ['train', f'--config={config}', f'--workdir={tmp_path / "run"}']

  def first_problem(*flags):
    assert main.main([*argv, *flags]) == 1
    return capsys.readouterr().err

  [line] = first_problem(f'--config.data.data_dir={tmp_path}').splitlines()
  assert line.startswith(
    "modelstock train: no prepared data set 'imagenet2012'"
  )
  command = f'modelstock data prepare imagenet2012 --data_dir={tmp_path}'
  assert line.endswith(command)
  [line] = first_problem(
    '--config.data.data_dir=', '--config.data.dataset=digits'
  ).splitlines()
  assert 'model of that id (OSError: no network). Where there is a n' in line
  assert not list(tmp_path.iterdir())


def test_unknown_key_names_the_nearest(capsys, tmp_path):
  status = main.main(
    ['demo', f'--workdir={tmp_path}', '--config.train.epoch=3']
  )
  assert status == 1
  error = capsys.readouterr().err
  assert '--config.train.epoch=3' in error
  assert '--config.train.epochs (now 30)' in error
  assert not list(tmp_path.iterdir())


def test_our_errors_are_not_swallowed(monkeypatch, tmp_path):
  from modelstock_jax.training import clip_task

  def broken(*_, **__):
    raise RuntimeError('a defect')

  monkeypatch.setattr(clip_task, 'prepare', broken)
  with pytest.raises(RuntimeError, match='a defect'):
    main.main(['demo', f'--workdir={tmp_path}'])


class _Absent:
  """Finds modules as they are found where they are not installed."""

  def __init__(self, module):
    self.module = module

  def find_spec(self, name, *_):
    if name == self.module:
      raise ModuleNotFoundError(f'No module named {name!r}', name=name)


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
  module = 'tokenizers'
  monkeypatch.delitem(sys.modules, module, raising=False)
  monkeypatch.setattr(sys, 'meta_path', [_Absent(module), *sys.meta_path])
  config = tmp_path / 'config.py'
  config.write_text(f'import {module}\n\n\ndef get_config(): ...\n')
  status = main.main(['train', f'--config={config}', f'--workdir={tmp_path}'])
  assert status == 1
  assert capsys.readouterr().err == (
    'modelstock train: tokenizers is not installed: pip install '
    "'modelstock_jax[train]' (in a clone: pip install '.[train]'), unless it "
    'is a module of your own.\n'
  )


def _plain(name):
  """A distribution's name as package indices compare them."""
  return re.sub(r'[-_.]+', '-', name).lower()


def test_every_module_of_the_files_extra_is_known():
  required = {
    _plain(re.match(r'[\w.-]+', line)[0])
    for line in importlib.metadata.requires('modelstock_jax')
    if re.search(r"""extra == ['"]files['"]""", line)
  }
  actual = importlib.metadata.packages_distributions()
  modules = {
    name: {m for m, of in actual.items() if name in map(_plain, of)}
    for name in required
  }
  assert required
  for name in required:
    assert modules[name] & main.FILES, name
  assert set().union(*modules.values()) >= main.FILES


PROGRAM = """
import gc, os, pathlib, signal, sys, time
from modelstock_jax.cli import interrupts
from modelstock_jax.formats import write

signal.signal(signal.SIGINT, signal.default_int_handler)  # not as of nohup

def send(name):
  os.kill(os.getpid(), signal.Signals[name])

def in_a_callback():
  def callback(*_):
    gc.callbacks.remove(callback)
    send('SIGINT')

  gc.callbacks.append(callback)
  gc.collect()
  time.sleep(60)

def in_an_extension():
  try:
    exec("send('SIGINT')")
  except KeyboardInterrupt as error:
    raise ImportError('failed') from error

def while_writing():
  with write.replacing('file') as path:
    path.write_text('half')
    send('SIGTERM')

def while_importing():
  pathlib.Path('module.py').write_text(
    'import os, signal; os.kill(os.getpid(), signal.SIGTERM)'
  )
  sys.path.insert(0, '.')
  try:
    import module
  except BaseException:
    pass

sys.exit(interrupts.run('program', globals()[sys.argv[1]]))
"""


@pytest.mark.parametrize(
  ('program', 'name', 'status'),
  [
    ('in_a_callback', 'SIGINT', 130),
    ('in_an_extension', 'SIGINT', 130),
    ('while_writing', 'SIGTERM', 143),
    ('while_importing', 'SIGTERM', 143),
  ],
)
def test_interrupted_anywhere_it_ends_in_a_line(
  program, name, status, tmp_path
):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, program],
    stderr=subprocess.PIPE,
    text=True,
    cwd=tmp_path,
    timeout=30,
    check=False,
  )
  assert done.returncode == status
  assert done.stderr == f'program: interrupted by {name}.\n'
  assert not list(tmp_path.glob('*file*'))


_COMPLETE = """
source ./script
words=(modelstock $1)
COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
function=$(complete -p modelstock | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function modelstock "${words[-1]}" "${words[-2]}"
echo "${COMPREPLY[*]}"
"""


@pytest.mark.parametrize(
  ('typed', 'completed'),
  [
    ('tra', 'train'),
    ('convert --image', '--image-size'),
    ('convert --format open', 'open_clip'),
    ('train --config scr', 'script'),  # a file of the folder
  ],
)
def test_a_shell_completes_commands_flags_and_files(
  typed, completed, tmp_path, capsys
):
  with pytest.raises(SystemExit) as done:
    main.main(['--print-completion', 'bash'])
  assert done.value.code == 0
  (tmp_path / 'script').write_text(capsys.readouterr().out)
  done = subprocess.run(
    ['bash', '-c', _COMPLETE, 'bash', typed],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == [completed]


def test_a_shell_that_is_not_known(capsys):
  with pytest.raises(SystemExit) as done:
    main.main(['--print-completion=cmd'])
  assert done.value.code == 2
  assert "invalid choice: 'cmd'" in capsys.readouterr().err


@pytest.mark.parametrize(
  ('argv', 'module', 'extra'),
  [
    (['--print-completion', 'bash'], 'shtab', 'completion'),
    (
      ['train', '--config=digits', '--workdir=run', '--log=wandb'],
      'wandb',
      'wandb',
    ),
  ],
)
def test_a_missing_module_names_its_extra(
  argv, module, extra, monkeypatch, capsys, tmp_path
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delitem(sys.modules, module, raising=False)
  monkeypatch.setattr(sys, 'meta_path', [_Absent(module), *sys.meta_path])
  assert main.main(argv) == 1
  hint = f"{module} is not installed: pip install 'modelstock_jax[{extra}]'"
  assert hint in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('name', 'content', 'problem'),
  [
    ('config.json', '{"seed": 0}', 'there is no get_config() in it.'),
    ('script.py', 'raise SystemExit(3)', 'there is no get_config() in it.'),
    ('notes.py', 'Dear reader,', 'is not Python: invalid syntax'),
    ('image.py', '\0', 'is not Python: '),
  ],
)
def test_a_file_that_is_no_config_is_one_line(
  name, content, problem, tmp_path, capsys
):
  file = tmp_path / name
  file.write_text(content)
  workdir = tmp_path / 'run'
  assert main.main(['train', f'--config={file}', f'--workdir={workdir}']) == 1
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith(f'modelstock train: --config={file}: {problem}')
  assert not workdir.exists()
