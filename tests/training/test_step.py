import functools
import re

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.clip import model as model_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import optimizer
from modelstock_jax.training import sharding
from modelstock_jax.training import step as step_lib

N, B, K = 2, 16, 10
FSDP = 64  # elements of the smallest leaf that is split
STEPS, PEAK, WARMUP = 6, 2e-2, 2
VISION = clip.VisionConfig(8, 4, width=8, depth=1, heads=2, channels=1)


def _mlp():
  """Two layers on 8x8 pixels: a network that compiles at once."""

  def init(key):
    one, two = jax.random.split(key)
    return {
      'hidden': {
        'kernel': jax.random.normal(one, (64, 12)) / 8,
        'bias': jnp.full(12, 0.1, jnp.float32),
      },
      'head': {
        'kernel': jax.random.normal(two, (12, K)) / 4,
        'bias': jnp.zeros(K),
      },
    }

  def apply(params, images):
    hidden, head = params['hidden'], params['head']
    flat = jnp.reshape(images, (images.shape[0], -1))
    units = jnp.tanh(flat @ hidden['kernel'] + hidden['bias'][None])
    return units @ head['kernel'] + head['bias'][None]

  return model_lib.Model(init, apply, apply)


def _vit(**options):
  sizes = clip.CLIPConfig(
    embed_dim=8,
    vision=VISION,
    text=clip.TextConfig(4, 8, width=8, depth=1, heads=2),
  )
  return clip.classifier(sizes, K, **options)


def _recipe(
  model,
  *,
  weight_decay=0.1,
  clip_norm=1.0,
  label_smoothing=0.0,
  mixup=0.0,
  **options,
):
  normalize = functools.partial(data.normalize, mean=(0.3,), std=(0.4,))
  task = clip_task.classification(
    model, normalize, VISION, mixup=mixup, label_smoothing=label_smoothing
  )
  cosine = optimizer.warmup_cosine(PEAK, warmup_steps=WARMUP, total_steps=STEPS)
  adamw = optimizer.adamw(weight_decay=weight_decay, clip_norm=clip_norm)
  return step_lib.Recipe(
    task._replace(layers=None),
    optimizer.from_optax(adamw),
    lambda step, hyper: cosine(step),
    **options,
  )


def _programs(recipe, placement, *, num_models=N):
  recipe = recipe._replace(num_models=num_models)
  return step_lib.compile_programs(recipe, placement)


def _place(stock=1, **options):
  return sharding.place(stock=stock, batch_size=B, **options)


def _batches(number=STEPS, num_models=N, seed=0):
  """Digits that can be told apart, other ones for each model."""
  rng = np.random.default_rng(seed)
  prototypes = rng.integers(0, 200, (K, 8, 8, 1))
  for _ in range(number):
    label = rng.integers(0, K, (num_models, B)).astype(np.int32)
    noise = rng.integers(0, 56, (num_models, B, 8, 8, 1))
    yield {
      'image': (prototypes[label] + noise).astype(np.uint8),
      'label': label,
    }


def _create(programs, anchor, seed=0, num_models=N):
  return programs.create(anchor, {}, seed, np.arange(num_models))


def _run(programs, placement, anchor, batches, seed=0):
  anchor = jax.device_put(anchor, placement.params(anchor))
  state = _create(programs, anchor, seed)
  history = []
  for batch in batches:
    state, metrics = programs.train(
      state, jax.device_put(batch, placement.batch), anchor, (), {}
    )
    history.append(jax.device_get(metrics))
  return state, history


