"""The baselines are keys of the one trainer, and do what their names say."""

import json

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import baselines
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop

PLAIN = {'train.epochs': 2}
ALONE = {**PLAIN, 'merge.num_models': 1, 'merge.every': 'end'}
PROBE = {**PLAIN, 'train.trainable': 'head'}
CAR_FT = {**PLAIN, 'train.context_weight': 1.0}
FLYP = {**PLAIN, 'train.loss': 'contrastive'}
FTP = {**PLAIN, 'train.projection': 'ftp'}
ALL = {
  'alone': ALONE,
  'probe': PROBE,
  'car_ft': CAR_FT,
  'flyp': FLYP,
  'ftp': FTP,
}
_SMALL = {
  'image_size': 4,
  'patch_size': 2,
  'channels': 1,
  'width': 2,
  'depth': 1,
  'heads': 1,
}


@pytest.fixture(scope='module')
def prepared(tiny_config, prepare_on):
  """Config and setup of a baseline, compiled once."""
  known = {}

  def prepare(name):
    if name not in known:
      config = tiny_config(ALL.get(name, PLAIN))
      known[name] = config, prepare_on(2, config)
    return known[name]

  return prepare


@pytest.fixture(scope='module')
def trained(prepared, tmp_path_factory):
  """Config, setup, workdir and result of a baseline, trained once."""
  known = {}

  def train(name):
    if name not in known:
      config, setup = prepared(name)
      workdir = tmp_path_factory.mktemp(name)
      known[name] = (
        config,
        setup,
        workdir,
        loop.train(config, workdir, setup=setup),
      )
    return known[name]

  return train


def lines(workdir, kind):
  text = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, text) if x['kind'] == kind]


def steps(setup, number, *, num_models=2, seed=0, only=None):
  """States after a few steps of the compiled program, on batches of noise."""
  state = setup.programs.create(setup.anchor, seed=np.uint32(0))
  rng = np.random.default_rng(seed)
  for _ in range(number):
    batch = {
      'image': rng.integers(0, 256, (num_models, 8, 8, 8, 1), np.uint8),
      'label': rng.integers(0, 10, (num_models, 8), np.int32),
    }
    if only is not None:
      batch = jax.tree.map(lambda x: x[only][None], batch)
    batch = jax.device_put(batch, setup.placement.batch)
    state, metrics = setup.programs.train(state, batch, *setup.beside)
    yield state, metrics


@pytest.mark.parametrize('name', ALL)
def test_it_trains_and_ends_where_a_run_would_that_was_stopped(
  name, trained, tmp_path, read_run, assert_identical
):
  config, setup, workdir, result = trained(name)
  assert result.step == setup.total_steps
  start = jax.tree.leaves(setup.anchor)
  moved = [
    bool((stack != w0[None]).any())
    for w0, stack in zip(start, jax.tree.leaves(result.models), strict=True)
  ]
  assert any(moved)
  assert 0 <= lines(workdir, 'validation')[-1]['accuracy'] <= 1

  calls = []

  def fails_once(*arguments):
    calls.append(1)
    if len(calls) == 6:  # after the first epoch's checkpoint
      raise RuntimeError('a power cut')
    return setup.programs.train(*arguments)

  cut = setup._replace(programs=setup.programs._replace(train=fails_once))
  with pytest.raises(RuntimeError, match='power'):
    loop.train(config, tmp_path, setup=cut)
  loop.train(config, tmp_path, setup=setup)
  assert_identical(
    read_run(config, tmp_path, setup), read_run(config, workdir, setup)
  )


def test_the_merge_of_one_model_is_the_model(trained):
  _, _, workdir, result = trained('alone')
  for model, merged in zip(
    jax.tree.leaves(result.models),
    jax.tree.leaves(result.merged.params),
    strict=True,
  ):
    assert merged.tobytes() == model[0].tobytes()
  for line in lines(workdir, 'merge'):
    assert line['mean_ratio'] == 1
    assert set(line['ratio'].values()) == {1}
    assert line['cosine'] == {}


def test_one_model_alone_is_the_first_of_two(prepared):
  one, two = prepared('alone')[1], prepared('plain')[1]
  pairs = zip(steps(one, 3, only=0), steps(two, 3), strict=True)
  for (_, ours), (_, theirs) in pairs:
    np.testing.assert_allclose(ours.loss[0], theirs.loss[0], rtol=1e-5)


