import json
import pathlib

import ml_collections
import pytest

from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config as config_lib

DIGITS = pathlib.Path(__file__).parents[2] / 'configs' / 'digits.py'


@pytest.fixture
def write(tmp_path):
  """Writes a config file whose get_config() runs the given lines."""

  def write(*lines):
    path = tmp_path / 'config.py'
    path.write_text(
      'from modelstock_jax.training import config as config_lib\n'
      'def get_config():\n'
      '  config = config_lib.defaults()\n'
      + ''.join(f'  {line}\n' for line in lines)
      + '  return config\n'
    )
    return path

  return write


def test_defaults_are_valid_and_locked():
  config = config_lib.defaults()
  config_lib.validate(config)
  with pytest.raises(AttributeError):
    config.train.epoch = 3


def test_a_loaded_config_is_frozen(write):
  config = config_lib.load(write('config.seed = 5'))
  assert config.seed == 5
  with pytest.raises(ValueError, match='frozen'):
    config.seed = 6


def test_flags_override_files(write):
  config = config_lib.load(
    write('config.seed = 5', 'config.train.epochs = 7'),
    ['--config.seed=6', '--config.train.mixup=0.5', '--config.data.cache=true'],
  )
  assert (config.seed, config.train.epochs) == (6, 7)
  assert (config.train.mixup, config.data.cache) == (0.5, True)


def test_overriding_leaves_the_original_alone():
  config = config_lib.defaults()
  changed = config_lib.override(config, ['--config.train.epochs=3'])
  assert (config.train.epochs, changed.train.epochs) == (10, 3)


@pytest.mark.parametrize(
  ('line', 'near'),
  [
    ('config.train.epoch = 3', r'train\.epochs'),
    ('config.merge.evry = 3', r'merge\.every'),
    ('config.trian.epochs = 3', 'train'),
  ],
)
def test_unknown_key_in_a_file_names_the_nearest(write, line, near):
  path = write(line)
  with pytest.raises(ValueError, match=f'{path}: .*no such key; .* {near}'):
    config_lib.load(path)


@pytest.mark.parametrize(
  ('flag', 'near'),
  [
    ('--config.train.epoch=3', r'--config\.train\.epochs \(now 10\)'),
    ('--config.marge.every=3', r'--config\.merge\.every'),
    ('--config.clip_norm=3', r'--config\.train\.clip_norm'),
    ('--train.epochs=3', r'--config\.train\.epochs'),
  ],
)
def test_unknown_key_in_a_flag_names_the_nearest(write, flag, near):
  with pytest.raises(ValueError, match=f'{flag}.*{near}'):
    config_lib.load(write(), [flag])


def test_unknown_key_of_another_dict_names_the_nearest():
  values = config_lib.defaults().to_dict()
  values['train']['epoch'] = 3
  with pytest.raises(ValueError, match=r'train\.epoch: .*train\.epochs'):
    config_lib.validate(ml_collections.ConfigDict(values))


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ("config.train.epochs = 'three'", 'epochs'),
    ('config.train.epochs = 2.5', 'epochs'),
    ("config.merge.clip = 'yes'", 'clip'),
    ("config.data.mean = 'grey'", 'mean'),
  ],
)
def test_wrong_type_in_a_file(write, line, words):
  path = write(line)
  with pytest.raises(ValueError, match=f'{path}[^$]*{words}'):
    config_lib.load(path)


@pytest.mark.parametrize(
  'flag',
  [
    '--config.train.epochs=three',
    '--config.train.epochs=2.5',
    '--config.train.learning_rate=fast',
    '--config.merge.clip=maybe',
  ],
)
def test_wrong_type_in_a_flag(write, flag):
  key, _, value = flag.partition('=')
  with pytest.raises(ValueError, match=value) as raised:
    config_lib.load(write(), [flag])
  assert key.removeprefix('--config.') in str(raised.value)


def test_flag_without_a_value(write):
  with pytest.raises(ValueError, match=r'--config\.seed: has no value'):
    config_lib.load(write(), ['--config.seed'])


