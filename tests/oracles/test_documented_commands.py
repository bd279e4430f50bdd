"""Documented commands that need TensorFlow or libtpu."""

import os
import pathlib
import subprocess
import sys

import pytest

from modelstock_jax.data import sources
from tests.docs import documented

pytestmark = pytest.mark.oracle

ROOT = pathlib.Path(__file__).parents[2]

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
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pod')
  documented.furnish(folder)
  _python(FURNISH, folder)
  return folder


PAGES = [ROOT / 'docs' / name for name in ('imagenet.md', 'hosts.md')]
COMMANDS = [
  command
  for page in PAGES
  for command in documented.commands(page.read_text('utf-8'))
  if command in documented.RUN and documented.RUN[command].oracle
]
# By what make_imagenet.py puts into the archives.
SIZES = {
  'imagenet': ('imagenet2012', {'train': 15, 'validation': 11}),
  'imagenet_v2': ('imagenet_v2/matched-frequency', {'test': 3}),
  'imagenet_r': ('imagenet_r', {'test': 200}),
  'imagenet_sketch': ('imagenet_sketch', {'test': 3}),
  'imagenet_a': ('imagenet_a', {'test': 200}),
}


def test_all_of_them_are_on_these_pages():
  assert {c for c, how in documented.RUN.items() if how.oracle} == {*COMMANDS}


@pytest.mark.parametrize(
  'command', [c for c in COMMANDS if c.startswith('modelstock data')]
)
def test_data_are_prepared_and_converted(command, folder, tmp_path):
  _, _, verb, name, *_ = command.split()
  if verb == 'convert' or name == 'imagenet':
    documented.run(command, folder)
  else:
    _python(WITHOUT_NETWORK, tmp_path, command, cwd=folder)
  data_set, sizes = SIZES['imagenet' if verb == 'convert' else name]
  assert sources.split_sizes(data_set, data_dir=folder / 'data') == sizes


def test_plans(folder):
  pytest.importorskip('libtpu')
  (plan,) = [c for c in COMMANDS if 'plan' in c]
  documented.run(plan, folder)


def test_scenic(folder, monkeypatch):
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
