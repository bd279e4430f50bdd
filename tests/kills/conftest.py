"""Commands in processes of their own, to be killed and to race."""

import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 90  # that a command may take from its start, or from a signal
CLI = 'modelstock_jax.cli.main'
# What a run keeps, whose files have other names or times in each run.
_OF_RUNS = r'checkpoints/|events\.|run\.json'


class Writes(NamedTuple):
  """What a command writes.

  Attributes:
    names: of it, in a folder.
    on_run: the folder is a copy of a finished run.
    in_part: it resumes, so that a part of it may be there.
  """

  names: str
  on_run: bool = False
  in_part: bool = False


WRITES = {
  'merge': Writes('out/'),
  'convert': Writes('out/'),
  'evaluate': Writes('results.json'),
  'report': Writes(r'report\.html|plots/', on_run=True, in_part=True),
  'data check': Writes('nothing'),
  'data prepare': Writes(r'imagenet2012/5\.1\.0/'),
  'data convert': Writes(r'imagenet2012/5\.1\.0/'),
  'train': Writes('', in_part=True),
  'demo': Writes('results.json|seed_', in_part=True),
  'soups': Writes(r'config\.json|grid\.json|models/|stacks/', in_part=True),
  'geometry': Writes('analysis/|plots/', on_run=True, in_part=True),
}
GRID = {
  'grid.num_models': 4,
  'grid.epochs': '(1, 2)',
  'grid.learning_rate': '(1e-3, 1e-3)',
  'grid.randaugment_count': 0,
}


class Server:
  """Starts commands, some at once, by `serve.py`."""

  def __init__(self, cache, logs):
    self._cache, self._logs = cache, logs
    self._number = 0
    self._process = subprocess.Popen(
      [sys.executable, pathlib.Path(__file__).with_name('serve.py')],
      bufsize=0,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={
        **os.environ,
        'JAX_NUM_CPU_DEVICES': '2',  # eight compile for longer
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'PYTHONPATH': str(ROOT),
      },
    )
    self._pids = []

  def start(self, *commands, waits=(0, 0, 0, 0), slow=0):
    """Starts commands, which are lists of arguments: the processes' ids."""
    self._number += 1
    requests = [
      dict(
        argv=[str(argument) for argument in argv],
        log=str(self._logs / f'{self._number}.{index}'),
        wait=waits[index],
        slow=slow,
      )
      for index, argv in enumerate(commands)
    ]
    self._process.stdin.write(f'{json.dumps(requests)}\n'.encode())
    self._pids = json.loads(self._process.stdout.readline())
    return self._pids

  def ended(self, seconds=0):
    """True if all processes end within some seconds."""
    return bool(select.select([self._process.stdout], [], [], seconds)[0])

  def wait(self):
    """Waits for the processes: exit code and output of each.

    The code of those that hang is None.
    """
    hang = not self.ended(SECONDS)
    if hang:
      for pid in self._pids:
        os.kill(pid, signal.SIGKILL)
    codes = json.loads(self._process.stdout.readline())
    texts = [
      (self._logs / f'{self._number}.{index}').read_text(errors='replace')
      for index in range(len(codes))
    ]
    return [
      (None if hang and code == -signal.SIGKILL else code, text)
      for code, text in zip(codes, texts, strict=True)
    ]

  def run(self, *argv, slow=0):
    """Runs one command to its end: its output."""
    self.start(argv, slow=slow)
    [(code, text)] = self.wait()
    assert code == 0, text[-2000:]
    return text

  def num_programs(self):
    """The number of programs that have been compiled."""
    return len([*self._cache.iterdir()])

  def kill(self, pid, number):
    """Sends a signal to a process that may have ended."""
    if not self.ended():
      os.kill(pid, number)

  def close(self):
    self._process.communicate()


@pytest.fixture(scope='session')
def server(tmp_path_factory):
  cache, logs = (tmp_path_factory.mktemp(name) for name in ('cache', 'logs'))
  server = Server(cache, logs)
  yield server
  server.close()


@pytest.fixture(scope='session')
def family(tmp_path_factory):
  """Files of an anchor and two models that start from it."""
  folder = tmp_path_factory.mktemp('family')
  rng = np.random.default_rng(0)
  anchor = {f'blocks.{i}.w': rng.normal(size=(64, 64)) for i in range(40)}
  paths = []
  for name in ('anchor', 'first', 'second'):
    tensors = {
      key: (value + 0.1 * len(paths) * rng.normal(size=value.shape)).astype(
        np.float32
      )
      for key, value in anchor.items()
    }
    paths.append(folder / f'{name}.safetensors')
    safetensors.numpy.save_file(tensors, paths[-1], {'format': 'pt'})
  return paths


FLAGS = {
  'data.train': 'train[:64]',  # 8 steps an epoch, 24 in all
  'checkpoint.every_steps': 3,
  'merge.anchor': 'last_merge',
  'evaluate.benchmarks': "('digits','noise')",
}


@pytest.fixture(scope='session')
def train(tiny_flags):
  """The command that trains in a folder."""

  def command(workdir, changes=()):
    config = ROOT / 'configs' / 'digits.py'
    flags = tiny_flags({**FLAGS, **dict(changes)})
    return [CLI, 'train', f'--config={config}', f'--workdir={workdir}', *flags]

  return command