def test_integers_are_also_real_ones(write):
  config = config_lib.load(write('config.train.weight_decay = 1'))
  assert config.train.weight_decay == 1.0


@pytest.mark.parametrize(
  ('value', 'expected'), [('epoch', 'epoch'), ('end', 'end'), ('3', 3)]
)
def test_merge_every(write, value, expected):
  literal = repr(expected)
  from_file = config_lib.load(write(f'config.merge.every = {literal}'))
  from_flag = config_lib.load(write(), [f'--config.merge.every={value}'])
  over_file = config_lib.load(
    write('config.merge.every = 7'), [f'--config.merge.every={value}']
  )
  assert from_file.merge.every == expected
  assert from_flag.merge.every == expected
  assert over_file.merge.every == expected
  assert type(from_flag.merge.every) is type(expected)


@pytest.mark.parametrize('value', ['never', '0', '-1', '1.5', 'True', ''])
def test_merge_every_of_another_kind(write, value):
  with pytest.raises(ValueError, match=r"merge.every: must be 'epoch', 'end'"):
    config_lib.load(write(), [f'--config.merge.every={value}'])


@pytest.mark.parametrize('literal', ['0', '-2', '1.5', 'True', 'None'])
def test_merge_every_of_another_kind_in_a_file(write, literal):
  with pytest.raises(ValueError, match=r"merge.every: must be 'epoch', 'end'"):
    config_lib.load(write(f'config.merge.every = {literal}'))


def test_all_problems_are_listed_at_once(write):
  flags = {
    'merge.num_models': '0',
    'merge.anchor': 'first',
    'train.batch_size': '0',
    'train.learning_rate': '-1',
    'train.clip_norm': 'nan',
    'train.mixup': 'inf',
    'seed': str(2**32),
    'data.mean': "(0.5, 'a')",
  }
  with pytest.raises(ValueError, match='not valid') as raised:
    config_lib.load(write(), [f'--config.{k}={v}' for k, v in flags.items()])
  lines = str(raised.value).splitlines()[1:]
  assert len(lines) == len(flags)
  for key, value in flags.items():
    [line] = [line for line in lines if line.strip().startswith(key)]
    assert value.strip("(0.5, ')") in line


@pytest.mark.parametrize(
  ('flag', 'range_'),
  [
    ('train.label_smoothing=1000', 'must be below or equal to 1, got'),
    ('train.learning_rate=inf', 'must be a valid number'),
    ('train.learning_rate=1e999', 'finite'),
    ('merge.strength=inf', 'must be a valid number'),
    ('merge.strength=-1', 'at least 0'),
    ('model.image.image_size=4294967296', 'must be below or equal to 4096'),
    ("augment.crop_scale=('a','b')", 'number'),
    ("data.mean=('a','b','c')", 'number'),
    ('data.std=(0.0,)', 'at least 0.000001'),
    ('mesh.stock=0', "must be 'auto' or a number of devices >= 1"),
    ('mesh.stock=Auto', "must be 'auto' or a number of devices >= 1"),
    ('mesh.fsdp_min_size=-1', "'auto' or a number of elements >= 0, got '-1'"),
    ('train.remat=all', "must be 'auto', 'none', 'block' or 'dots', got 'all'"),
  ],
)
def test_settings_out_of_range(write, flag, range_):
  with pytest.raises(ValueError, match='not valid') as raised:
    config_lib.load(write(), [f'--config.{flag}'])
  lines = str(raised.value).splitlines()[1:]
  for line in lines:
    assert line.strip().startswith(flag.partition('=')[0])
    assert range_ in line


@pytest.mark.parametrize('value', ['1e-300', '1e-40', '5e-324'])
def test_numbers_too_small_for_float32(write, value):
  """They would be 0, or draw NaN from a Beta distribution."""
  keys = ('train.mixup', 'train.clip_norm', 'train.learning_rate')
  keys += ('train.label_smoothing', 'merge.strength')
  flags = [f'--config.{key}={value}' for key in keys]
  with pytest.raises(ValueError, match='not valid') as raised:
    config_lib.load(write(), flags)
  lines = map(str.strip, str(raised.value).splitlines()[1:])
  assert sorted(lines) == [
    f'{key}: must be 0 or at least 1e-30, as float32 may not hold it, got '
    f'{float(value)}.'
    for key in sorted(keys)
  ]
  least = config_lib.load(write(), [f'--config.{key}=1e-30' for key in keys])
  assert least.train.mixup == 1e-30


