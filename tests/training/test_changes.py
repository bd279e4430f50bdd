import pathlib

from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config as config_lib


def test_differences_name_every_key():
  config = config_lib.defaults()
  other = config_lib.override(
    config, ['--config.train.epochs=3', '--config.merge.every=2']
  )
  assert changes_lib.differences(config, config) == []
  assert changes_lib.differences(config, other) == [
    "merge.every: 'epoch' -> 2",
    'train.epochs: 10 -> 3',
  ]


def test_a_key_that_came_later_is_a_difference():
  assert changes_lib.differences({'a': 1}, {'a': 1, 'b': ''}) == [
    "b: 'absent' -> ''"
  ]


def test_how_a_run_is_carried_out_may_change():
  config = config_lib.override(config_lib.defaults(), ['--config.mesh.stock=1'])
  other = config_lib.override(
    config,
    [
      '--config.mesh.stock=2',
      '--config.train.accumulate=4',
      '--config.train.epochs=3',
      '--config.evaluate.batch_size=8',
      '--config.evaluate.every_epochs=2',
      '--config.data.data_dir=/data',
      '--config.checkpoint.every_steps=1',
      '--config.anchor.allow_pickle=True',
    ],
  )
  changes = changes_lib.differences(config, other)
  of_run = changes_lib.of_run(changes)
  assert of_run == [
    'evaluate.every_epochs: 1 -> 2',
    'train.epochs: 10 -> 3',
  ]
  assert [line for line in changes if line not in of_run] == [
    'anchor.allow_pickle: False -> True',
    'checkpoint.every_steps: 1000 -> 1',
    "data.data_dir: '' -> '/data'",
    'evaluate.batch_size: 512 -> 8',
    'mesh.stock: 1 -> 2',
    'train.accumulate: 1 -> 4',
  ]


def test_what_may_change_are_keys_that_there_are():
  keys = [f'{key}:' for key in changes_lib.flatten(config_lib.defaults())]
  for part in changes_lib.EXECUTION:
    assert [key for key in keys if key.startswith(part)], part


def test_what_may_change_is_documented():
  text = (pathlib.Path(__file__).parents[2] / 'docs' / 'hosts.md').read_text()
  for part in changes_lib.EXECUTION:
    key = f'{part}*' if part.endswith('.') else part.removesuffix(':')
    assert f'`{key}`' in text
