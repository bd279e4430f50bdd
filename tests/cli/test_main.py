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
  assert line.endswith('model of that id (OSError: no network).')
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
  config.write_text(f'import {module}\n')
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