def test_values_that_exclude_each_other_are_listed_at_once(write):
  flags = {
    'train.models': 'map',
    'mesh.stock': '5',
    'data.cache': 'true',
    'augment.flip': '0.5',
  }
  with pytest.raises(ValueError, match='not valid') as raised:
    config_lib.load(write(), [f'--config.{k}={v}' for k, v in flags.items()])
  keys = [line.split(':')[0].strip() for line in str(raised.value).splitlines()]
  assert keys[1:] == ['mesh.stock', 'train.models', 'data.cache']


def test_models_on_devices_do_not_take_turns(write):
  flags = ['--config.train.models=map', '--config.mesh.stock=2']
  with pytest.raises(ValueError, match=r"train.models: 'map' .*stock=1"):
    config_lib.load(write(), flags)


def test_augmentation_by_flags():
  config = config_lib.override(
    config_lib.defaults(),
    [
      '--config.augment.crop_scale=(0.08, 1.0)',
      '--config.augment.flip=0.5',
      '--config.augment.randaugment_count=2',
      '--config.augment.randaugment_magnitude=9',
    ],
  )
  config = config_lib.validate(config)
  assert config.augment.crop_scale == (0.08, 1.0)
  assert config.augment.randaugment_magnitude == 9


def test_randaugment_of_timm_by_a_flag():
  flags = ['--config.augment.randaugment=rand-m9-mstd0.5-inc1']
  config = config_lib.override(config_lib.defaults(), flags)
  augment = config_lib.validate(config).augment
  assert augment.transform(8).randaugment == 'rand-m9-mstd0.5-inc1'


def test_augmentation_comes_back_from_json(tmp_path):
  config = config_lib.override(
    config_lib.defaults(), ['--config.augment.crop_scale=(0.9, 1.0)']
  )
  path = tmp_path / 'config.json'
  path.write_text(config.to_json(), 'utf-8')
  assert (
    config_lib.from_json(path).augment == config_lib.validate(config).augment
  )


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['augment.flip=1.5'], r'augment\.\*: flip=1\.5'),
    (['augment.crop_scale=(0.5, 2.0)'], r'augment\.\*: crop_scale=\(0\.5, 2'),
    (
      ['augment.crop_ratio=(2.0, 1.0)', 'augment.color_jitter=-1'],
      r'crop_ratio=.*color_jitter=',
    ),
    (['data.max_bad_examples=-1'], 'data.max_bad_examples: must be at least 0'),
  ],
)
def test_augmentation_that_cannot_be(write, flags, words):
  with pytest.raises(ValueError, match=words):
    config_lib.load(write(), [f'--config.{flag}' for flag in flags])


def test_augmentation_of_the_wrong_type_is_said_once(write):
  with pytest.raises(ValueError, match='not valid') as raised:
    config_lib.load(
      write("config['augment'] = {**config.augment, 'flip': 'a'}")
    )
  [line] = str(raised.value).splitlines()[1:]
  assert 'augment.flip: must be a valid number' in line


def test_negative_seed(write):
  with pytest.raises(ValueError, match=r'seed: must be at least 0, got -1'):
    config_lib.load(write(), ['--config.seed=-1'])


def test_missing_file():
  with pytest.raises(FileNotFoundError, match=r'/nowhere/config\.py'):
    config_lib.load('/nowhere/config.py')


def test_file_without_get_config(tmp_path):
  path = tmp_path / 'empty.py'
  path.write_text('')
  with pytest.raises(ValueError, match=f'{path}.*get_config'):
    config_lib.load(path)


def test_json_comes_back(tmp_path):
  config = config_lib.load(DIGITS, ['--config.merge.every=2'])
  path = tmp_path / 'config.json'
  path.write_text(config.to_json())
  assert json.loads(path.read_text())['merge']['every'] == 2
  assert changes_lib.differences(config_lib.from_json(path), config) == []


