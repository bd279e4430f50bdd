"""Google's Scenic, where it can be imported, and small data for it.

It is not on PyPI. The tests marked `oracle` run where it is installed, or
where MODELSTOCK_SCENIC names the folder of a checkout that holds the package
`scenic`; else they are skipped, or with MODELSTOCK_REQUIRE_SCENIC=1 fail.
"""

import importlib
import os
import types

import jax
import numpy as np
import pytest

NAMES = (
  'anchors',
  'datasets',
  'export',
  'models',
  'options',
  'step',
  'trainer',
)


@pytest.fixture(scope='session')
def scenic():
  """Our modules by name, and Scenic's own that they are held against."""
  with pytest.MonkeyPatch.context() as patch:
    if 'MODELSTOCK_SCENIC' in os.environ:
      patch.syspath_prepend(os.environ['MODELSTOCK_SCENIC'])
    try:
      ours = {
        name: importlib.import_module(f'modelstock_jax.scenic.{name}')
        for name in NAMES
      }
      classification_trainer = importlib.import_module(
        'scenic.train_lib.classification_trainer'
      )
      dataset_utils = importlib.import_module(
        'scenic.dataset_lib.dataset_utils'
      )
      train_utils = importlib.import_module('scenic.train_lib.train_utils')
    except ImportError as error:
      if os.environ.get('MODELSTOCK_REQUIRE_SCENIC') == '1':
        raise
      pytest.skip(
        f'no Scenic ({type(error).__name__}). Set MODELSTOCK_SCENIC to the '
        'folder of a checkout of google-research/scenic.'
      )
    yield types.SimpleNamespace(
      **ours,
      classification_trainer=classification_trainer,
      dataset_utils=dataset_utils,
      train_utils=train_utils,
    )


@pytest.fixture(scope='module', autouse=True)
def _as_scenic_is_written():
  """Scenic promotes dtypes and ranks."""
  names = ('jax_numpy_dtype_promotion', 'jax_numpy_rank_promotion')
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_numpy_dtype_promotion', 'standard')
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  yield
  for name, value in before.items():
    jax.config.update(name, value)


class Writer:
  """Keeps the scalars that a trainer writes."""

  def __init__(self):
    self.scalars = []

  def write_scalars(self, step, scalars):
    self.scalars.append((step, dict(scalars)))

  def flush(self):
    pass


@pytest.fixture
def writer():
  return Writer()


@pytest.fixture(scope='session')
def make_writer():
  return Writer


@pytest.fixture(scope='session')
def make_dataset(scenic):
  """Builds a learnable dataset of few images, shuffled by seed.

  `stop` is the number of training batches after which it breaks off.
  """

  def make(batch_size=16, *, pixels=8, images=64, classes=3, seed=0, stop=None):
    rng = np.random.default_rng(7)
    shape = (images, pixels, pixels, 3)
    inputs = rng.standard_normal(shape).astype(np.float32)
    labels = rng.integers(classes, size=images).astype(np.int32)
    inputs += np.eye(3, dtype=np.float32)[labels % 3][:, None, None]

    def batches(order):
      for i in range(0, images, batch_size):
        rows = order[i : i + batch_size]
        batch = {'inputs': inputs[rows], 'label': labels[rows]}
        batch = scenic.dataset_utils.maybe_pad_batch(
          batch, train=False, batch_size=batch_size
        )
        yield scenic.dataset_utils.shard(batch)

    def train():
      rng, count = np.random.default_rng(seed), 0
      while True:
        for batch in batches(rng.permutation(images)):
          if count == stop:
            raise KeyboardInterrupt
          yield batch
          count += 1

    def validate():
      while True:
        yield from batches(np.arange(images))

    return scenic.dataset_utils.Dataset(
      train_iter=train(),
      valid_iter=validate(),
      meta_data=dict(
        num_classes=classes,
        input_shape=(-1, pixels, pixels, 3),
        num_train_examples=images,
        num_eval_examples=images,
        input_dtype=np.float32,
        target_is_onehot=False,
      ),
    )

  return make


@pytest.fixture(scope='session')
def make_config():
  """A config of a tiny ViT; keyword arguments change its keys."""

  def make(**changes):
    import ml_collections

    config = ml_collections.ConfigDict(
      dict(
        model=dict(
          patches={'size': (4, 4)},
          hidden_size=16,
          num_heads=2,
          num_layers=1,
          mlp_dim=32,
          representation_size=None,
          classifier='gap',
          dropout_rate=0.1,
          attention_dropout_rate=0.0,
        ),
        optimizer='adamw',
        optimizer_configs=dict(weight_decay=0.01),
        lr_configs=dict(
          learning_rate_schedule='compound',
          factors='constant*linear_warmup',
          base_learning_rate=1e-2,
          warmup_steps=2,
        ),
        max_grad_norm=1.0,
        batch_size=16,
        num_training_epochs=3,
        checkpoint=True,
        debug_train=False,
        debug_eval=False,
        xprof=False,
        count_flops=False,
        model_stock={},
      )
    )
    for key, value in changes.items():
      config[key] = (
        ml_collections.ConfigDict(value) if isinstance(value, dict) else value
      )
    return config

  return make


@pytest.fixture(scope='session')
def write_checkpoint(scenic):
  """Writes params as a checkpoint of Scenic's; returns the file."""

  def write(workdir, params, *, step, model_state=None):
    state = scenic.train_utils.TrainState(
      global_step=step, params=params, model_state=model_state or {}
    )
    scenic.train_utils.save_checkpoint(str(workdir), state)
    return workdir / f'checkpoint_{step}'

  return write


@pytest.fixture(scope='session')
def stock_evaluation(scenic, make_writer):
  """Evaluates the last checkpoint of a workdir with Scenic's own code."""

  def evaluate(workdir, model, config, dataset, batches):
    import functools

    from flax import jax_utils
    from scenic.train_lib import lr_schedules
    from scenic.train_lib import optimizers

    utils = scenic.train_utils
    params, model_state, _, _ = utils.initialize_model(
      model_def=model.flax_model,
      input_spec=[(dataset.meta_data['input_shape'], np.float32)],
      config=config,
      rngs=jax.random.PRNGKey(99),
    )
    tx = optimizers.get_optimizer(
      optimizers.get_optax_optimizer_config(config),
      lr_schedules.get_learning_rate_fn(config),
      params=params,
    )
    state = utils.TrainState(
      tx=tx,
      params=params,
      opt_state=tx.init(params),
      model_state=model_state,
      rng=jax.random.PRNGKey(0),
      metadata={'chrono': utils.Chrono().save()},
    )
    state, step = utils.restore_checkpoint(str(workdir), state)
    eval_step = jax.pmap(
      functools.partial(
        scenic.classification_trainer.eval_step,
        flax_model=model.flax_model,
        metrics_fn=model.get_metrics_fn('validation'),
      ),
      axis_name='batch',
    )
    state = utils.sync_model_state_across_replicas(
      jax_utils.replicate(state.replace(metadata={}))
    )
    metrics = [
      utils.unreplicate_and_get(eval_step(state, next(dataset.valid_iter))[0])
      for _ in range(batches)
    ]
    summary = utils.log_eval_summary(
      step=step, eval_metrics=metrics, writer=make_writer()
    )
    return summary, step

  return evaluate
