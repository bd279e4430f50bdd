"""The trainer against Scenic's own steps, states and metrics."""

import functools

import flax
from flax import jax_utils
import jax
import numpy as np
import pytest

pytestmark = [
  pytest.mark.oracle,
  # Of Scenic's code, and of flax's checkpoints that it uses.
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
]

STEPS = 12  # 3 epochs of 64 images by 16


def leaves(tree):
  return jax.tree.leaves(jax.device_get(tree))


def same_bits(left, right):
  pairs = list(zip(leaves(left), leaves(right), strict=True))
  return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.fixture(scope='module')
def train(scenic, make_config, make_dataset, make_writer, tmp_path_factory):
  """Trains a tiny ViT; returns what the trainer does, and the workdir."""

  def run(workdir=None, *, stop=None, model='ViTClassificationModel', **keys):
    config = make_config(**keys)
    if workdir is None:
      workdir = tmp_path_factory.mktemp('run')
    writer = make_writer()
    state, train_summary, eval_summary = scenic.trainer.train(
      rng=jax.random.PRNGKey(0),
      config=config,
      model_cls=getattr(scenic.models, model),
      dataset=make_dataset(stop=stop),
      workdir=str(workdir),
      writer=writer,
    )
    return dict(
      config=config,
      workdir=workdir,
      state=state,
      train_summary=train_summary,
      eval_summary=eval_summary,
      scalars=writer.scalars,
    )

  return run


@pytest.fixture(scope='module', params=[1, 2], ids=lambda n: f'mesh_stock={n}')
def run(train, request):
  return train(model_stock={'mesh_stock': request.param})


@pytest.fixture(scope='module')
def reference(train):
  return train()


def test_stock_eval_step_gives_the_same_metrics(
  scenic, run, make_dataset, stock_evaluation
):
  model = scenic.models.ViTClassificationModel(
    run['config'], make_dataset().meta_data
  )
  summary, step = stock_evaluation(
    run['workdir'], model, run['config'], make_dataset(), batches=4
  )
  assert step == STEPS
  assert summary == run['eval_summary']
  assert 0 < summary['loss'] < np.log(3)  # it has learnt something


def test_the_state_is_that_of_scenic(scenic, run):
  state = jax_utils.unreplicate(run['state'])
  assert isinstance(state, scenic.train_utils.TrainState)
  assert int(state.global_step) == STEPS
  assert jax.tree.leaves(run['state'].params)[0].shape[0] == 8  # devices
  assert run['train_summary'].keys() == run['eval_summary'].keys()


def test_the_merge_is_that_of_the_paper(scenic, reference, make_dataset):
  # The last merge again, in float64, from the models in their checkpoint.
  config, workdir = reference['config'], reference['workdir']
  _, init = jax.random.split(jax.random.PRNGKey(0))
  model = scenic.models.ViTClassificationModel(config, make_dataset().meta_data)
  anchor, *_ = scenic.train_utils.initialize_model(
    model_def=model.flax_model,
    input_spec=[((-1, 8, 8, 3), np.float32)],
    config=config,
    rngs=init,
  )
  models, _ = scenic.anchors.from_scenic(workdir / f'checkpoint_{STEPS}')
  models = flax.traverse_util.unflatten_dict(models, sep='/')
  from flax.training import checkpoints

  stack = checkpoints.restore_checkpoint(str(workdir / 'models'), None)[
    'params'
  ]
  flat = functools.partial(jax.tree_util.tree_flatten_with_path)
  for (path, w0), w, merged in zip(
    flat(dict(anchor.unfreeze()))[0], leaves(stack), leaves(models), strict=True
  ):
    w0, w = np.float64(w0), np.float64(w)
    d1, d2 = w - w0
    norms = np.linalg.norm(d1) * np.linalg.norm(d2)
    cosine = np.vdot(d1, d2) / norms if norms else 0.0
    cosine = np.clip(cosine, 0, 1)
    t = 2 * cosine / (1 + cosine)
    expected = t * w.mean(0) + (1 - t) * w0
    np.testing.assert_allclose(
      merged, expected, rtol=1e-5, atol=1e-6, err_msg=str(path)
    )


def test_the_models_differ(reference):
  from flax.training import checkpoints

  folder = str(reference['workdir'] / 'models')
  stack = checkpoints.restore_checkpoint(folder, None)
  kernel = stack['params']['embedding']['kernel']
  assert kernel.shape[0] == 2
  assert np.abs(kernel[0] - kernel[1]).max() > 1e-3  # other data, other noise


