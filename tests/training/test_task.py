"""A task that is no CLIP: batch statistics, dropout, and data in memory."""

import functools
import json

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from modelstock_jax import data
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop
from modelstock_jax.training import optimizer
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import sharding
from modelstock_jax.training import step as step_lib
from modelstock_jax.training import task as task_lib

N, B, FEATURES, CLASSES = 2, 16, 6, 3
MOMENTUM = 0.9


def init(key):
  """A linear classifier of inputs that are normalised by running means."""
  kernel = 0.1 * jax.random.normal(key, (FEATURES, CLASSES))
  params = {'kernel': kernel, 'bias': jnp.zeros(CLASSES)}
  return params, {'mean': jnp.zeros(FEATURES), 'count': jnp.int32(0)}


def predict(params, variables, batch):
  inputs = batch['x'] - variables['mean'][None]
  return inputs @ params['kernel'] + params['bias'][None]


def loss(params, variables, batch, key, anchor, consts):
  del anchor, consts
  mean = batch['x'].mean(0)
  kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.9, mean.shape)
  inputs = (batch['x'] - mean[None]) * kept.astype(jnp.float32)[None]
  logits = inputs @ params['kernel'] + params['bias'][None]
  value = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['label']
  ).mean()
  variables = {
    'mean': MOMENTUM * variables['mean'] + (1 - MOMENTUM) * mean,
    'count': variables['count'] + 1,
  }
  return value, ({'margin': logits.max(-1).mean()}, variables)


def score(params, variables, batch):
  right = predict(params, variables, batch).argmax(-1) == batch['label']
  return {'accuracy': right.astype(jnp.float32)}


TASK = task_lib.Task(
  init=init,
  loss=loss,
  score=score,
  example={
    'x': jax.ShapeDtypeStruct((FEATURES,), jnp.float32),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
  },
  predict=predict,
)
SGD = optimizer.from_optax(optax.sgd(1.0, momentum=0.5))


def sources(number=3 * B):
  """Classes that can be told apart, far from the origin."""
  rng = np.random.default_rng(0)
  label = np.arange(number, dtype=np.int32) % CLASSES
  x = 5 + np.eye(CLASSES, FEATURES)[label] * 4 + rng.normal(size=(number, 1))
  arrays = {'x': x.astype(np.float32), 'label': label}
  source = data.ArraySource('blobs', arrays, tuple('abc'))
  return setup_lib.Sources(source, source)


def configured(**changes):
  flags = {
    'train.epochs': 4,
    'train.batch_size': B,
    'train.learning_rate': 0.3,
    'train.warmup_steps': 1,
    'evaluate.batch_size': 32,
    'log.every_steps': 1,
    **{key.replace('__', '.'): value for key, value in changes.items()},
  }
  return config_lib.override(
    config_lib.defaults(), [f'--config.{k}={v}' for k, v in flags.items()]
  )


@pytest.fixture(scope='module', autouse=True)
def two_devices():
  devices = jax.devices()[:2]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: devices)
    yield


def prepare(config, task=TASK):
  return setup_lib.prepare(config, task, SGD, sources())


@pytest.fixture(scope='module')
def setup():
  return prepare(configured())


@pytest.fixture(scope='module')
def trained(setup, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return workdir, loop.train(configured(), workdir, setup=setup)


def records(workdir, kind):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, lines) if x['kind'] == kind]


def test_a_task_of_a_user_is_trained_and_merged(trained):
  workdir, result = trained
  assert result.step == 12
  assert records(workdir, 'validation')[-1]['accuracy'] == 1
  steps = records(workdir, 'train')
  assert len(steps) == 12
  assert {len(line['margin']) for line in steps} == {N}
  merges = records(workdir, 'merge')
  assert set(merges[-1]['ratio']) == {'kernel', 'bias'}


def test_the_merge_has_the_mean_of_the_statistics(trained, setup):
  _, result = trained
  # After every merge all models go on from the mean.
  batches = setup_lib.read_batches(
    configured(), setup.sources, setup.placement, range(N)
  )
  mean = np.zeros((N, FEATURES))
  for step in range(1, 13):
    x = np.asarray(next(batches)['x'], np.float64)
    mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean(1)
    if step % 3 == 0:
      mean = np.broadcast_to(mean.mean(0), mean.shape)
  batches.close()
  np.testing.assert_allclose(result.variables['mean'], mean[0], rtol=1e-5)
  assert result.variables['count'].dtype == jnp.int32
  assert int(result.variables['count']) == 12


