import json
import os
import pathlib
import signal

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import numpy

from experiments.soups import members as members_lib
from experiments.soups import random_search as grid
from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.training import loop
from modelstock_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]

# Three epochs of four steps, or four of them.
GRID = {
  'grid.num_models': 4,
  'grid.epochs': '(3, 4)',
  'grid.learning_rate': '(5e-3, 5e-2)',
  'grid.weight_decay': '(1e-3, 0.5)',
  'grid.randaugment_count': 0,
}

# What 16 steps make of sums in another order: 1e-7, or 1e-4 where a gradient
# near 0 changes sign. A learning rate that is off by 0.1 % makes 2e-3.
ROUNDING = 5e-4


@pytest.fixture(scope='module')
def configured(tiny_flags):
  """The demo's config made tiny, with a grid, and with changes."""

  def make(changes=()):
    return members_lib.load_config(
      ROOT / 'configs' / 'digits.py', tiny_flags({**GRID, **dict(changes)})
    )

  return make


@pytest.fixture(scope='module')
def config(configured):
  return configured()


@pytest.fixture(scope='module')
def trained(config, setup, tmp_path_factory):
  """The workdir of a grid that was left in peace."""
  workdir = tmp_path_factory.mktemp('grid')
  grid.train(config, workdir, setup=setup)
  return workdir


@pytest.fixture(scope='module')
def files(trained):
  return read_files(trained)


def read_files(workdir):
  """The bits of all weights; the files hold their metadata in any order."""
  return {
    path.name: {
      name: array.tobytes() for name, array in numpy.load_file(path).items()
    }
    for path in sorted((workdir / 'models').iterdir())
  }


def leaves(workdir, index, setup):
  [chosen] = [g for g in members_lib.read(workdir) if g.member.index == index]
  params = clip.load_safetensors(workdir / chosen.file, setup.anchor)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize('from_zero', [True, False])
def test_each_model_may_have_a_schedule(from_zero):
  """As optax has it for one model; 0 from the end on, to the last bit."""
  peaks, totals = np.float32([1e-3, 2e-3, 5e-3]), np.float32([8, 20, 20])
  for step in range(25):
    hyper = {'learning_rate': jnp.array(peaks), 'steps': jnp.array(totals)}
    actual = grid.warmup_cosine(
      jnp.int32(step), hyper, warmup_steps=4, from_zero=from_zero
    )
    later = step < 4 and not from_zero
    expected = [
      optax.warmup_cosine_decay_schedule(0.0, peak, 4, total)(step + later)
      for peak, total in zip(peaks.tolist(), totals.tolist(), strict=True)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-9)
    over = step >= totals
    assert (np.asarray(actual)[over] == 0).all()
    assert not over.any() or step >= 8


def test_draws_are_within_their_bounds_and_of_the_seed_and_index_alone(
  configured,
):
  many = configured({'grid.num_models': 400})
  members = members_lib.draw(many)
  rates = np.array([m.learning_rate for m in members])
  assert 5e-3 <= rates.min() < rates.max() <= 5e-2
  # On a log scale half of them are below the geometric mean of the bounds:
  # 3 sd of 400 coins are 30.
  assert abs(np.sum(rates < np.sqrt(5e-3 * 5e-2)) - 200) < 30
  decays = np.array([m.weight_decay for m in members])
  assert 1e-3 <= decays.min() < decays.max() <= 0.5
  assert {m.epochs for m in members} == {3, 4}
  for name, greatest in (('label_smoothing', 0.25), ('mixup', 0.9)):
    values = np.array([getattr(m, name) for m in members])
    assert abs(np.sum(values == 0) - 200) < 30
    assert 0.9 * greatest < values.max() <= greatest
  many = configured({'grid.num_models': 400, 'grid.randaugment_count': 2})
  drawn = members_lib.draw(many)
  # What is drawn before it is as without it.
  assert [m[:6] for m in drawn] == [m[:6] for m in members]
  magnitudes = np.array([m.randaugment_magnitude for m in drawn])
  counts = np.array([m.randaugment_count for m in drawn])
  on = magnitudes > 0
  assert abs(np.sum(on) - 200) < 30
  assert (counts[~on] == 0).all()
  # As in `hparam_info.json` of Model Soups: m1 to m20, n0 to n2.
  assert set(magnitudes[on]) == set(range(1, 21))
  shares = np.bincount(counts[on], minlength=3) / np.sum(on)
  # 3 sd of 170 draws or more are 0.11.
  assert (abs(shares - 1 / 3) < 0.11).all()
  few = configured({'grid.num_models': 8, 'merge.num_models': 4})
  assert members_lib.draw(few) == members[:8]
  assert members_lib.draw(configured({'seed': 1}))[0] != members[0]


