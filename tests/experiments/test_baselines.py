"""The baselines do what their names say, in the one trainer."""

import json
import pathlib

import car_ft
import flyp
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.cli import main
from modelstock_jax.data import captions
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import loop

SHORT = {
  'train.epochs': 2,
  'merge.every': 'epoch',
  'merge.num_models': 2,
  'anchor.head': 'zero_shot',  # a fit of the head depends on the mesh
}
FILES = {
  'probe': 'linear_probe.py',
  'car_ft': 'car_ft.py',
  'flyp': 'flyp.py',
  'ftp': 'ftp.py',
}
B, K, D, T, L = 6, 4, 5, 3, 7


@pytest.fixture(scope='module')
def prepared(prepare_baseline):
  """Config and setup of a baseline, compiled once."""
  known = {}

  def prepare(name):
    if name not in known:
      known[name] = prepare_baseline(FILES[name], SHORT)
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
      result = loop.train(config, workdir, setup=setup)
      known[name] = (config, setup, workdir, result)
    return known[name]

  return train


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def lines(workdir, kind):
  text = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [x for x in map(json.loads, text) if x['kind'] == kind]


def steps(setup, number, *, num_models=2, seed=0, only=None):
  """States after a few steps of the compiled program, on batches of noise."""
  models = np.arange(num_models if only is None else 1)
  state = setup.programs.create(setup.anchor, {}, np.uint32(0), models)
  rng = np.random.default_rng(seed)
  for _ in range(number):
    batch = {
      'image': rng.integers(0, 256, (num_models, 8, 8, 8, 1), np.uint8),
      'label': rng.integers(0, 10, (num_models, 8), np.int32),
    }
    if only is not None:
      batch = jax.tree.map(lambda x: x[only][None], batch)
    batch = jax.device_put(batch, setup.placement.batch)
    state, metrics = setup.programs.train(
      state, batch, setup.anchor, setup.consts, {}
    )
    yield state, metrics


@pytest.mark.parametrize('name', FILES)
def test_it_trains_and_ends_where_a_run_would_that_was_stopped(
  name, trained, tmp_path, read_run, assert_identical
):
  config, setup, workdir, result = trained(name)
  assert result.step == setup.steps_per_epoch * config.train.epochs
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


def test_a_frozen_tower_has_no_moments(prepared):
  _, setup = prepared('probe')
  state, _ = list(steps(setup, 1))[-1]
  sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
  head = sum(leaf.size for leaf in jax.tree.leaves(setup.anchor['head']))
  assert sum(sizes) == 2 * (2 * head + 1)  # two moments and a count, twice


def test_the_divergence_counts_as_soon_as_towers_part(prepared, setup):
  plain = list(steps(setup, 3))
  car_ft = list(steps(prepared('car_ft')[1], 3))
  # At the anchor the towers agree: the first loss is that of the classes, and
  # so is its gradient. Then the weight counts.
  np.testing.assert_allclose(
    car_ft[0][1]['loss'], plain[0][1]['loss'], rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    car_ft[0][1]['grad_norm'], plain[0][1]['grad_norm'], rtol=1e-4
  )
  assert (car_ft[2][1]['loss'] != plain[2][1]['loss']).all()


def test_contexts_are_templates(prepared):
  config, setup = prepared('car_ft')
  contexts = setup.consts
  tokens = flyp.class_tokens(config)
  assert contexts['kernel'].shape == (8, len(captions.TEMPLATES))
  model, params = clip.load_pretrained(
    anchor_lib.weights_path(config.anchor.weights)
  )
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


def test_pairs_are_classified_by_text_tower(trained):
  config, setup, _, result = trained('flyp')
  params = result.merged.params
  model, _ = clip.load_pretrained(
    anchor_lib.weights_path(config.anchor.weights)
  )
  tokens = flyp.class_tokens(config)
  texts = np.stack([np.asarray(model.encode_text(params, t)) for t in tokens])
  texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
  mean = texts.mean(1)
  mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
  head = setup.evaluate.deploy(params)['head']
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
def test_two_stacked_are_two_alone(name, prepared, prepare_baseline):
  _, setup = prepared(name)
  _, alone = prepare_baseline(FILES[name], {**SHORT, 'merge.num_models': 1})
  pairs = zip(steps(setup, 3), steps(alone, 3, only=0), strict=True)
  for (_, both), (_, one) in pairs:
    rtol = 1e-3 if name == 'ftp' else 1e-4  # radii are of 1e-8 at first
    np.testing.assert_allclose(both['loss'][0], one['loss'][0], rtol=rtol)