def _singles(
  model, anchor, batches, *, smoothing=0.0, clip_norm=1.0, weight_decay=0.1
):
  """Each model trained alone, by optax.adamw on one device."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, STEPS)
  steps = [optax.adamw(schedule, weight_decay=weight_decay)]
  if clip_norm:
    steps.insert(0, optax.clip_by_global_norm(clip_norm))
  tx = optax.chain(*steps)

  def loss(params, image, label):
    logits = model.apply(params, image)
    picked = jnp.take_along_axis(logits, label[:, None], 1)[:, 0]
    log_z = jax.nn.logsumexp(logits, -1)
    value = (1 - smoothing) * (log_z - picked)
    value += smoothing * (log_z - logits.mean(-1))
    return value.mean(), logits

  @jax.jit
  def step(params, state, image, label):
    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(
      params, image, label
    )
    updates, state = tx.update(grads, state, params)
    norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)) ** 0.5
    return optax.apply_updates(params, updates), state, value, logits, norm

  for index in range(N):
    params, state = anchor, jax.jit(tx.init)(anchor)
    history = []
    for count, batch in enumerate(batches):
      image = (batch['image'][index] / 255 - 0.3) / 0.4
      label = batch['label'][index]
      # optax itself is not strict about dtypes.
      with jax.numpy_dtype_promotion('standard'):
        params, state, value, logits, norm = step(
          params, state, image.astype(np.float32), label
        )
        rate = schedule(count)
      history.append(
        {
          'loss': value,
          'accuracy': np.mean(np.argmax(logits, -1) == label),
          'grad_norm': norm,
          'learning_rate': rate,
        }
      )
    yield params, history


def _assert_equals_single_runs(state, history, singles, skip=()):
  for index, (params, expected) in enumerate(singles):
    stacked = jax.tree_util.tree_flatten_with_path(state.params)[0]
    for (path, leaf), alone in zip(
      stacked, jax.tree.leaves(params), strict=True
    ):
      name = merging.path_name(path)
      if not name.endswith(tuple(skip)):
        np.testing.assert_allclose(
          leaf[index], alone, rtol=2e-5, atol=2e-5 * PEAK, err_msg=name
        )
    for metrics, values in zip(history, expected, strict=True):
      for name, value in values.items():
        actual = np.asarray(metrics[name])
        actual = actual[index] if actual.ndim else actual
        np.testing.assert_allclose(actual, value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
  ('stock', 'smoothing', 'clip_norm', 'weight_decay'),
  [(1, 0.0, 1.0, 0.1), (N, 0.0, 1.0, 0.1), (1, 0.2, 0.0, 0.0)],
)
def test_the_stack_trains_as_separate_models_do(
  stock, smoothing, clip_norm, weight_decay
):
  model, placement = _mlp(), _place(stock)
  options = {'clip_norm': clip_norm, 'weight_decay': weight_decay}
  recipe = _recipe(model, label_smoothing=smoothing, **options)
  programs = _programs(recipe, placement)
  if not smoothing:
    programs = _mlp_programs(stock)
  anchor = model.init(jax.random.key(1))
  batches = list(_batches())
  state, history = _run(programs, placement, anchor, batches)
  singles = list(
    _singles(model, anchor, batches, smoothing=smoothing, **options)
  )
  assert int(state.step) == STEPS
  # Random numbers follow from seed, model and step: the streams stay.
  np.testing.assert_array_equal(
    jax.random.key_data(state.key),
    jax.random.key_data(jax.random.split(jax.random.key(0), N)),
  )
  # The models have parted, so that equality with the right one means much.
  left, right = (np.asarray(p['hidden']['kernel']) for p, _ in singles)
  assert np.abs(left - right).max() > PEAK
  if clip_norm:  # and the clipping has had something to clip
    assert max(np.max(m['grad_norm']) for m in history) > clip_norm
  _assert_equals_single_runs(state, history, singles)


@pytest.fixture(scope='module')
def transformer():
  """A small image tower, each model on devices of its own."""
  model, placement = _vit(), _place(N)
  return model, placement, _programs(_recipe(model), placement)


def test_a_stack_of_transformers_trains_as_separate_ones_do(transformer):
  model, placement, programs = transformer
  anchor = model.init(jax.random.key(1))
  batches = list(_batches())
  state, history = _run(programs, placement, anchor, batches)
  # Softmax does not see the bias of the keys: its gradient is rounding noise,
  # which AdamW makes a full step of.
  _assert_equals_single_runs(
    state, history, _singles(model, anchor, batches), skip=['key/bias']
  )


# Ways to spend less memory, or other devices: the result is the same.
WAYS = {
  'fsdp, each model on its own devices': (
    {'fsdp_min_size': FSDP, 'stock': N},
    {},
    {},
  ),
  'accumulate, fsdp': (
    {'accumulate': 4, 'stock': N, 'fsdp_min_size': FSDP},
    {'accumulate': 4},
    {},
  ),
  'accumulate, fsdp, one sum': (
    {'accumulate': 2, 'stock': N, 'fsdp_min_size': FSDP},
    {'accumulate': 2, 'sum_once': True},
    {},
  ),
  'in turn, accumulate, fsdp': (
    {'accumulate': 2, 'fsdp_min_size': FSDP},
    {'models': 'map', 'accumulate': 2},
    {},
  ),
  'remat block': ({}, {}, {'remat': 'block'}),
  'remat dots': ({}, {}, {'remat': 'dots'}),
}


@pytest.fixture(scope='module')
def vit_singles():
  """Each model of a stack of transformers trained alone."""
  model = _vit()
  anchor = model.init(jax.random.key(1))
  return anchor, list(_singles(model, anchor, list(_batches())))


@pytest.mark.parametrize('way', WAYS)
def test_every_way_to_run_a_step_is_equal_to_separate_runs(way, vit_singles):
  places, recipe, network = WAYS[way]
  anchor, singles = vit_singles
  placement = _place(**places)
  programs = _programs(_recipe(_vit(**network), **recipe), placement)
  state, history = _run(programs, placement, anchor, _batches())
  _assert_equals_single_runs(state, history, singles, skip=['key/bias'])
  merged = programs.merge(
    jax.device_put(anchor, placement.params(anchor)), state.params
  )
  host = jax.device_get((anchor, state.params))
  expected = merging.model_stock(*host, stacked=True)
  for actual, wanted in zip(
    jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
  for tree in (
    merged.params,
    programs.restart['keep'](state, merged.params).params,
  ):
    split = ['data' in leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
    assert any(split) == ('fsdp_min_size' in places)
    assert not all(split)  # small leaves stay whole


@pytest.mark.parametrize('accumulate', [1, 4])
def test_mixup_does_not_depend_on_the_way(accumulate, mixup):
  model, anchor, run = mixup
  _, expected = run(_batches(3), seed=5)
  placement = _place(N, accumulate=accumulate)
  recipe = _recipe(model, mixup=0.4, label_smoothing=0.1, accumulate=accumulate)
  programs = _programs(recipe, placement)
  _, actual = _run(programs, placement, anchor, _batches(3), seed=5)
  for one, other in zip(actual, expected, strict=True):
    np.testing.assert_allclose(one['loss'], other['loss'], rtol=1e-5)
    np.testing.assert_allclose(one['grad_norm'], other['grad_norm'], rtol=1e-5)


def _lowered(devices, loss=lambda loss: loss, **options):
  """The step of a network of two layers, before it is compiled."""
  placement = _place(accumulate=2, devices=jax.devices()[:devices])
  recipe = _recipe(_mlp(), accumulate=2, **options)
  task = recipe.task._replace(loss=loss(recipe.task.loss))
  programs = _programs(recipe._replace(task=task), placement)
  anchor = _mlp().init(jax.random.key(1))
  state = _create(programs, anchor)
  batch = next(_batches())
  return programs.train.lower(state, batch, anchor, (), {}).as_text()


def test_gradients_are_summed_once_where_nothing_else_changes():
  def plain(loss):  # which might compare examples
    return lambda *args: loss(*args)

  parts = _lowered(8)
  assert _lowered(8, sum_once=True) != parts
  assert _lowered(8, plain, sum_once=True) == parts
  assert _lowered(1, sum_once=True) == _lowered(1)


def test_no_collective_of_a_step_crosses_models(transformer):
  model, placement, programs = transformer
  text = _step_text(model, placement, programs)
  groups = _replica_groups(text)
  models = [{0, 1, 2, 3}, {4, 5, 6, 7}]
  assert [set(row) for row in _ids(placement)] == models
  for group in groups:
    assert any(group <= devices for devices in models), group
  # Gradients are summed over the devices of a model, and no weight moves.
  assert set(models[0]) in groups
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text


@pytest.mark.parametrize('accumulate', [1, 2])
def test_fsdp_gathers_weights_within_a_model_alone(accumulate):
  model = _vit()
  placement = _place(N, fsdp_min_size=FSDP, accumulate=accumulate)
  programs = _programs(_recipe(model, accumulate=accumulate), placement)
  text = _step_text(model, placement, programs)
  models = [set(row) for row in _ids(placement)]
  assert 'all-gather' in text
  assert 'all-to-all' not in text
  for group in _replica_groups(text):
    assert any(group <= devices for devices in models), group


def _step_text(model, placement, programs):
  """The compiled step."""
  anchor = model.init(jax.random.key(1))
  anchor = jax.device_put(anchor, placement.params(anchor))
  batch = jax.device_put(next(_batches()), placement.batch)
  state = _create(programs, anchor)
  return programs.train.lower(state, batch, anchor, (), {}).compile().as_text()


def _ids(placement):
  return [[d.id for d in row] for row in placement.mesh.devices]


def _replica_groups(text):
  """Sets of devices that exchange something, in every notation of HLO."""
  groups, understood = [], 0
  for listed in re.findall(
    r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}', text
  ):
    groups += [set(_numbers(g)) for g in re.findall(r'\{([\d, ]+)\}', listed)]
    understood += 1
  for shape, dims, order in re.findall(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  ):
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    ids = ids.transpose(_numbers(order)) if order else ids
    groups += [set(row.tolist()) for row in ids.reshape(_numbers(shape))]
    understood += 1
  for mesh, axes in re.findall(
    r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] \{((?:'\w+',?)+)\}", text
  ):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    ids = np.arange(np.prod([int(size) for size in sizes.values()]))
    ids = ids.reshape([int(size) for size in sizes.values()])
    together = [list(sizes).index(a) for a in re.findall(r"'(\w+)'", axes)]
    ids = np.moveaxis(ids, together, range(len(together)))
    size = np.prod(ids.shape[: len(together)])
    groups += [set(row.tolist()) for row in ids.reshape(size, -1).T]
    understood += 1
  there_are = text.count('replica_groups=') + text.count('source_target_pairs=')
  assert understood == there_are, 'a notation that is new'
  return groups


def _numbers(text):
  return [int(number) for number in text.split(',')]


def test_every_notation_of_groups_is_understood():
  rows, columns = [{0, 1}, {2, 3}], [{0, 2}, {1, 3}]
  for text, expected in (
    ('replica_groups={{0,1},{2,3}}, to_apply', rows),
    ('replica_groups=[2,2]<=[4], to_apply', rows),
    ('replica_groups=[2,2]<=[2,2]T(1,0), to_apply', columns),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, to_apply", rows),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply", columns),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [{0, 1, 2, 3}]),
    ('source_target_pairs={{0,3},{3,0}}', [{0, 3}, {0, 3}]),
  ):
    assert _replica_groups(text) == expected, text
  with pytest.raises(AssertionError, match='notation'):
    _replica_groups('replica_groups=(0, 1)')


@pytest.fixture(scope='module')
def mixup():
  model, placement = _mlp(), _place()
  recipe = _recipe(model, mixup=0.4, label_smoothing=0.1)
  anchor = model.init(jax.random.key(1))
  run = functools.partial(_run, _programs(recipe, placement), placement, anchor)
  return model, anchor, run


def _same_for_all(batch):
  """The batch of model 0 for every model."""
  return {name: np.stack([array[0]] * N) for name, array in batch.items()}


def test_mixup_follows_from_seed_and_step(mixup):
  _, _, run = mixup
  batches = [_same_for_all(batch) for batch in _batches(3)]
  losses = [
    [metrics['loss'] for metrics in run(batches, seed=seed)[1]]
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(losses[0], losses[1])
  assert not np.isin(losses[0], losses[2]).any()


def test_mixup_differs_between_models_and_steps(mixup):
  _, _, run = mixup
  batch = _same_for_all(next(_batches()))
  # The first step has learning rate 0: both are of the anchor's weights.
  _, history = run([batch, batch])
  losses = np.concatenate([metrics['loss'] for metrics in history])
  assert len(np.unique(losses)) == 2 * N


def test_mixup_is_the_loss_of_mixed_images(mixup):
  model, anchor, run = mixup
  batch = next(_batches())
  _, [metrics] = run([batch], seed=3)
  for index in range(N):
    key = jax.random.split(jax.random.key(3), N)[index]
    ratio_key, partner_key = jax.random.split(jax.random.fold_in(key, 0))
    ratio = float(jax.random.beta(ratio_key, 0.4, 0.4))
    partner = np.asarray(jax.random.permutation(partner_key, B))
    image = (batch['image'][index] / 255 - 0.3) / 0.4
    mixed = ratio * image + (1 - ratio) * image[partner]
    logits = model.apply(anchor, mixed.astype(np.float32))
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(K)[batch['label'][index]]
    target = ratio * target + (1 - ratio) * target[partner]
    target = 0.9 * target + 0.1 / K
    expected = -(target * log_p).sum(-1).mean()
    np.testing.assert_allclose(metrics['loss'][index], expected, rtol=1e-5)
    assert 0.02 < ratio < 0.98  # a mixture, and not one image alone


@functools.cache
def _mlp_programs(stock=1):
  """Programs of the small network, compiled once."""
  return _programs(_recipe(_mlp()), _place(stock))


def _trained(stock=1, steps=3):
  programs, placement = _mlp_programs(stock), _place(stock)
  anchor = jax.device_put(_mlp().init(jax.random.key(1)), placement.replicated)
  state, _ = _run(programs, placement, anchor, _batches(steps))
  return programs, placement, anchor, state


@pytest.mark.parametrize('stock', [1, N])
def test_merge_on_the_mesh_is_the_merge_on_the_host(stock):
  programs, _, anchor, state = _trained(stock=stock)
  merged = programs.merge(anchor, state.params)
  host = jax.device_get((anchor, state.params))
  expected = merging.model_stock(*host, stacked=True)
  ratios = jax.device_get(jax.tree.leaves(merged.ratio))
  assert min(ratios) < 0.99  # it is not a plain average
  for actual, wanted in zip(
    jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True
  ):
    assert actual.sharding.is_fully_replicated
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('fsdp', [0, FSDP])
@pytest.mark.parametrize('stock', [1, N])
def test_merge_gathers_nothing(stock, fsdp):
  placement = _place(stock, fsdp_min_size=fsdp)
  programs = _programs(_recipe(_mlp()), placement)
  anchor = jax.eval_shape(_mlp().init, jax.random.key(1))
  state = jax.eval_shape(functools.partial(_create, programs), anchor)
  text = programs.merge.lower(anchor, state.params).compile().as_text()
  assert 'all-gather' not in text
  assert 'all-to-all' not in text
  # Each leaf is sent once, by each device to the other model's.
  assert _sent(text) == (4 if stock == N else 0)
  # Sums of parts are scalars; where all is whole, nothing is exchanged.
  assert ('all-reduce' in text) == bool(fsdp)


def _sent(text):
  """Return the number of arrays that a program sends between devices."""
  operations = re.findall(r'= (.*?) collective-permute(?:-start)?\(', text)
  return sum(len(re.findall(r'f32\[', kind)) for kind in operations)


@pytest.mark.parametrize('stock', [1, N])
@pytest.mark.parametrize('opt_state', ['keep', 'average', 'reset'])
def test_restart(opt_state, stock):
  programs, _, anchor, state = _trained(stock)
  merged = programs.merge(anchor, state.params).params
  before = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
  after = programs.restart[opt_state](state, merged)

  for new, weights in zip(
    jax.tree.leaves(after.params), jax.tree.leaves(merged), strict=True
  ):
    for model in range(N):
      np.testing.assert_array_equal(new[model], weights)
  # The schedule and the random streams go on.
  assert int(after.step) == int(before.step) == 3
  np.testing.assert_array_equal(jax.random.key_data(after.key), before.key)
  kept = 0
  for new, old in zip(
    jax.tree.leaves(after.opt_state),
    jax.tree.leaves(before.opt_state),
    strict=True,
  ):
    assert new.dtype == old.dtype
    if opt_state == 'reset':
      expected = np.zeros_like(old)
    elif opt_state == 'average' and old.dtype == np.float32:
      expected = np.stack([np.mean(old, axis=0)] * N)
      kept += np.abs(old[0] - old[1]).max() > 0
    else:
      expected = old
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-12)
  assert opt_state != 'average' or kept > 4  # moments that did differ


@pytest.mark.parametrize('opt_state', ['keep', 'average', 'reset'])
def test_state_is_donated_and_the_anchor_is_not(opt_state):
  # 'Some donated buffers were not usable' is a warning, thus an error here.
  programs, placement, anchor, state = _trained()
  batch = jax.device_put(next(_batches()), placement.batch)
  stepped, _ = programs.train(state, batch, anchor, (), {})
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
  merged = programs.merge(anchor, stepped.params)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(stepped))
  restarted = programs.restart[opt_state](stepped, merged.params)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stepped.params))
  for tree in (anchor, merged, restarted):
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def test_nothing_visits_the_host():
  programs, placement, anchor, state = _trained()
  batches = [jax.device_put(b, placement.batch) for b in _batches(2)]
  with jax.transfer_guard('disallow'):
    state, _ = programs.train(state, batches[0], anchor, (), {})
    merged = programs.merge(anchor, state.params)
    state = programs.restart['average'](state, merged.params)
    state, metrics = programs.train(state, batches[1], anchor, (), {})
    # The guard does guard, and only what is asked for crosses.
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
      programs.train(state, next(_batches()), anchor, (), {})
  assert np.isfinite(jax.device_get(metrics['loss'])).all()


def test_each_program_is_compiled_once(caplog):
  _mlp_programs.cache_clear()
  with jax.log_compiles():
    programs, placement, anchor, state = _trained(stock=N)
    for batch in _batches(2):
      merged = programs.merge(anchor, state.params)
      state = programs.restart['average'](state, merged.params)
      anchor = merged.params  # as with merge.anchor = 'last_merge'
      batch = jax.device_put(batch, placement.batch)
      state, _ = programs.train(state, batch, anchor, (), {})
  messages = '\n'.join(record.getMessage() for record in caplog.records)
  caplog.clear()  # megabytes that nobody wants to see
  names = re.findall(r'Finished XLA compilation of jit\((\w+)\)', messages)
  # Operations outside of programs may be compiled as well: making the examples.
  programs = ['create', 'merge', 'restart', 'train_step']
  assert sorted(name for name in names if name in programs) == programs