def test_each_model_has_its_randaugment(configured):
  """A string of timm, with which timm's transforms jitter no colours."""
  changes = {
    'augment.flip': 0.5,
    'augment.color_jitter': 0.4,
    'augment.randaugment': 'm9-n2',
    'data.cache': False,
  }
  config = configured(changes)
  [member, *_] = members_lib.draw(config)
  off = member._replace(randaugment_count=0, randaugment_magnitude=0)
  on = member._replace(randaugment_count=0, randaugment_magnitude=18)
  for each, text, jitter in ((off, '', 0.4), (on, 'm18-n0', 0.0)):
    actual = members_lib.augment(config, each)
    assert actual.transform(8).randaugment == text
    assert (actual.color_jitter, actual.flip) == (jitter, 0.5)


def test_each_model_is_the_one_that_a_run_of_its_settings_trains(
  config, trained, setup, prepare_on, tiny_config, apart, tmp_path
):
  for member in members_lib.draw(config)[:2]:
    of_its = tiny_config(
      {
        'train.epochs': member.epochs,
        'train.learning_rate': member.learning_rate,
        'train.weight_decay': member.weight_decay,
        'train.label_smoothing': member.label_smoothing,
        'train.mixup': member.mixup,
        'merge.every': 'end',
        # As many models as the grid has, whose streams are alike.
        'merge.num_models': 4,
      }
    )
    result = loop.train(
      of_its,
      tmp_path / str(member.index),
      setup=prepare_on(2, of_its),
    )
    expected = [
      np.asarray(leaf)[member.index] for leaf in jax.tree.leaves(result.models)
    ]
    actual = leaves(trained, member.index, setup)
    assert apart(actual, expected, setup.anchor) < ROUNDING
  mixed = [m.mixup > 0 for m in members_lib.draw(config)[:2]]
  smoothed = [m.label_smoothing > 0 for m in members_lib.draw(config)[:2]]
  assert any(mixed) or any(smoothed)  # else it would not have been seen


def test_no_model_depends_on_those_it_is_stacked_with(
  trained, files, setup, configured, prepare_on, apart, tmp_path
):
  # Two more models: other stacks, and the same draws.
  more = configured({'grid.num_models': 6})
  grid.train(more, tmp_path / 'more', setup=setup)
  together = read_files(tmp_path / 'more')
  orders = [
    [g.member.index for g in stack]
    for workdir in (trained, tmp_path / 'more')
    for stack in [
      sorted(
        members_lib.read(workdir),
        key=lambda g: (g.member.epochs, g.member.index),
      )
    ]
  ]
  pairs = [{tuple(o[i : i + 2]) for i in range(0, len(o), 2)} for o in orders]
  assert pairs[0] - pairs[1]  # some have another neighbour
  for name, content in files.items():
    assert together[name] == content, name

  # Four at a time: matrices of other sizes, whose sums may be rounded
  # otherwise.
  wide = configured({'merge.num_models': 4})
  grid.train(wide, tmp_path / 'wide', setup=prepare_on(2, wide))
  for index in range(4):
    actual = leaves(tmp_path / 'wide', index, setup)
    expected = leaves(trained, index, setup)
    assert apart(actual, expected, setup.anchor) < ROUNDING


