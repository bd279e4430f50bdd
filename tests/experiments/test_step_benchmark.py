"""The benchmarks of training at a size where they take seconds."""

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
from modelstock_jax import data

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
  """Runs a script; its JSON, and what it printed."""
  lines = ['import sys', *(f'sys.modules[{name!r}] = None' for name in absent)]
  (tmp_path / 'sitecustomize.py').write_text('\n'.join(lines))
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  environment['PYTHONPATH'] = str(tmp_path)
  result = tmp_path / 'result.json'
  done = subprocess.run(
    [sys.executable, FOLDER / script, *flags, f'--json={result}'],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(result.read_text()), done.stdout


def test_step_runs_where_nothing_reads_images(tmp_path):
  found, text = run(
    tmp_path,
    'step.py',
    *('--size=tiny', '--batch=2', '--repeats=2', '--steps=2'),
    *('--dtype', 'float32', '--rows', 'side_by_side', 'torch'),
    absent=ABSENT,
  )
  [case] = found['cases']
  assert set(case['rows']) == {'side_by_side'}
  assert set(case['failed']) == {'torch'}
  # 16 patches of 8 x 8 x 3 numbers and a class token: 17 tokens of 64 features
  # in 2 blocks, an embedding of 32, 1000 classes. All products count three
  # times, that of the patches twice.
  block = 12 * 17 * 64**2 + 2 * 17**2 * 64
  patches = 16 * 192 * 64
  products = 2 * patches + 3 * (2 * block + 64 * 32 + 32 * 1000)
  assert case['flops_per_image'] == 2 * products
  for row in case['rows'].values():
    assert 0 < row['min_ms'] <= row['median_ms']
    images_per_s = 2 * 2 / (row['min_ms'] / 1e3)
    assert row['images_per_s'] == pytest.approx(images_per_s)
    share = images_per_s * 2 * products / case['matmul_flops']
    assert row['mfu'] == pytest.approx(share)  # no data sheet of a CPU
    assert row['peak_bytes'] > 1e8  # a process with jax in it
  assert 'torch: not measured: torch' in text


def test_overheads_run(tmp_path):
  found, text = run(
    tmp_path,
    'overheads.py',
    *('--size=tiny', '--batch=2', '--repeats=1', '--saves=1', '--starts=1'),
    f'--scratch={tmp_path}',
  )
  assert found['missing'] is None
  assert 0 < found['save_blocks']['min_ms'] <= found['save']['min_ms']
  assert found['epoch_s'] == pytest.approx(
    1_281_167 // 2 * found['step']['min_ms'] / 1e3
  )
  # float32 weights and two moments of two models, counts, and the merge.
  leaves = 4 * _parameters_of_tiny()
  assert found['checkpoint_bytes'] == (2 * 3 + 1) * leaves + 2 * 4
  cold, again = (found['starts_s'][k] for k in ('cold', 'restart'))
  assert 'create' in cold
  assert 'restore' in again
  for parts in (cold, again):
    total = parts.pop('total')
    assert total == pytest.approx(sum(parts.values()))
  assert 'restart / cold start' in text


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
  single = programs.classifier('tiny', 'float32')
  placement = programs.place(2)
  built = programs.build(single.recipe, placement)
  anchor = jax.jit(single.model.init)(jax.random.key(0))
  both = programs.batch('tiny', 2)
  state = programs.create(built, anchor)
  batch = jax.device_put(both, placement.batch)
  for _ in range(3):  # warm-up starts from a learning rate of 0
    state, metrics = built.train(state, batch, anchor, (), {})
  train_one = jax.jit(lambda *args: step.train_one(single, *args))
  for i in range(2):
    one = step.One(jax.numpy.int32(0), anchor, single.optimizer.init(anchor))
    own = {k: v[i] for k, v in both.items()}
    for _ in range(3):
      one, (loss, _, norm) = train_one(one, own)
    assert loss == pytest.approx(float(metrics['loss'][i]), rel=1e-5)
    assert norm == pytest.approx(float(metrics['grad_norm'][i]), rel=1e-4)
    moved = 0.0
    for start, left, right in zip(
      *map(jax.tree.leaves, (anchor, one.params, state.params)), strict=True
    ):
      moved = max(moved, float(abs(left - start).max()))
      # Steps are 6e-8 and 12e-8 long; Adam may turn a gradient of rounding.
      np.testing.assert_allclose(left, right[i], rtol=0, atol=5e-7)
    assert moved > 0


def test_normalize_is_that_of_the_data(scripts):
  programs = scripts('programs')
  images = programs.batch('tiny', 2)['image']
  ours = jax.jit(programs.normalize)(images)
  expected = jax.jit(lambda x: data.normalize(x, programs.MEAN, programs.STD))
  np.testing.assert_allclose(ours, expected(images), rtol=1e-6)


def test_rows_that_compute_something_else_are_an_error(scripts):
  step = scripts('step')
  case = step.Case('tiny', 'float32', 2, ('one', 'torch'), pathlib.Path())
  first = {'one': np.array([6.9, 1.0]), 'torch': np.array([6.9, 1.01])}
  ready = step.Ready({}, {}, first, {}, 1e-6)
  with pytest.raises(ValueError, match=r'torch: loss and norm .* 1\.01'):
    step._check(case, ready)
  ready = ready._replace(first={}, logits_error=1e-3)
  with pytest.raises(ValueError, match=r'float32 are off by 1\.0e-03'):
    step._check(case, ready)
  step._check(case, ready._replace(logits_error=1e-5))


def test_ratios_are_of_the_least_times(scripts):
  times = {'side_by_side': 3, 'two_singles': 4, 'one': 2, 'torch': 5}
  rows = {row: {'min_ms': time} for row, time in times.items()}
  assert scripts('step_table').ratios({'rows': rows}) == {
    'side_by_side / two_singles': 0.75,
    'torch / one': 2.5,
  }


@pytest.mark.parametrize(
  ('kind', 'dtype', 'peak'),
  [
    ('NVIDIA H200', 'bfloat16', 989e12),
    ('NVIDIA A100-SXM4-80GB', 'bfloat16', 312e12),
    ('TPU v5 lite', 'bfloat16', 197e12),
    ('NVIDIA H200', 'float32', None),
    ('cpu', 'bfloat16', None),
  ],
)
def test_peaks_of_data_sheets(scripts, kind, dtype, peak):
  assert scripts('step_table').peak(kind, dtype) == peak