def test_the_config_of_a_workdir_grants_no_trust(tmp_path):
  path = tmp_path / 'config.json'
  flags = ['--config.anchor.allow_pickle=True', '--config.seed=3']
  config = config_lib.override(config_lib.defaults(), flags)
  path.write_text(config.to_json())
  read = config_lib.from_json(path)
  assert config.anchor.allow_pickle
  assert not read.anchor.allow_pickle
  assert config_lib.from_json(path, allow_pickle=True) == config
  assert changes_lib.differences(config, read) == [
    'anchor.allow_pickle: True -> False'
  ]


def test_far_key_in_a_file_names_the_nearest_of_all(write):
  path = write('config.train.weights = 3')
  with pytest.raises(ValueError, match=r'the nearest is anchor\.weights'):
    config_lib.load(path)


def test_broken_json_is_named(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"seed": 0')
  with pytest.raises(ValueError, match=f'{path}: '):
    config_lib.from_json(path)


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('model.activation=relu', "'quick_gelu' or 'gelu', got 'relu'"),
    ('anchor.head=random', "'zero_shot' or 'linear_probe', got 'random'"),
    ('model.embed_dim=0', 'at least 1, got 0'),
  ],
)
def test_choices_of_network_and_anchor(write, flag, words):
  key = flag.partition('=')[0]
  with pytest.raises(ValueError, match=f'{key}: must be ') as raised:
    config_lib.load(write(), [f'--config.{flag}'])
  assert words in str(raised.value)


def test_towers_that_cannot_be_are_all_listed(write):
  path = write(
    'config.model.image.update(image_size=225, patch_size=32, width=768)',
    'config.model.image.update(depth=12, heads=7)',
    'config.model.text.update(width=512, depth=0, heads=8)',
  )
  with pytest.raises(ValueError, match='not valid') as raised:
    config_lib.load(path)
  image, text = str(raised.value).splitlines()[1:]
  assert 'model.image.*' in image
  assert 'patch_size=32 does not divide image_size=225' in image
  assert 'heads=7 does not divide width=768' in image
  assert 'model.text.depth: must be at least 1, got 0.' in text


def test_a_size_of_the_wrong_type_is_said_once():
  values = config_lib.defaults().to_dict()
  values['model']['image']['width'] = '8'
  with pytest.raises(ValueError, match=r'model\.image\.width') as raised:
    config_lib.validate(ml_collections.ConfigDict(values))
  assert len(str(raised.value).splitlines()) == 2


def test_config_of_another_version(tmp_path):
  values = config_lib.Config().to_dict()
  del values['train']['remat']
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(values))
  assert config_lib.from_json(path) == config_lib.Config()
  values['train']['context_weight'] = 1.0
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match='Another version') as raised:
    config_lib.from_json(path)
  assert 'train.context_weight: no such key' in str(raised.value)
  assert "new: ['train.remat']" in str(raised.value)


def test_a_section_of_the_file_is_not_checked(write, tmp_path):
  config = config_lib.load(
    write(
      'with config.unlocked():',
      "  config.mine = config_lib.section(weight=1.0, names=('a',))",
    ),
    ['--config.mine.weight=2'],
  )
  assert (config.mine.weight, config.mine.names) == (2.0, ('a',))
  path = tmp_path / 'config.json'
  path.write_text(config.to_json())
  assert config_lib.from_json(path) == config
  with pytest.raises(ValueError, match=r'--config\.mine\.weigth'):
    config_lib.override(config, ['--config.mine.weigth=2'])


def test_configs_of_the_package_have_names(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # where no file is of that name
  assert config_lib.load('digits') == config_lib.load(DIGITS)
  name = 'model_soups_vit_b32'
  variant = config_lib.load(f'{DIGITS.with_name(name)}.py:timm_aug')
  assert config_lib.load(f'{name}:timm_aug') == variant != config_lib.load(name)
  with pytest.raises(FileNotFoundError, match=r'digitz: .* but .*digits'):
    config_lib.load('digitz')
