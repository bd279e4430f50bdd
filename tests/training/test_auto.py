"""What 'auto' becomes, and the estimate behind it."""

import json
import logging
import pathlib

import pytest

from modelstock_jax.training import auto
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import memory
from modelstock_jax.training import sharding

ROOT = pathlib.Path(__file__).parents[2]
SPLIT = memory.FSDP_MIN_SIZE
TOGETHER = (1, 0, 'none')


class _Chip:
  def __init__(self, number, process, slice_):
    self.id = number
    self.process_index = process
    self.slice_index = slice_


def _chips(number, *, slices=1, per_host=4):
  per_slice = number // slices
  return [_Chip(i, i // per_host, i // per_slice) for i in range(number)]


def _config(name, *flags):
  flags = [f'--config.{flag}' for flag in flags]
  return config_lib.load(ROOT / 'configs' / f'clip_vit_{name}.py', flags)


def _choose(config, devices, gibibytes):
  bytes_ = None if gibibytes is None else int(gibibytes * 2**30)
  chosen = auto.choose(config, devices, bytes_)
  return tuple(auto.settings(chosen).values())


# By hand, in GB, of what a device holds with a model of its own: 6 copies of
# the weights (0.35 of B, 1.22 of L), and of each image 17 (B/32), 90 (B/16) and
# 341 MB (L/14) of activations, or with 'block' 27 MB (L/14).
@pytest.mark.parametrize(
  ('name', 'devices', 'gibibytes', 'expected'),
  [
    ('b32', _chips(8), 15.75, (2, 0, 'none')),  # 2.1 + 2.2 of 16.9
    ('b32', _chips(8, slices=2), 31.25, (2, 0, 'none')),
    ('b16', _chips(8), 31.25, (2, 0, 'none')),  # 2.1 + 11.5 of 33.6
    ('b16', _chips(8), 15.75, (2, SPLIT, 'none')),  # 2.1 or 0.5 + 11.5 of 16.9
    ('l14', _chips(8), 15.75, (2, SPLIT, 'block')),  # 43.6 or 3.4 of 16.9
    ('l14', _chips(8), 31.25, (2, SPLIT, 'block')),
    ('l14', _chips(16, slices=2), 15.75, (2, SPLIT, 'block')),
    ('l14', _chips(4), 95.74, (2, SPLIT, 'block')),  # 87 of 103: too near
    ('l14', _chips(256), 15.75, (2, 0, 'none')),  # 7.3 + 1.4 of 16.9
    ('l14', _chips(8), 1.0, (2, SPLIT, 'block')),  # nothing fits: the last
    ('l14', _chips(2), 15.75, (2, 0, 'block')),  # nothing to split over
    # As without 'auto': on one device, and where nothing is known.
    ('l14', _chips(1), 15.75, TOGETHER),
    ('l14', _chips(8), None, TOGETHER),
  ],
)
def test_the_first_level_that_fits(name, devices, gibibytes, expected):
  assert _choose(_config(name), devices, gibibytes) == expected


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    (['mesh.stock=1'], (1, SPLIT, 'block')),
    (['mesh.fsdp_min_size=0'], (2, 0, 'block')),
    (['mesh.fsdp_min_size=64'], (2, 64, 'block')),
    (['train.remat=none'], (2, SPLIT, 'none')),
    (['train.remat=dots'], (2, SPLIT, 'dots')),
    (['train.models=map'], (1, SPLIT, 'block')),
    # 43.6 / 4 + 2.4 of 16.9; 1.2 more, a whole gradient, is above 0.8 of it.
    (['train.accumulate=4'], (2, SPLIT, 'none', 'parts')),
    (
      ['train.accumulate=4', 'train.remat=block'],
      (2, SPLIT, 'block', 'once'),  # 27 MB of an image
    ),
    (['train.accumulate=8'], (2, 0, 'none', 'once')),  # it is whole anyway
    (
      ['train.accumulate=8', 'train.sum_gradients=parts'],
      (2, 0, 'none', 'parts'),
    ),
    (['train.batch_size=64'], (2, 0, 'none')),
    (['merge.num_models=1'], (1, SPLIT, 'block')),
    (['merge.num_models=3'], (1, SPLIT, 'block')),  # do not divide 8
    (['mesh.stock=1', 'mesh.fsdp_min_size=0', 'train.remat=none'], TOGETHER),
  ],
)
def test_what_is_set_is_kept(flags, expected):
  assert _choose(_config('l14', *flags), _chips(8), 15.75) == expected