@pytest.mark.parametrize('name', ['probe', 'car_ft', 'flyp', 'ftp'])
def test_any_mesh_gives_the_same(name, prepared, prepare_baseline):
  """Devices for each model, and weights in parts over devices."""
  _, setup = prepared(name)
  mesh = {'mesh.stock': 2, 'mesh.fsdp_min_size': 64}
  _, other = prepare_baseline(FILES[name], {**SHORT, **mesh}, devices=4)
  pairs = zip(steps(setup, 3), steps(other, 3), strict=True)
  for (_, ours), (_, theirs) in pairs:
    np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=2e-3)


def test_the_divergence_of_contexts():
  texts = normal(1, T, K, D)  # each context says every class
  frozen, moved = normal(2, B, D), normal(3, B, D)
  contexts = clip.zero_shot_head(jnp.asarray(texts, jnp.float32), scale=5.0)
  weight = 5 * unit(unit(texts).mean(1)).T
  p, q = softmax(unit(frozen) @ weight), softmax(unit(moved) @ weight)
  expected = (p * np.log(p / q)).sum(-1).mean()
  divergence = car_ft.context_divergence(
    contexts, jnp.asarray(frozen, jnp.float32), jnp.asarray(moved, jnp.float32)
  )
  np.testing.assert_allclose(divergence, expected, rtol=1e-5)


def test_the_divergence_pulls_the_tower_in_training_alone():
  contexts = {
    'kernel': jnp.asarray(normal(1, D, T), jnp.float32),
    'bias': jnp.zeros(T),
  }
  frozen = jnp.asarray(normal(2, B, D), jnp.float32)
  moved = jnp.asarray(normal(3, B, D), jnp.float32)
  of_frozen, of_moved = jax.grad(car_ft.context_divergence, (1, 2))(
    contexts, frozen, moved
  )
  assert not of_frozen.any()
  assert of_moved.all()
  # Where both say the same, the divergence is least.
  least = jax.grad(car_ft.context_divergence, 2)(contexts, frozen, frozen)
  np.testing.assert_allclose(least, np.zeros((B, D)), atol=1e-7)


def test_the_loss_of_pairs():
  images, texts, log_scale = normal(4, B, D), normal(5, B, D), 1.3
  logits = np.exp(log_scale) * unit(images) @ unit(texts).T
  by_image = -np.log(np.diagonal(softmax(logits)))
  by_text = -np.log(np.diagonal(softmax(logits.T)))
  loss = flyp.contrastive(
    flyp.pair_logits(
      jnp.asarray(images, jnp.float32),
      jnp.asarray(texts, jnp.float32),
      jnp.float32(log_scale),
    )
  )
  expected = (by_image.mean() + by_text.mean()) / 2
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_captions_are_of_the_class_in_every_template():
  tokens = jnp.arange(K * T * L).reshape(K, T, L)
  label = jnp.arange(300) % K
  texts = flyp.captions(jax.random.key(0), tokens, label)
  template = texts[:, 0] // L % T
  np.testing.assert_array_equal(texts, tokens[label, template])
  assert np.bincount(template, minlength=T).min() > 60  # 100 are expected
  again = flyp.captions(jax.random.key(1), tokens, label)
  assert (texts != again).any()


@pytest.mark.parametrize(
  ('name', 'changes', 'named'),
  [
    ('flyp', {'train.mixup': 0.2}, 'train.mixup'),
    (
      'flyp',
      {'train.accumulate': 2, 'train.mixup': 0.1},
      r'(?s)train.mixup.*train.accumulate',
    ),
    ('flyp', {'anchor.head': 'linear_probe'}, 'anchor.head'),
    ('ftp', {'merge.opt_state': 'reset'}, "merge.opt_state.*'reset'"),
    ('ftp', {'ftp.strength': 1.5}, 'strength=1.5'),
  ],
)
def test_what_does_not_go_together(name, changes, named, prepare_baseline):
  with pytest.raises(ValueError, match=named):
    prepare_baseline(FILES[name], changes)


FLYP = pathlib.Path(__file__).parents[2] / 'experiments/baselines/flyp.py'


def test_a_run_without_a_head_says_how_it_is_evaluated(
  tmp_path, capsys, monkeypatch, one_epoch
):
  devices = jax.devices()[:2]
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  workdir = f'--workdir={tmp_path}'
  config = f'--config={FLYP}'
  assert main.main(['train', config, workdir, *one_epoch]) == 0
  checkpoint = f'--checkpoint={tmp_path}'
  assert main.main(['evaluate', checkpoint, '--benchmarks=noise']) == 1
  error = capsys.readouterr().err
  assert 'give --workdir instead' in error
  assert "['flyp.get_task']" in error
  evaluate = ['evaluate', workdir, '--benchmarks=noise']
  assert main.main(evaluate) == 1
  assert 'Give that file: --config=FILE' in capsys.readouterr().err
  assert main.main([*evaluate, config]) == 0
