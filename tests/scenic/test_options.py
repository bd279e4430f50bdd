"""The block `config.model_stock`."""

import json

import ml_collections
import pytest

pytestmark = pytest.mark.oracle


def read(scenic, **block):
  config = {'num_training_epochs': 1, 'model_stock': block}
  return scenic.options.read(ml_collections.ConfigDict(config))


def test_defaults(scenic):
  config = ml_collections.ConfigDict({'num_training_epochs': 1})
  assert scenic.options.read(config) == read(scenic)
  json.dumps(scenic.options.defaults().to_dict())  # plain values


@pytest.mark.parametrize(
  ('every', 'steps'), [('epoch', 5), ('end', 100), (3, 15), ('2', 10)]
)
def test_merge_interval(scenic, every, steps):
  options = read(scenic, merge_every=every)
  assert scenic.options.merge_interval(options, 5, 100) == steps


def test_epochs_of_unknown_length(scenic):
  interval = scenic.options.merge_interval
  with pytest.raises(ValueError, match='num_train_examples'):
    interval(read(scenic), None, 100)
  assert interval(read(scenic, merge_every='end'), None, 100) == 100


@pytest.mark.parametrize(
  ('block', 'message'),
  [
    ({'merge_evry': 1}, 'nearest is model_stock.merge_every'),
    (
      {'anchor': {'pth': 'x'}},
      r'model_stock\.anchor\.pth.*nearest is model_stock.anchor.path',
    ),
    ({'anchor': 'x'}, r'model_stock\.anchor: must be a valid dict'),
    ({'num_models': 1}, 'num_models: must be at least 2'),
    ({'merge_every': 0}, 'merge_every: must be'),
    ({'merge_every': 'never'}, 'merge_every: must be'),
    ({'clip': 1}, 'clip: must be a valid boolean'),
    ({'strength': -1.0}, 'strength: must be at least 0'),
    ({'unit': 'filter'}, "unit: must be 'layer' or 'model', got 'filter'"),
    ({'anchor': {'head': 'init'}}, "anchor.path: must be set for head='init'"),
    ({'anchor': {'path': 'x', 'head': 'zero_shot'}}, 'anchor.prompts: must'),
  ],
)
def test_blocks_that_cannot_be(scenic, block, message):
  with pytest.raises(ValueError, match=message):
    read(scenic, **block)


def test_all_problems_at_once(scenic):
  with pytest.raises(ValueError, match='unit') as caught:
    read(scenic, unit='filter', average='median', num_models=0)
  assert len(str(caught.value).splitlines()) == 4
