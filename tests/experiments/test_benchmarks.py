"""The benchmarks run, at a size that says nothing about speed."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from modelstock_jax import clip

FOLDER = pathlib.Path(__file__).parents[2] / 'experiments' / 'benchmarks'
# What reads images: a machine that is borrowed may not have it.
ABSENT = (
  *('array_record', 'grain', 'simplejpeg', 'tensorflow_datasets'),
  *('ml_collections', 'torch'),
)


@pytest.fixture(scope='module')
def scripts():
  """Imports a script by its name, as one that lies beside it would."""
  sys.path.insert(0, str(FOLDER))
  yield importlib.import_module
  sys.path.remove(str(FOLDER))


def run(tmp_path, script, *flags, absent=()):
  """Runs a script on one device; its rows, and what it printed."""
  lines = ['import sys', *(f'sys.modules[{name!r}] = None' for name in absent)]
  (tmp_path / 'sitecustomize.py').write_text('\n'.join(lines))
  environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
  environment |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
  result = tmp_path / 'result.json'
  done = subprocess.run(
    [sys.executable, FOLDER / script, *flags, f'--json={result}'],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(result.read_text())['rows'], done.stdout


def test_merge(tmp_path):
  flags = ['--size', 'tiny', '--repeats', '1']
  flags += ['--rows', 'list', 'stacked', 'naive']
  rows, printed = run(tmp_path, 'merge.py', *flags, absent=ABSENT)
  by_model = {}
  for row in rows:
    by_model.setdefault(row['model'], {})[row['merge']] = row
    assert row['merge'] in printed
  assert set(by_model) == {'tiny, bfloat16', 'tiny, float32'}
  # The parameters' bytes in GB.
  sizes = {'tiny, float32': 4e-9, 'tiny, bfloat16': 2e-9}
  for model, merges in by_model.items():
    limits = {merges.pop(name)['GB/s'] for name in ('a + b + c -> d', 'copy')}
    assert set(merges) == {
      'list',
      'stacked',
      "list, user's jit",
      "stacked, user's jit",
      'naive',
    }
    for row in merges.values():
      assert row['median ms'] >= row['min ms'] > 0
      # three arrays are read, and read again, and one is written
      moved = 7 * sizes[model] * _parameters_of_tiny()
      rate = moved / (row['min ms'] / 1e3)
      assert row['GB/s'] == pytest.approx(rate)
      assert row['x limit (min)'] == pytest.approx(max(limits) / rate)


def test_rows_that_merge_to_something_else_are_an_error(scripts):
  merge = scripts('merge')
  anchor = {'w': np.zeros((2, 2), np.float32), 'b': np.zeros(2, np.float32)}
  wrong = {**anchor, 'w': anchor['w'] + 1}
  rows = {'list': lambda: anchor, 'stacked': lambda: anchor}
  merge.check(rows, anchor, 'float32')
  with pytest.raises(ValueError, match=r'stacked: 1\.0 from list'):
    merge.check({**rows, 'stacked': lambda: wrong}, anchor, 'float32')


def test_step_runs_where_nothing_reads_images(tmp_path):
  rows, text = run(
    tmp_path,
    'step.py',
    *('--size=tiny', '--batch=2', '--repeats=2', '--steps=2'),
    *('--dtype', 'float32', '--rows', 'side_by_side', 'two_singles'),
    absent=ABSENT,
  )
  two, singles, matmul = rows
  assert [two['row'], singles['row']] == ['side_by_side', 'two_singles']
  # 16 patches of 8 x 8 x 3 numbers and a class token: 17 tokens of 64 features
  # in 2 blocks, an embedding of 32, 1000 classes. All products count three
  # times, that of the patches twice.
  block = 12 * 17 * 64**2 + 2 * 17**2 * 64
  patches = 16 * 192 * 64
  products = 2 * patches + 3 * (2 * block + 64 * 32 + 32 * 1000)
  peak = 2 * 2048**3 / (matmul['min ms'] / 1e3)
  for row in (two, singles):
    assert 0 < row['min ms'] <= row['median ms']
    images_per_s = 2 * 2 / (row['min ms'] / 1e3)
    assert row['images/s'] == pytest.approx(images_per_s)
    assert row['MFU'] == pytest.approx(images_per_s * 2 * products / peak)
    assert row['peak GB'] > 0.1  # a process with jax in it
    assert row['row'] in text
  assert two['each model / two_singles'] == pytest.approx(
    two['min ms'] / singles['min ms']
  )


def test_overheads_run(tmp_path):
  rows, text = run(
    tmp_path,
    'overheads.py',
    *('--size=tiny', '--batch=2', '--repeats=1', '--saves=1'),
  )
  cold, restart = (
    {row['seconds']: row[kind] for row in rows} for kind in ('cold', 'restart')
  )
  for parts in (cold, restart):
    assert all(seconds > 0 for seconds in parts.values())
    assert parts['save, run held up'] <= parts['save, until on disk']
    # float32 weights and two moments of two models, counts, and the merge.
    leaves = 4 * _parameters_of_tiny()
    size = (2 * 3 + 1) * leaves + 2 * 4
    assert parts['checkpoint, GB'] == pytest.approx(size / 1e9)
  assert 'to the end of the first step' in text


def _parameters_of_tiny():
  width, tokens, blocks, embed_dim, classes = 64, 17, 2, 32, 1000
  attention = 4 * (width**2 + width)
  mlp = 2 * 4 * width**2 + 5 * width
  norm = 2 * width
  tower = 192 * width + width + tokens * width + 2 * norm + width * embed_dim
  block = attention + mlp + 2 * norm
  return tower + blocks * block + embed_dim * classes + classes


def test_single_step_is_that_of_the_stack(scripts, monkeypatch):
  # As a baseline it would mean nothing if it computed something else.
  programs, step = scripts('programs'), scripts('step')
  vision = clip.VisionConfig(32, 16, width=16, depth=1, heads=2)
  tiny = clip.CLIPConfig(embed_dim=8, vision=vision, text=None)
  monkeypatch.setitem(programs.SIZES, 'tiny', tiny)
  anchor = programs.anchor('tiny')
  stacked = programs.prepare('tiny', 'float32', 2)
  state = stacked.programs.create(*stacked.start(anchor))
  for _ in range(3):  # warm-up starts from a learning rate of 0
    state, metrics = stacked.programs.train(
      state, stacked.batch, anchor, (), {}
    )
  model = clip.classifier(tiny, programs.CLASSES)
  train_single = jax.jit(lambda *args: step.train_single(model, *args))
  both = programs.batch('tiny', 2)
  for i in range(2):
    single = (jax.numpy.int32(0), anchor, programs.ADAMW.init(anchor))
    batch = {k: v[i] for k, v in both.items()}
    for _ in range(3):
      single, (loss, norm) = train_single(*single, batch)
    assert loss == pytest.approx(float(metrics['loss'][i]), rel=1e-5)
    assert norm == pytest.approx(float(metrics['grad_norm'][i]), rel=1e-4)
    moved = 0.0
    for start, left, right in zip(
      *map(jax.tree.leaves, (anchor, single[1], state.params)), strict=True
    ):
      moved = max(moved, float(abs(left - start).max()))
      # Steps are 6e-8 and 12e-8 long; Adam may turn a gradient of rounding.
      np.testing.assert_allclose(left, right[i], rtol=0, atol=5e-7)
    assert moved > 0


def test_rows_that_compute_something_else_are_an_error(scripts):
  step = scripts('step')
  first = {'one': np.array([6.9, 1.0]), 'torch': np.array([6.9, 1.01])}
  with pytest.raises(ValueError, match=r'torch: loss and norm .* 1\.01'):
    step.check(first, 'float32')
  step.check(first, 'bfloat16')


def test_the_parts_for_a_gpu_give_flags_that_exist(
  scripts, tmp_path, monkeypatch
):
  done = subprocess.run(
    [FOLDER / 'gpu.sh', 'all', tmp_path],
    env={**os.environ, 'PYTHON': 'echo'},
    capture_output=True,
    text=True,
    check=True,
  )
  lines = [line for line in done.stdout.splitlines() if line.endswith('.json')]
  assert len(lines) == 4

  def measure(*_):
    raise RuntimeError('the flags are taken')

  for name in ('setting', 'alone'):
    monkeypatch.setattr(scripts('common'), name, measure)
  for line in lines:
    script, *flags = line.split()
    monkeypatch.setattr('sys.argv', [script, *flags])
    with pytest.raises(RuntimeError, match='the flags are taken'):
      scripts(pathlib.Path(script).stem).main()


def test_import_is_measured_beside_copying(scripts, monkeypatch):
  input_pipeline = scripts('input_pipeline')
  monkeypatch.setattr(os, 'geteuid', lambda: 1)  # caches of others stay
  rows = input_pipeline.import_rows(40, 1, 80, 60)
  assert [row['row'].split(',')[0] for row in rows] == ['cp -r', 'import']
  ratio = rows[0]['min s'] / rows[1]['min s']
  assert rows[1]['speed / copy (min)'] == pytest.approx(ratio)
