"""Documented commands that need TensorFlow or libtpu."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from modelstock_jax.data import sources

pytestmark = pytest.mark.oracle

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / 'tests' / 'docs' / 'documented.py'

# A copy as TFDS wrote it once, and the archives that one downloads by hand.
FURNISH = """
import pathlib, sys
import make_imagenet
import tensorflow_datasets as tfds
folder = pathlib.Path(sys.argv[1])
make_imagenet.write_manual(folder / 'data' / 'downloads' / 'manual')
config = tfds.download.DownloadConfig(
  manual_dir=folder / 'data' / 'downloads' / 'manual')
tfds.builder('imagenet2012', data_dir=folder / 'tfds', file_format='tfrecord'
             ).download_and_prepare(download_config=config)
"""
# The command itself, with archives of ours in place of those of the network.
WITHOUT_NETWORK = """
import pathlib, shlex, sys
from unittest import mock
import make_imagenet
import tensorflow_datasets as tfds
from modelstock_jax.cli import main
scratch = pathlib.Path(sys.argv[1])
make_imagenet.write_folders(scratch)
make_imagenet.write_sketch(scratch / 'sketch.zip')
manager = tfds.download.DownloadManager
reply = {'download_and_extract': scratch, 'download': scratch / 'sketch.zip'}
for method, path in reply.items():
  path = tfds.core.Path(path)
  mock.patch.object(manager, method, lambda self, url, path=path: path).start()
sys.exit(main.main(shlex.split(sys.argv[2])[1:]))
"""


@pytest.fixture(scope='module')
def documented():
  """The module of the commands."""
  spec = importlib.util.spec_from_file_location('documented', DOCS)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _python(script, *argv, cwd=None):
  done = subprocess.run(
    [
      *(sys.executable, '-c'),
      f'import sys; sys.path.insert(0, {str(ROOT / "tests" / "data")!r})\n'
      + script,
      *map(str, argv),
    ],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


@pytest.fixture(scope='module')
def folder(documented, tmp_path_factory):
  folder = tmp_path_factory.mktemp('pod')
  documented.furnish(folder)
  _python(FURNISH, folder)
  return folder


def _oracle_commands(documented):
  pages = (ROOT / 'docs' / name for name in ('imagenet.md', 'hosts.md'))
  return [
    command
    for page in pages
    for command in documented.commands(page.read_text('utf-8'))
    if command in documented.RUN and documented.RUN[command].oracle
  ]


def test_all_of_them_are_on_these_pages(documented):
  here = _oracle_commands(documented)
  assert {c for c, how in documented.RUN.items() if how.oracle} == {*here}


def test_data_are_prepared_and_converted(documented, folder, tmp_path):
  for number, command in enumerate(_oracle_commands(documented)):
    if command.startswith('modelstock data prepare imagenet_'):
      scratch = tmp_path / str(number)
      scratch.mkdir()
      _python(WITHOUT_NETWORK, scratch, command, cwd=folder)
    elif command.startswith('modelstock data'):
      documented.run(command, folder)
      sizes = sources.split_sizes('imagenet2012', data_dir=folder / 'data')
      assert sizes == {'train': 15, 'validation': 11}
  # By what make_imagenet.py puts into the archives.
  for name, size in (
    ('imagenet_v2/matched-frequency', 3),
    ('imagenet_r', 200),
    ('imagenet_sketch', 3),
    ('imagenet_a', 200),
  ):
    sizes = sources.split_sizes(name, data_dir=folder / 'data')
    assert sizes == {'test': size}, name


def test_plans(documented, folder):
  pytest.importorskip('libtpu')
  (plan,) = [c for c in _oracle_commands(documented) if 'plan' in c]
  documented.run(plan, folder)


def test_scenic(documented, folder, monkeypatch):
  """On its real code: MODELSTOCK_SCENIC=FOLDER names a copy of it."""
  copy = os.environ.get('MODELSTOCK_SCENIC')
  if not copy and os.environ.get('MODELSTOCK_REQUIRE_SCENIC') != '1':
    pytest.skip('MODELSTOCK_SCENIC names no copy of Scenic')
  monkeypatch.setenv('PYTHONPATH', str(copy))
  commands = [c for c, how in documented.RUN.items() if how.scenic]
  assert commands
  for command in commands:
    documented.run(command, folder)
  assert list((folder / 'runs' / 'tiny_vit').glob('checkpoint_*'))
