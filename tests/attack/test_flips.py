"""Seeded damage of a run's checkpoint: noticed, or without effect."""

import logging
import shutil

import jax
import numpy as np
import pytest

from modelstock_jax.formats import detect
from modelstock_jax.formats import runs
from modelstock_jax.training import loop

pytestmark = pytest.mark.attack


@pytest.fixture(scope='module')
def config(tiny_config):
  return tiny_config()


@pytest.fixture(scope='module')
def run(config, setup, tmp_path_factory):
  """The workdir of a run with checkpoints of steps 8 and 12: to copy."""
  workdir = tmp_path_factory.mktemp('run')
  loop.train(config, workdir, setup=setup)
  return workdir


def bits(tree):
  """The bytes of all leaves, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(k): np.array(x).tobytes() for k, x in leaves}


@pytest.fixture(scope='module')
def readers(config, setup, restore_run):
  """What reads the latest checkpoint of a workdir: its step, and all values."""

  def train(workdir):
    checkpoint = restore_run(config, workdir, setup)
    return int(checkpoint.state.step), bits(checkpoint.raw_items)

  def evaluate(workdir):
    step = runs.find(workdir)
    variables = runs.read(step, runs.STATE, part='variables')
    return int(step.name), bits([runs.read(step), variables])

  def merge(workdir):
    tensors = detect.read(workdir).tensors
    values = {name: x.load() for name, x in tensors.items()}
    return int(runs.find(workdir).name), bits(values)

  return {'train': train, 'evaluate': evaluate, 'merge': merge}


def damage(step, rng):
  """Flips a bit of a file, cuts it or removes it: its path, what is done."""
  files = sorted(path for path in step.rglob('*') if path.is_file())
  sizes = np.array([path.stat().st_size for path in files])
  by_size = sizes / sizes.sum() if rng.random() < 0.5 else None
  path = files[rng.choice(len(files), p=by_size)]
  content = bytearray(path.read_bytes())
  at = int(rng.integers(len(content)))
  share = rng.random()
  if share < 0.8:
    content[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return path, f'bit of byte {at}'
  if share < 0.9:
    path.write_bytes(content[:at])
    return path, f'cut at byte {at}'
  path.unlink()
  return path, 'removed'


def paths(folder):
  return {*folder.rglob('*')}


def test_flips(run, readers, tally, scaled, tmp_path, caplog):
  expected = {name: {12: read(run)[1]} for name, read in readers.items()}
  earlier = shutil.copytree(run, tmp_path / 'earlier')
  shutil.rmtree(earlier / 'checkpoints' / '12')
  expected['train'][8] = readers['train'](earlier)[1]
  caplog.set_level(logging.WARNING, 'modelstock_jax')

  def outcome(number):
    rng = np.random.default_rng((7, number))
    workdir = shutil.copytree(run, tmp_path / str(number))
    path, what = damage(workdir / 'checkpoints' / '12', rng)
    what = f'{path}, {what}'
    reader = [*readers][number % len(readers)]
    before = paths(workdir)
    caplog.clear()
    values, text = None, ''
    try:
      step, values = readers[reader](workdir)
    except (ValueError, OSError) as error:
      text = str(error)
    except Exception as error:
      return 'traceback', f'{what}: {error!r}'
    if reader == 'train':
      text += caplog.text
      assert values is not None, what
    elif paths(workdir) != before:
      return 'written', what
    shutil.rmtree(workdir)
    if values is not None and values != expected[reader].get(step):
      return 'wrong', what
    if values is not None and step == 12:
      return 'read', what
    # Damaged hashes name the file that they no longer fit.
    named = str(path.parent if path.name.startswith('sha256') else path)
    return ('refused' if named in text else 'traceback'), f'{what}: {text}'

  outcomes = (outcome(number) for number in range(scaled(200)))
  assert tally('checkpoint', outcomes)['refused'], 'nothing was damaged'