def test_cosines_and_ratios_are_written(reference):
  merges = {
    step: scalars
    for step, scalars in reference['scalars']
    if 'merge_ratio' in scalars
  }
  assert sorted(merges) == [4, 8, 12]
  for scalars in merges.values():
    cosine = scalars['cosine/embedding/kernel']
    assert -1 <= cosine <= 1
    ratio = scalars['ratio/embedding/kernel']
    clipped = max(cosine, 0)
    assert ratio == pytest.approx(2 * clipped / (1 + clipped), abs=1e-6)


def test_summaries_at_the_steps_of_scenic(reference):
  steps = [s for s, scalars in reference['scalars'] if 'valid_loss' in scalars]
  assert steps == [1, 5, 9, 12]
  steps = [s for s, scalars in reference['scalars'] if 'train_loss' in scalars]
  assert steps == [1, 2, 5, 9, 12]  # 2: Scenic logs while it warms up


# Not Adam, which makes steps of full length of gradients that are nothing but
# rounding (of the keys' biases).
MOMENTUM = dict(optimizer='momentum', optimizer_configs={'momentum': 0.9})


@pytest.mark.parametrize(('mesh_stock', 'dropout'), [(1, 0.1), (2, 0.0)])
def test_a_step_is_that_of_separate_trainings(
  scenic, make_config, make_dataset, mesh_stock, dropout
):
  # With devices of its own each model has four, whose dropout is not that of
  # Scenic's eight: without it the step is the same.
  config = make_config(model_stock={'mesh_stock': mesh_stock}, **MOMENTUM)
  config.model.dropout_rate = dropout
  compare_steps(scenic, config, make_dataset(), 'ViT', steps=4)


def test_running_statistics(scenic, make_config, make_dataset):
  # Each device normalises by its own images, as in Scenic's pmap.
  config = make_config(num_layers=11, num_filters=4, **MOMENTUM)
  compare_steps(scenic, config, make_dataset(pixels=32), 'ResNet', steps=2)