def test_one_model_that_diverges_is_seen(prepared):
  _, setup = prepared('alone')
  broken = jax.tree.map(lambda x: x[None] * jnp.nan, setup.anchor)
  broken = jax.device_put(broken, setup.placement.stacked(broken))
  cosine = merging.by_path(setup.programs.merge(setup.anchor, broken).cosine)
  assert not np.isfinite(list(cosine.values())).any()


def test_a_frozen_tower_stays_bit_for_bit(trained):
  _, setup, _, result = trained('probe')
  for path, stack in jax.tree_util.tree_flatten_with_path(result.models)[0]:
    name = merging.path_name(path)
    leaf = setup.anchor
    for key in name.split('/'):
      leaf = leaf[key]
    for model in stack:
      same = model.tobytes() == leaf.tobytes()
      assert same == name.startswith('image/'), name


def test_operations_of_a_step_on_an_image():
  """By hand, of a tower of one block and K = 10 classes."""
  sizes = {
    'model.embed_dim': 3,
    **{f'model.image.{k}': v for k, v in _SMALL.items()},
    'model.text.context_length': 5,
    'model.text.width': 4,
    'model.text.depth': 1,
    'model.text.heads': 1,
    'train.batch_size': 6,
    'anchor.prompts': 'characters',
  }
  patches = 2 * 4 * 4 * 2  # of 4 patches, 2 x 2 pixels, width 2
  tokens, width = 5, 2
  block = 24 * tokens * width**2 + 4 * tokens**2 * width
  tower = patches + block + 2 * width * 3
  head, contexts = 2 * 3 * 10, 2 * 3 * len(data.TEMPLATES)
  text = 24 * 5 * 4**2 + 4 * 5**2 * 4 + 2 * 4 * 3
  plain = 3 * (tower + head) - patches
  expected = {
    'plain': plain,
    'probe': tower + 2 * head,
    'ftp': plain,
    # Frozen: forward; in training: forward, and back to the embeddings.
    'car_ft': plain + tower + 3 * contexts,
    'flyp': 3 * (tower + text + 2 * 3 * 6) - patches,
  }
  for name, value in expected.items():
    flags = {**sizes, **ALL.get(name, {})}
    config = config_lib.override(
      config_lib.defaults(), [f'--config.{k}={v}' for k, v in flags.items()]
    )
    assert baselines.flops_per_image(config, 10) == value, name


def test_a_frozen_tower_has_no_moments(prepared):
  _, setup = prepared('probe')
  state, _ = list(steps(setup, 1))[-1]
  sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
  head = sum(leaf.size for leaf in jax.tree.leaves(setup.anchor['head']))
  assert sum(sizes) == 2 * (2 * head + 1)  # two moments and a count, twice


def test_context_weight_zero_is_plain_fine_tuning(prepared):
  assert prepared('plain')[1].beside == ()
  plain = list(steps(prepared('plain')[1], 3))
  car_ft = list(steps(prepared('car_ft')[1], 3))
  # At the anchor the towers agree: the first loss is that of the classes, and
  # so is its gradient. Then the weight counts.
  np.testing.assert_allclose(
    car_ft[0][1].loss, plain[0][1].loss, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    car_ft[0][1].grad_norm, plain[0][1].grad_norm, rtol=1e-4
  )
  assert (car_ft[2][1].loss != plain[2][1].loss).all()


def test_contexts_are_templates(prepared):
  config, setup = prepared('car_ft')
  contexts = setup.beside[0].contexts
  tokens = anchor_lib.class_tokens(config)
  assert contexts['kernel'].shape == (8, len(data.TEMPLATES))
  model, params = anchor_lib.read(config)
  first = np.asarray(model.encode_text(params, tokens[:, 0]), np.float64)
  mean = (first / np.linalg.norm(first, axis=1, keepdims=True)).mean(0)
  expected = 100 * mean / np.linalg.norm(mean)
  np.testing.assert_allclose(contexts['kernel'][:, 0], expected, rtol=1e-4)


def test_pairs_train_both_towers_and_merge_them(trained):
  _, setup, workdir, result = trained('flyp')
  assert set(result.merged.params) == {'image', 'text', 'logit_scale'}
  for part, stack in result.models.items():
    moved = [
      (leaf != w0[None]).any()
      for w0, leaf in zip(
        jax.tree.leaves(setup.anchor[part]), jax.tree.leaves(stack), strict=True
      )
    ]
    assert all(moved), part
  paths = lines(workdir, 'merge')[-1]['ratio']
  assert {path.split('/')[0] for path in paths} == set(result.models)