def test_one_that_diverges_is_kept_marked_and_costs_the_others_nothing(
  config, files, setup, tmp_path, monkeypatch, caplog
):
  draw = members_lib.draw

  def with_a_bad_one(config):
    members = draw(config)
    members[1] = members[1]._replace(learning_rate=1e30)
    return members

  monkeypatch.setattr(members_lib, 'draw', with_a_bad_one)
  actual = grid.train(config, tmp_path, setup=setup)
  assert [g.status for g in actual] == [
    'finished',
    'diverged',
    'finished',
    'finished',
  ]
  assert actual[1].validation is None
  assert 'Model 1 has diverged' in caplog.text
  kept = read_files(tmp_path)
  assert kept.keys() == files.keys()
  del kept['001.safetensors']
  assert kept == {name: files[name] for name in kept}
  assert not all(np.isfinite(x).all() for x in leaves(tmp_path, 1, setup))


def test_an_interrupted_grid_goes_on(
  config, files, setup, tmp_path, monkeypatch
):
  steps = []
  add = metrics.StepLog.add

  def interrupting(self, step, values):
    add(self, step, values)
    steps.append(step)
    if len(steps) in (5, 18):  # in the first stack, and in the second
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(metrics.StepLog, 'add', interrupting)
  for trained in (0, 2):
    with pytest.raises(loop.Interrupted):
      grid.train(config, tmp_path, setup=setup)
    assert len(members_lib.read(tmp_path)) == trained
  grid.train(config, tmp_path, setup=setup)
  epochs = sorted(m.epochs for m in members_lib.draw(config))
  assert len(steps) == 4 * (epochs[1] + epochs[3])  # none was done twice
  assert read_files(tmp_path) == files
  # As of a process that was killed while it removed a stack.
  (tmp_path / 'stacks' / '000').mkdir(parents=True)
  actual = grid.train(config, tmp_path, setup=setup)
  assert not (tmp_path / 'stacks').exists()
  assert actual == members_lib.read(tmp_path)
  assert len(steps) == 4 * (epochs[1] + epochs[3])


def test_its_list_says_what_there_is(config, trained, setup):
  text = json.loads((trained / 'grid.json').read_text('utf-8'))
  assert text['num_models'] == 4
  assert [line['index'] for line in text['models']] == [0, 1, 2, 3]
  validation = data.Benchmark('v', 'digits', config.data.validation)
  for line, each in zip(text['models'], members_lib.read(trained), strict=True):
    params = clip.load_safetensors(trained / line['file'], setup.anchor)
    params = jax.device_put(params, setup.placement.replicated)
    [score] = setup.evaluate([params], validation)
    assert line['validation'] == score.accuracy == each.validation


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'grid.num_models': 5},
      r'grid\.num_models: 5 models .* merge\.num_models=2 at a time',
    ),
    (
      {'grid.randaugment_count': 2},
      r'grid\.randaugment_count: .* data\.cache',
    ),
    ({'hooks': "('a.get_task',)"}, r"hooks: \['a\.get_task'\] cannot go with"),
    ({'train.warmup_steps': 12}, r'train\.warmup_steps: 12 .* the 12 steps'),
  ],
)
def test_what_does_not_go_together(
  configured, setup, tmp_path, changes, message
):
  with pytest.raises(ValueError, match=message):
    grid.train(
      configured({'grid.epochs': '(3, 3)', **changes}),
      tmp_path,
      setup=setup,
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'bounds', ['(2, 1)', '(0, 1)', '(1, 2, 3)', "('a', 'b')"]
)
def test_bounds_that_are_none(configured, bounds):
  with pytest.raises(ValueError, match=r'grid\.epochs'):
    grid.check(configured({'grid.epochs': bounds}))