def test_a_network_whose_sizes_are_not_in_the_config():
  config = config_lib.Config()
  assert auto.needed_bytes(config, 8) is None
  assert _choose(config, _chips(8), 1.0) == (2, 0, 'none')


@pytest.mark.parametrize(
  ('devices', 'num_models', 'expected'),
  [
    (_chips(8), 2, True),
    (_chips(8, per_host=8), 4, True),
    (_chips(8, slices=2), 4, True),  # two models on a slice
    (_chips(8, slices=4, per_host=2), 2, True),  # two slices for a model
    (_chips(8), 3, False),
    (_chips(6, per_host=2), 2, False),  # one and a half hosts for a model
    (_chips(12, slices=3, per_host=2), 2, False),  # and slices
  ],
)
def test_models_share_no_host_and_no_slice_in_part(
  devices, num_models, expected
):
  assert sharding.can_separate(devices[::-1], num_models) == expected


def _plans():
  """Config, devices and plan of every row that libtpu has compiled."""
  rows = json.loads((ROOT / 'experiments' / 'tpu_plans.json').read_text())
  for command, row in rows.items():
    path, *flags = command.removeprefix('plan --config=').split()
    flags = [flag for flag in flags if flag.startswith('--config.')]
    plan = row['plan']
    devices = _chips(plan['devices'], slices=plan['slices'])
    config = config_lib.load(ROOT / path, flags)
    yield auto.choose(config, devices, plan['hbm_bytes']), plan


def test_the_estimate_is_what_the_compiler_says():
  ratios = []
  for config, plan in _plans():
    estimate = auto.needed_bytes(config, plan['devices'])
    assert estimate
    # The promise. It is not that what does not fit by the estimate does not.
    assert plan['fits'] or estimate > auto.SHARE * plan['hbm_bytes']
    undone = plan['slices'] > 1 and config.train.remat == 'block'
    if plan['fits'] and not undone:
      peak = plan['peak_bytes'] - plan['step']['code_bytes']
      ratios.append(peak / estimate)
  assert len(ratios) >= 14
  assert all(0.9 < ratio < 1 / auto.SHARE for ratio in ratios), ratios


def test_resolve_says_what_it_has_chosen(monkeypatch, caplog):
  caplog.set_level(logging.INFO, 'modelstock_jax')
  config = _config('b16')
  monkeypatch.setattr(auto, '_local_memory', lambda: int(15.75 * 2**30))
  resolved = auto.resolve(config)
  assert (
    'Placement on 8 device(s): mesh.stock=2, mesh.fsdp_min_size=65536, '
    in (caplog.text)
  )
  caplog.clear()
  assert auto.resolve(resolved) is resolved
  assert not caplog.text
  # On CPU it is as it was; and a run may move from one to the other.
  monkeypatch.undo()
  elsewhere = auto.resolve(config)
  assert tuple(auto.settings(elsewhere).values()) == TOGETHER
  differences = changes_lib.differences(resolved, elsewhere)
  assert len(differences) == 2
  assert changes_lib.of_run(differences) == []


@pytest.mark.parametrize('name', ['b32', 'b16', 'l14'])
@pytest.mark.parametrize('devices', [2, 8])
def test_suggestions_never_lead_back(name, devices):
  """A flag that is suggested leaves a run that needs no more than before."""
  gibibytes = 15.75
  config = _config(name)
  chips = _chips(devices)
  chosen = auto.choose(config, chips, int(gibibytes * 2**30))
  before = auto.needed_bytes(chosen, devices)
  flags = memory.suggest(chosen, devices)
  assert flags
  for flag in flags:
    again = config_lib.override(config, [flag])
    again = auto.choose(again, chips, int(gibibytes * 2**30))
    after = auto.needed_bytes(again, devices)
    assert after < before or after <= auto.SHARE * gibibytes * 2**30, flag