def compare_steps(scenic, config, dataset, kind, steps):
  """Our step of two models, and Scenic's pmapped step of each alone."""
  from scenic.model_lib import models as scenic_models
  from scenic.train_lib import lr_schedules
  from scenic.train_lib import optimizers

  trainer, utils = scenic.classification_trainer, scenic.train_utils
  model_cls = scenic.models.ViTClassificationModel
  if kind == 'ResNet':
    model_cls = scenic_models.get_model_cls('resnet_classification')
  model = model_cls(config, dataset.meta_data)
  params, model_state, _, _ = utils.initialize_model(
    model_def=model.flax_model,
    input_spec=[(dataset.meta_data['input_shape'], np.float32)],
    config=config,
    rngs=jax.random.PRNGKey(1),
  )
  model_state = dict(model_state.unfreeze())
  assert bool(model_state) == (kind == 'ResNet')
  lr_fn = lr_schedules.get_learning_rate_fn(config)
  tx = optimizers.get_optimizer(
    optimizers.get_optax_optimizer_config(config), lr_fn, params=params
  )
  options = scenic.options.read(config)
  layout = scenic.step.lay_out(options, config.batch_size)
  programs = scenic.step.compile_programs(
    model, tx, lr_fn, config, options, layout
  )
  key = jax.random.PRNGKey(5)
  ours = programs.create(
    *jax.device_put((params, model_state, key), layout.replicated)
  )
  stock_step = jax.pmap(
    functools.partial(
      trainer.train_step,
      flax_model=model.flax_model,
      loss_fn=model.loss_function,
      lr_fn=lr_fn,
      metrics_fn=model.get_metrics_fn('train'),
      config=config,
    ),
    axis_name='batch',
  )
  theirs = [
    jax_utils.replicate(
      utils.TrainState(
        tx=tx,
        params=params,
        opt_state=tx.init(params),
        model_state=model_state,
        global_step=0,
        rng=rng,
        metadata={},
      )
    )
    for rng in jax.random.split(key, 2)
  ]
  for _ in range(steps):
    batches = [next(dataset.train_iter) for _ in range(2)]
    batch = scenic.step.train_batch(batches, layout)
    ours, metrics, logs = programs.train(ours, batch)
    for i, alone in enumerate(batches):
      theirs[i], expected, expected_logs = stock_step(theirs[i], alone)
      for name, (value, count) in utils.unreplicate_and_get(expected).items():
        np.testing.assert_allclose(metrics[name][0][i], value, rtol=1e-4)
        np.testing.assert_array_equal(metrics[name][1][i], count)
      for name, value in utils.unreplicate_and_get(expected_logs).items():
        np.testing.assert_allclose(logs[name][i], value, rtol=1e-3)
  for i, state in enumerate(theirs):
    state = jax_utils.unreplicate(utils.sync_model_state_across_replicas(state))
    for field in ('params', 'model_state'):
      mine = jax.tree.map(lambda x, i=i: x[i], getattr(ours, field))
      for a, b in zip(leaves(mine), leaves(getattr(state, field)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
    np.testing.assert_array_equal(ours.rng[i], state.rng)
  moved = [
    np.abs(a - b[0]).max()
    for a, b in zip(leaves(params), leaves(ours.params), strict=True)
  ]
  assert max(moved) > 1e-3


@pytest.mark.parametrize('mesh_stock', [1, 2])
def test_batches_of_the_devices_and_of_the_host(
  scenic, make_config, make_dataset, mesh_stock
):
  # Scenic's datasets hand out either.
  options = scenic.options.read(
    make_config(model_stock={'mesh_stock': mesh_stock})
  )
  layout = scenic.step.lay_out(options, 16)
  host = [next(make_dataset(seed=seed).train_iter) for seed in range(2)]
  there = list(jax_utils.prefetch_to_device(iter(host), 2))
  assert isinstance(there[0]['inputs'], jax.Array)
  for batches in (host, there):
    batch = scenic.step.train_batch(batches, layout)
    assert batch['inputs'].sharding.is_equivalent_to(layout.batch, 5)
    for model in range(2):
      for name, value in host[model].items():
        expected = value.reshape(16, *value.shape[2:])
        np.testing.assert_array_equal(batch[name][model], expected)
  for batch in (host[0], there[0]):
    placed = scenic.step.eval_batch(batch, layout)
    assert placed['label'].sharding.is_equivalent_to(layout.examples, 1)
    np.testing.assert_array_equal(placed['label'], host[0]['label'].ravel())


def test_a_resumed_run_ends_the_same(train, reference, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, stop=2 * 7)  # in the middle of the second epoch
  assert (tmp_path / 'checkpoint_5').exists()
  assert not (tmp_path / 'checkpoint_9').exists()
  again = train(tmp_path)
  assert same_bits(again['state'], reference['state'])
  assert again['eval_summary'] == reference['eval_summary']
  first = min(s for s, scalars in again['scalars'] if 'train_loss' in scalars)
  assert first > 5


def test_a_finished_run_is_evaluated(train, reference):
  again = train(reference['workdir'])
  assert again['train_summary'] is None
  assert again['eval_summary'] == reference['eval_summary']
  assert same_bits(again['state'], reference['state'])


def test_other_workdirs_are_refused(
  train, reference, scenic, write_checkpoint, tmp_path
):
  with pytest.raises(ValueError, match='holds 2 models'):
    train(reference['workdir'], model_stock={'num_models': 3})
  params, _ = scenic.anchors.from_scenic(reference['workdir'])
  params = flax.traverse_util.unflatten_dict(params, sep='/')
  write_checkpoint(tmp_path, params, step=3)
  with pytest.raises(ValueError, match='checkpoint_3 is a checkpoint without'):
    train(tmp_path)


@pytest.mark.parametrize('opt_state', ['average', 'reset'])
def test_optimizers_at_a_merge(train, opt_state):
  actual = train(model_stock={'opt_state': opt_state}, num_training_epochs=2)
  assert np.isfinite(actual['eval_summary']['loss'])


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'init_from': {'x': 1}}, 'config.init_from'),
    ({'num_training_steps': 3}, 'num_training_epochs and num_training_steps'),
    ({'batch_size': 12}, 'batch_size: 12'),
    ({'model_stock': {'merge_evry': 1}}, 'nearest is model_stock.merge_every'),
    ({'model_stock': {'num_models': 1}}, 'num_models: must be at least 2'),
    ({'model_stock': {'num_models': 3, 'mesh_stock': 3}}, 'do not divide 8'),
  ],
)
def test_configs_that_cannot_be(train, keys, message):
  with pytest.raises(ValueError, match=message):
    train(**keys)


def test_a_loss_that_is_not_finite_stops_the_run(scenic, train):
  lr = dict(
    learning_rate_schedule='compound',
    factors='constant',
    base_learning_rate=float('inf'),
  )
  error = scenic.train_utils.TrainingDivergedError
  with pytest.raises(error):
    train(lr_configs=lr)