def test_pairs_are_classified_by_their_own_text_tower(trained):
  config, setup, _, result = trained('flyp')
  params = result.merged.params
  model, _ = anchor_lib.read(config)
  tokens = anchor_lib.class_tokens(config)
  texts = np.stack([np.asarray(model.encode_text(params, t)) for t in tokens])
  texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
  mean = texts.mean(1)
  mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
  head = setup.evaluate.as_classifier(params)['head']
  np.testing.assert_allclose(head['kernel'], 100 * mean.T, rtol=1e-4, atol=1e-4)


def test_projected_models_are_in_their_balls(trained):
  _, setup, _, _ = trained('ftp')
  for state, _ in steps(setup, 4):
    radii = merging.by_path(
      jax.tree.map(lambda x: x[0], state.opt_state.radii.radius)
    )
    for name, radius in radii.items():
      leaf, w0 = state.params, setup.anchor
      for key in name.split('/'):
        leaf, w0 = leaf[key], w0[key]
      moved = np.asarray(leaf[0], np.float64) - np.asarray(w0, np.float64)
      axes = tuple(range(moved.ndim))
      if moved.ndim > 1:
        axes = axes[:-1] if name.endswith('kernel') else axes[1:]
      norm = np.abs(moved).sum(axes).max()
      assert norm <= radius * (1 + 1e-3) + 1e-5, name


@pytest.mark.parametrize('name', ['probe', 'car_ft', 'flyp', 'ftp'])
def test_two_stacked_are_two_alone(name, prepared, prepare_on, tiny_config):
  _, setup = prepared(name)
  config = tiny_config({**ALL[name], 'merge.num_models': 1})
  alone = prepare_on(2, config)
  pairs = zip(steps(setup, 3), steps(alone, 3, only=0), strict=True)
  for (_, both), (_, one) in pairs:
    rtol = 1e-3 if name == 'ftp' else 1e-4  # radii are of 1e-8 at first
    np.testing.assert_allclose(both.loss[0], one.loss[0], rtol=rtol)


@pytest.mark.parametrize('name', ['probe', 'car_ft', 'flyp', 'ftp'])
def test_any_mesh_gives_the_same(name, prepared, prepare_on, tiny_config):
  """Devices for each model, and weights in parts over devices."""
  _, setup = prepared(name)
  mesh = {'mesh.stock': 2, 'mesh.fsdp_min_size': 64}
  other = prepare_on(4, tiny_config({**ALL[name], **mesh}))
  pairs = zip(steps(setup, 3), steps(other, 3), strict=True)
  for (_, ours), (_, theirs) in pairs:
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=2e-3)


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'train.loss': 'contrastive', 'train.mixup': 0.2}, ['train.mixup']),
    (
      {'train.loss': 'contrastive', 'train.accumulate': 2, 'train.mixup': 0.1},
      ['train.accumulate', 'train.mixup'],
    ),
    (
      {'train.loss': 'contrastive', 'anchor.head': 'linear_probe'},
      ['anchor.head'],
    ),
    (
      {'train.loss': 'contrastive', 'train.projection': 'ftp'},
      ['train.projection_exclude.*head'],
    ),
    (
      {'train.trainable': 'head', 'train.context_weight': 0.5},
      ['train.context_weight'],
    ),
    (
      {'train.trainable': 'head', 'train.projection': 'ftp'},
      ['train.projection: '],
    ),
    (
      {'train.projection': 'ftp', 'merge.opt_state': 'reset'},
      ["merge.opt_state.*'reset'"],
    ),
    ({'train.projection_strength': 1.5}, ['train.projection_strength.*1.5']),
    ({'train.context_weight': -1.0}, ['train.context_weight.*-1.0']),
    (
      {'merge.num_models': 1, 'merge.strength': 0.5},
      ['merge.strength.*num_models=1'],
    ),
  ],
)
def test_what_does_not_go_together_is_refused(changes, named, tiny_flags):
  config = config_lib.override(config_lib.defaults(), tiny_flags(changes))
  for pattern in named:
    with pytest.raises(ValueError, match=pattern):
      config_lib.validate(config)