@pytest.fixture(scope='session')
def undisturbed(server, train, tmp_path_factory):
  """The workdir of a run that nothing happens to: to read."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  server.run(*train(workdir))
  return workdir


def _arrays(step):
  """All arrays of a checkpoint, read by Orbax alone, as bytes by name."""
  arrays = {}
  reader = ocp.PyTreeCheckpointer()
  for item in ('state', 'merged', 'anchor'):
    if not (step / item).is_dir():
      continue
    tree = reader.metadata(step / item).item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
    restored = reader.restore(step / item, restore_args=args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
      name = f'{item}{jax.tree_util.keystr(path)}'
      arrays[name] = np.asarray(leaf).tobytes()
  return arrays


def _lines(path):
  """The lines of a metrics.jsonl, without what a clock decides."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return [line | {'images_per_second': None} for line in lines]


def contents(folder):
  """What commands have left in a folder: anything comparable, by name.

  Of runs the arrays of the last checkpoint, as the one before may be of a step
  that a signal came in, and the metrics; of all else the bytes.
  """
  values = {}
  for path in sorted(folder.rglob('*')):
    name = str(path.relative_to(folder))
    if path.name == 'checkpoints':
      steps = [int(x.name) for x in path.iterdir() if x.name.isdecimal()]
      values[name] = _arrays(path / str(max(steps))) if steps else {}
    elif path.name == 'metrics.jsonl':
      values[name] = _lines(path)
    elif path.is_file() and not re.search(_OF_RUNS, name):
      values[name] = path.read_bytes()
  return values


class Target:
  """A command, and the folder that it writes in.

  Attributes:
    argv: its arguments.
    folder: where.
    writes: what.
    expected: all that it writes if nothing happens to it, as `written` has it.
    seconds: that it takes.
  """

  def __init__(self, argv, folder, writes, run, server):
    self.argv, self.folder, self.writes = argv, folder, writes
    self._run = run
    num_programs = -1
    while num_programs != (num_programs := server.num_programs()):
      self.begin()  # again, if it has compiled
      start = time.monotonic()
      server.run(*argv)
      self.seconds = time.monotonic() - start
    self.expected = self.written()

  def begin(self):
    """Makes the folder as it is before the command."""
    shutil.rmtree(self.folder, ignore_errors=True)
    if self.writes.on_run:
      shutil.copytree(self._run, self.folder)
    else:
      self.folder.mkdir(parents=True)

  def written(self):
    """What the command has written, by name."""
    return {
      name: value
      for name, value in contents(self.folder).items()
      if re.match(self.writes.names, name)
    }

  def left_over(self):
    """The names of what is incomplete or locked."""
    return [
      str(path.relative_to(self.folder))
      for path in self.folder.rglob('*')
      if re.search(r'^\.|tmp|partial|incomplete|^stacks$', path.name)
    ]


@pytest.fixture(scope='session')
def target(server, train, family, undisturbed, tmp_path_factory):
  """Makes the `Target` of a command, in a folder of this name."""
  known, parent = {}, tmp_path_factory.mktemp('targets')

  def arguments(name, folder):
    _, _, config, _, *flags = train(folder)
    workdir, out = f'--workdir={folder}', folder / 'out'
    paths = ['--anchor', family[0], '--models', *family[1:], '--output', out]
    grid = [f'--config.{key}={value}' for key, value in GRID.items()]
    results = f'--output={folder}/results.json'
    return {
      'merge': [CLI, 'merge', *paths],
      'convert': [CLI, 'convert', undisturbed, out, '--format=huggingface'],
      'evaluate': [CLI, 'evaluate', f'--workdir={undisturbed}', results],
      'report': [CLI, 'report', workdir],
      'data check': [CLI, 'data', 'check', '--all'],
      'train': train(folder),
      'demo': [CLI, 'demo', workdir, '--seeds=1', *flags],
      'soups': ['experiments.soups', config, workdir, *flags, *grid],
      'geometry': ['experiments.geometry', workdir, '--only=consistency'],
    }[name]

  def make(name, folder=None, argv=None):
    path = parent / (folder or name)
    if (name, path) not in known:
      full = argv and [CLI, 'data', *(str(x).format(folder=path) for x in argv)]
      known[name, path] = Target(
        full or arguments(name, path), path, WRITES[name], undisturbed, server
      )
    return known[name, path]

  return make


@pytest.fixture(scope='session')
def explained():
  """Tells if a process ended as documented, after a signal or before.

  By SIGTERM or SIGINT itself only when it was done, and its handlers gone.
  """

  def check(code, text, number, *, done):
    if 'Traceback' in text:
      return False
    if code == 0 or (code == -number and (done or number == signal.SIGKILL)):
      return True
    name = signal.Signals(number).name
    line = text.rstrip('\n').split('\n')[-1].split('\r')[-1]
    return code == 128 + number and re.fullmatch(
      rf'(modelstock|python -m) [\w.]+: (interrupted by {name}\.|{name} at '
      r'step \d+: the run is saved in \S+\. Rerun the same command to '
      r'resume\.)',
      line,
    )

  return check
