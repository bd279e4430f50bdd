"""The examples that train a network of their own, on two devices.

Each is trained, cut off and resumed, merged again in float64 by equation 3;
its checkpoint is read by plain Orbax.
"""

import functools
import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from modelstock_jax.report import comparison
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import setup as setup_lib

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / 'docs' / 'examples'
NAMES = sorted(path.stem for path in FOLDER.glob('train_*.py'))


@pytest.fixture(scope='module', params=NAMES)
def example(request):
  """An example as a module, on two devices, and its program compiled once."""
  spec = importlib.util.spec_from_file_location(
    request.param, FOLDER / f'{request.param}.py'
  )
  module = importlib.util.module_from_spec(spec)
  devices = jax.devices()[:2]
  with (
    jax.numpy_dtype_promotion('standard'),  # as readers have it
    jax.numpy_rank_promotion('allow'),
    pytest.MonkeyPatch.context() as patch,
  ):
    spec.loader.exec_module(module)
    patch.setattr(jax, 'devices', lambda: devices)
    config = module.get_config()
    config.log.every_steps = 8
    module.get_config = lambda: config
    setup = setup_lib.prepare(
      config,
      module.get_task(config),
      module.get_optimizer(config),
      module.get_source(config),
    )
    patch.setattr(setup_lib, 'prepare', lambda *arguments: setup)
    yield module, setup


@pytest.fixture(scope='module')
def trained(example, tmp_path_factory):
  """The workdir of a run and its result."""
  workdir = tmp_path_factory.mktemp('run')
  return workdir, example[0].main(workdir)


def records(workdir, kind):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, lines) if x['kind'] == kind]


def test_it_learns_on_all_devices(example, trained):
  _, setup = example
  workdir, result = trained
  assert len(jax.tree.leaves(result.models)[0].sharding.device_set) == 2
  first, *_, last = records(workdir, 'validation')
  select = setup.task.select
  assert last[select] > first[select]
  means = [
    setup.evaluate.validate(params, variables, setup.sources.validation, None)
    for params, variables in [
      (setup.anchor, setup.variables),
      (result.merged.params, result.variables),
    ]
  ]
  assert means[1][select] > means[0][select]
  losses = [np.mean(line['loss']) for line in records(workdir, 'train')]
  assert losses[-1] < losses[0]
  record = setup.sources.train[0]
  assert record.keys() == setup.task.example.keys()
  for name, spec in setup.task.example.items():
    assert (record[name].shape, record[name].dtype) == (spec.shape, spec.dtype)


def test_the_merge_is_that_of_equation_3(example, trained):
  _, setup = example
  anchor, models, merged = (
    jax.tree.leaves(tree)
    for tree in (setup.anchor, trained[1].models, trained[1].merged.params)
  )
  for a, stack, got in zip(anchor, models, merged, strict=True):
    w0, ws = np.asarray(a, np.float64), np.asarray(stack, np.float64)
    left, right = ws - w0
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    cosine = np.clip(np.sum(left * right) / norms, 0, 1)
    t = 2 * cosine / (1 + cosine)
    expected = t * ws.mean(0) + (1 - t) * w0
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_variables_are_the_mean_over_models(example, trained, restore_run):
  module, setup = example
  workdir, result = trained
  state = restore_run(module.get_config(), workdir, setup).state
  leaves = jax.tree.leaves(state.variables)
  assert bool(leaves) == (module.__name__ == 'train_linen')
  for stack, got in zip(leaves, jax.tree.leaves(result.variables), strict=True):
    assert (stack[0] != stack[1]).any()
    expected = np.asarray(stack, np.float64).mean(0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_it_resumes_bit_for_bit(example, trained, tmp_path, monkeypatch):
  module, setup = example
  _, expected = trained
  cut_at = expected.step - 3  # in the last epoch, after a checkpoint
  calls = []

  def train(*arguments):
    calls.append(1)
    if len(calls) == cut_at:
      raise RuntimeError('a power cut')
    return setup.programs.train(*arguments)

  cut = setup._replace(programs=setup.programs._replace(train=train))
  with monkeypatch.context() as patch:
    patch.setattr(setup_lib, 'prepare', lambda *arguments: cut)
    with pytest.raises(RuntimeError, match='power'):
      module.main(tmp_path)
  resumed = []

  def resume(*arguments):
    resumed.append(1)
    return setup.programs.train(*arguments)

  again = setup._replace(programs=setup.programs._replace(train=resume))
  with monkeypatch.context() as patch:
    patch.setattr(setup_lib, 'prepare', lambda *arguments: again)
    result = module.main(tmp_path)
  assert len(resumed) < expected.step
  for ours, theirs in zip(
    jax.tree.leaves(result), jax.tree.leaves(expected), strict=True
  ):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_orbax_alone_reads_the_merge(trained, tmp_path, monkeypatch):
  """As the page says, with its own lines."""
  page = (ROOT / 'docs' / 'checkpoints.md').read_text('utf-8')
  (block,) = re.findall(r'```py title="read_merged.py"\n(.*?)```', page, re.S)
  workdir, result = trained
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'mine').symlink_to(workdir)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(block, names)
  assert names['merged'].keys() == {'params', 'cosine', 'ratio'}
  sort = functools.partial(sorted, key=lambda x: (x.shape, x.tobytes()))
  for name in ('params', 'cosine', 'ratio'):
    ours, theirs = (
      sort(np.asarray(x) for x in jax.tree.leaves(tree))
      for tree in (names['merged'][name], getattr(result.merged, name))
    )
    assert len(ours) == len(theirs) > 0
    for left, right in zip(ours, theirs, strict=True):
      assert (left.dtype, left.tobytes()) == (right.dtype, right.tobytes())


def test_a_config_file_is_evaluated_on_its_examples(example, trained):
  _, setup = example
  workdir, result = trained

  def evaluate():
    config = config_lib.from_json(workdir / 'config.json')
    return comparison.evaluate(
      workdir, config, setup.task, sources=setup.sources
    )

  if setup.task.select != 'accuracy':
    with pytest.raises(ValueError, match="there is no 'accuracy' among"):
      evaluate()
    return
  before, *between, after = evaluate().rows
  assert (before.method, after.method) == (
    'zero_shot',
    'model_stock_epoch_reset',
  )
  assert [row.method for row in between] == [
    'fine_tuned_restarted',
    'fine_tuned_2_restarted',
    'uniform_soup_restarted',
    'wise_ft_0.5_restarted',
  ]
  assert after.benchmark == 'validation'
  assert after.n == len(setup.sources.validation)
  means = setup.evaluate.validate(
    result.merged.params, result.variables, setup.sources.validation, None
  )
  assert after.accuracy == pytest.approx(means['accuracy'], abs=1e-6)