def test_an_evaluation_takes_the_statistics(trained, setup):
  _, result = trained
  means = setup.evaluate.validate(
    result.merged.params, result.variables, setup.sources.validation, None
  )
  assert means == {'accuracy': 1.0, 'n': 48}
  wrong = {**result.variables, 'mean': jnp.zeros(FEATURES).at[0].set(100.0)}
  means = setup.evaluate.validate(
    result.merged.params, wrong, setup.sources.validation, None
  )
  assert means['accuracy'] < 1


def test_it_resumes_bit_for_bit(trained, setup, tmp_path):
  _, expected = trained
  calls = []

  def train(*arguments):
    calls.append(1)
    if len(calls) == 8:
      raise RuntimeError('a power cut')
    return setup.programs.train(*arguments)

  cut = setup._replace(programs=setup.programs._replace(train=train))
  with pytest.raises(RuntimeError, match='power'):
    loop.train(configured(), tmp_path, setup=cut)
  result = loop.train(configured(), tmp_path, setup=setup)
  for ours, theirs in zip(
    jax.tree.leaves(result), jax.tree.leaves(expected), strict=True
  ):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_parts_of_a_batch_hand_on_the_statistics_and_draw_anew(setup):
  config = configured(train__accumulate=2)
  full, cut = setup, prepare(config)
  batch = next(iter(_batches(setup)))
  states = []
  for prepared in (full, cut):
    state = prepared.programs.create(
      prepared.anchor, prepared.variables, np.uint32(0), np.arange(N)
    )
    state, metrics = prepared.programs.train(
      state, batch, prepared.anchor, prepared.consts, {}
    )
    states.append(jax.device_get((state.variables, metrics)))
  (one, _), (two, _) = states
  np.testing.assert_array_equal(one['count'], [1, 1])
  np.testing.assert_array_equal(two['count'], [2, 2])
  x = np.asarray(batch['x'], np.float64)
  # Each of the two devices cuts its own rows.
  rows = x.reshape(N, 2, 2, B // 4, FEATURES).swapaxes(1, 2)
  first, second = rows.reshape(N, 2, B // 2, FEATURES).mean(2).swapaxes(0, 1)
  expected = MOMENTUM * (1 - MOMENTUM) * first + (1 - MOMENTUM) * second
  np.testing.assert_allclose(two['mean'], expected, rtol=1e-5)


def _batches(setup):
  reader = setup_lib.read_batches(
    configured(), setup.sources, setup.placement, range(N)
  )
  batch = sharding.to_global(next(reader), setup.placement.batch)
  reader.close()
  yield batch


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'loss': lambda *a: (loss(*a)[0][None], loss(*a)[1])},
      r'the loss is float32\[1\], not float32\[\]',
    ),
    (
      {'loss': lambda *a: (loss(*a)[0], ({'x': jnp.int32(1)}, loss(*a)[1][1]))},
      r"metric 'x' is int32\[\], not float32\[\]",
    ),
    (
      {'loss': lambda *a: (loss(*a)[0], ({}, {'mean': jnp.zeros(6)}))},
      r"variables\['count'\]: int32\[\] before the step, absent after it",
    ),
    (
      {'init': lambda key: ({**init(key)[0], 'ids': jnp.arange(3)}, {})},
      r"params\['ids'\] is int32\[3\], which cannot be trained or merged",
    ),
    (
      {'score': lambda *a: {'accuracy': score(*a)['accuracy'].mean()}},
      r"Task.score: 'accuracy' is float32\[\]; return one number for each",
    ),
    (
      {'select': 'recall'},
      r"Task.select: 'recall' is none of the scores .*'accuracy'",
    ),
  ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
  task = TASK._replace(**change)
  config = configured(train__epochs=1)
  setup = functools.partial(prepare, config, task)
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path, setup=setup)


def test_one_part_of_the_params_can_be_trained_alone():
  head = optimizer.only('bias', SGD)
  recipe = step_lib.Recipe(TASK, head, lambda step, hyper: jnp.float32(0.1))
  placement = sharding.place(stock=1, batch_size=B)
  programs = step_lib.compile_programs(recipe._replace(num_models=N), placement)
  params, variables = jax.device_put(
    init(jax.random.key(0)), placement.replicated
  )
  state = programs.create(params, variables, np.uint32(0), np.arange(N))
  batch = {
    'x': np.ones((N, B, FEATURES), np.float32),
    'label': np.zeros((N, B), np.int32),
  }
  batch = jax.device_put(batch, placement.batch)
  state, _ = programs.train(state, batch, params, (), {})
  for model in range(N):
    np.testing.assert_array_equal(
      state.params['kernel'][model], params['kernel']
    )
    assert (state.params['bias'][model] != params['bias']).all()
  assert [x.shape for x in jax.tree.leaves(state.opt_state)] == [(N, CLASSES)]
