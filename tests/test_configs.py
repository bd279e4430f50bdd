"""Every config in configs/ is one of a run, and says what it is."""

import pathlib
import re

import jax
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.data import captions
from modelstock_jax.training import changes
from modelstock_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PATHS = {
  path.stem: path
  for pattern in (
    'configs/[!_s]*.py',  # scenic_* are Scenic's
    'experiments/baselines/[!r]*.py',  # recipes.py is what they share
    'experiments/soups/digits_*.py',
  )
  for path in ROOT.glob(pattern)
}
NAMES = sorted(PATHS)

# Name, size, id on the hub, learning rate, layers that are merged.
OF_THE_PAPER = [
  ('clip_vit_b32', 'ViT-B/32', 'openai/clip-vit-base-patch32', 3e-5, 154),
  ('clip_vit_b16', 'ViT-B/16', 'openai/clip-vit-base-patch16', 3e-5, 154),
  ('clip_vit_l14', 'ViT-L/14', 'openai/clip-vit-large-patch14', 1e-5, 298),
]

# Of the paper's tables: ImageNet, the mean of the shifts, and for ViT-B/16
# each of V2, R, A and Sketch. The averages recompute from the columns.
ROWS = {
  'clip_vit_b32': [
    ('zero-shot', 63.34, 48.51),
    ('fine-tuned', 78.35, 47.03),
    ('Model Stock', 79.89, 50.99),
    ('fine-tuned*', 79.72, 46.37),
    ('Model Stock*', 81.19, 48.69),
  ],
  'clip_vit_b16': [
    ('zero-shot', 68.3, 59.5, 62.0, 77.7, 49.9, 48.3),
    ('fine-tuned', 82.8, 57.7, 72.9, 66.4, 43.7, 48.0),
    ('Model Stock', 84.1, 62.4, 74.8, 71.8, 51.2, 51.8),
    ('Model Stock*', 85.2, 60.1, 75.3, 68.7, 45.0, 51.3),
  ],
  'clip_vit_l14': [
    ('zero-shot', 75.0, 63.0),
    ('fine-tuned', 85.8, 66.8),
    ('Model Stock', 87.0, 71.6),
    ('Model Stock*', 87.7, 73.5),
  ],
}


def hooks(name, *functions):
  """Return what a config records of the functions that its file defines."""
  return [f'{name}.get_{function}' for function in functions]


# Of its table of ViT-B/16, as above: each a config of one model, and what sets
# it apart from that of Model Stock.
BASELINES = {
  'clip_vit_b16_fine_tuned': (
    ('fine-tuned', 82.8, 57.7, 72.9, 66.4, 43.7, 48.0),
    {},
  ),
  'linear_probe:clip_vit_b16': (
    ('LP', 79.7, 48.1, 71.5, 52.4, 27.8, 40.5),
    {
      'anchor.head': 'linear_probe',
      'hooks': hooks('linear_probe', 'task', 'optimizer'),
    },
  ),
  'clip_vit_b16_lp_ft': (
    ('LP-FT', 81.7, 60.5, 71.6, 72.9, 49.1, 48.4),
    {'anchor.head': 'linear_probe'},
  ),
  'car_ft:clip_vit_b16': (
    ('CAR-FT', 83.2, 59.4, 73.0, 71.3, 43.7, 49.5),
    {
      'car_ft.weight': 1.0,
      'hooks': hooks('car_ft', 'task'),
    },
  ),
  'ftp:clip_vit_b16': (
    ('FTP', 84.2, 49.7, 74.6, 47.2, 26.5, 50.2),
    {
      'ftp.strength': 1.0,
      'ftp.exclude': ['head'],
      'hooks': hooks('ftp', 'optimizer'),
      'merge.opt_state': 'keep',
      'train.weight_decay': 0.0,
    },
  ),
  'flyp:clip_vit_b16': (
    ('FLYP', 82.6, 60.5, 73.0, 71.4, 48.1, 49.6),
    {
      'hooks': hooks('flyp', 'task'),
      'train.learning_rate': 1e-5,
      'train.clip_norm': 0.0,
    },
  ),
}

ON_DIGITS = {
  'digits_fine_tuned': {'merge.num_models': 1},
  'linear_probe': {
    'anchor.head': 'linear_probe',
    'hooks': hooks('linear_probe', 'task', 'optimizer'),
    'merge.num_models': 1,
  },
  'car_ft': {
    'car_ft.weight': 1.0,
    'hooks': hooks('car_ft', 'task'),
  },
  'ftp': {
    'ftp.strength': 1.0,
    'ftp.exclude': ['head'],
    'hooks': hooks('ftp', 'optimizer'),
    'merge.opt_state': 'keep',
    'train.weight_decay': 0.0,
  },
  'flyp': {
    'hooks': hooks('flyp', 'task'),
  },
}


def load(name, flags=()):
  file, separator, variant = name.partition(':')
  return config_lib.load(f'{PATHS[file]}{separator}{variant}', flags)


def docstring(name):
  text = PATHS[name.partition(':')[0]].read_text('utf-8')
  return text.split('"""')[1]


def test_all_are_here():
  assert {name for name, *_ in OF_THE_PAPER} | {'digits'} <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_it_is_valid_and_says_its_command(name):
  load(name)  # which validates it
  program = 'modelstock train'
  if name.endswith('_grid'):
    program = 'python -m experiments.soups'
  command = f'{program} --config={PATHS[name].relative_to(ROOT)}'
  assert f'{command} --workdir=...' in ' '.join(docstring(name).split())


@pytest.mark.parametrize(
  ('name', 'size', 'weights', 'learning_rate', 'layers'), OF_THE_PAPER
)
def test_of_the_paper(name, size, weights, learning_rate, layers):
  config = load(name)
  network = config.model.network()
  assert network == clip.SIZES[size]
  assert config.anchor.weights == weights
  assert (config.anchor.head, config.anchor.prompts) == (
    'zero_shot',
    'imagenet',
  )
  assert config.train.learning_rate == learning_rate
  assert (config.train.batch_size, config.train.epochs) == (512, 10)
  # `_transform(is_train=True)` and `cosine_lr` of WiSE-FT.
  assert config.augment.crop_scale == (0.9, 1.0)
  assert config.train.warmup_steps == 500
  assert not config.train.warmup_from_zero
  assert (config.merge.num_models, config.merge.every) == (2, 'epoch')

  init = clip.classifier(network, num_classes=1000).init
  anchor = jax.eval_shape(init, jax.random.key(0))
  leaves = jax.tree.leaves_with_path(anchor)
  paths = [merging.path_name(path) for path, _ in leaves]
  shared = {clip.clip_layers(path, None).group or path for path in paths}
  assert len(shared) == layers


@pytest.mark.parametrize('name', ROWS)
def test_the_numbers_of_the_paper(name):
  lines = docstring(name).splitlines()
  for method, *values in ROWS[name]:
    [line] = [x for x in lines if re.match(f' +{re.escape(method)}  ', x)]
    actual = [float(x) for x in re.findall(r' (\d+\.\d+)', line)]
    assert actual == values
    if len(values) > 2:
      assert sum(values[2:]) / 4 == pytest.approx(values[1], abs=0.06)
  assert 'not yet run' in docstring(name)


@pytest.mark.parametrize('size', ['b32', 'b16'])
def test_the_mean_is_the_papers(size):
  """Five shifts, with ObjectNet uncropped, or four without it."""
  group = data.GROUPS[f'paper_{size}']
  assert load(f'clip_vit_{size}').evaluate.benchmarks == tuple(group.benchmarks)
  uncropped = 'objectnet_uncropped' in group.benchmarks
  assert (uncropped, len(group.benchmarks)) == (size == 'b32', 5 + uncropped)


def test_published_means_recompute():
  """Of the released checkpoints as the authors print them, and of ROWS."""
  means = {
    'paper_b32': {'published (end)': (79.67, 52.69)},
    'paper_b16': {
      'published': ROWS['clip_vit_b16'][2][1:3],
      'published*': ROWS['clip_vit_b16'][3][1:3],
    },
  }
  means['paper_b32']['published (epoch)'] = ROWS['clip_vit_b32'][2][1:]
  for group, rows in means.items():
    for title, (imagenet, mean) in rows.items():
      first, *shifts = data.GROUPS[group].published[title]
      assert first == pytest.approx(imagenet, abs=0.006)
      tolerance = 0.006 if group == 'paper_b32' else 0.06
      assert sum(shifts) / len(shifts) == pytest.approx(mean, abs=tolerance)


@pytest.mark.parametrize('name', ROWS)
def test_a_linear_probe_is_one_flag(name):
  flag = '--config.anchor.head=linear_probe'
  assert flag in docstring(name)
  assert load(name, [flag]).anchor.head == 'linear_probe'


def differences(name, base):
  """Values that one config has and another has not."""
  ours = changes.flatten(load(name))
  theirs = changes.flatten(load(base))
  return {key: value for key, value in ours.items() if value != theirs.get(key)}


@pytest.mark.parametrize('name', BASELINES)
def test_a_baseline_of_the_paper(name):
  (method, *values), expected = BASELINES[name]
  [line] = [
    x
    for x in docstring(name).splitlines()
    if re.match(f' +{re.escape(method)}  ', x)
  ]
  assert [float(x) for x in re.findall(r' (\d+\.\d+)', line)] == values
  assert sum(values[2:]) / 4 == pytest.approx(values[1], abs=0.1)
  assert 'not yet run' in docstring(name)
  alone = {'merge.num_models': 1, 'merge.every': 'end'}
  assert differences(name, 'clip_vit_b16') == {**expected, **alone}


@pytest.mark.parametrize('name', ON_DIGITS)
def test_a_baseline_on_digits(name):
  expected = {'merge.every': 'end', **ON_DIGITS[name]}
  assert differences(name, 'digits') == expected


def test_a_baseline_of_another_recipe():
  with pytest.raises(ValueError, match="'cifar': must be one of digits, clip"):
    load('flyp:cifar')


def test_no_choice_sees_the_images_that_are_reported():
  for name in NAMES:
    config = load(name)
    assert 'test' not in (config.data.train + config.data.validation)
  for name, *_ in OF_THE_PAPER:
    config = load(name)
    assert config.data.train == 'train:without=26'
    assert config.data.validation == 'train:held_out=26'


# `finetune.py` of Model Soups; timm's defaults in `transforms_imagenet_train`.
SOUPS = {
  'augment.crop_scale': [1.0, 1.0],
  'train.epochs': 8,
  'train.batch_size': 256,
  'train.learning_rate': 2e-5,
}
TIMM = {
  'augment.crop_scale': [0.08, 1.0],
  'augment.flip': 0.5,
  'augment.color_jitter': 0.4,
}


@pytest.mark.parametrize(('variant', 'more'), [('', {}), (':timm_aug', TIMM)])
def test_the_recipe_of_model_soups(variant, more):
  actual = differences(f'model_soups_vit_b32{variant}', 'clip_vit_b32')
  assert actual == {**SOUPS, **more}


def test_a_string_of_the_random_search_of_model_soups():
  flags = ['--config.augment.randaugment=m12-n1']
  flags.append('--config.augment.color_jitter=0.0')
  assert ' '.join(flags) in ' '.join(docstring('model_soups_vit_b32').split())
  config = load('model_soups_vit_b32:timm_aug', flags)
  assert (config.augment.randaugment, config.augment.flip) == ('m12-n1', 0.5)


def test_a_recipe_that_model_soups_does_not_have():
  with pytest.raises(ValueError, match="'mixup': must be 'none' or 'timm_aug'"):
    load('model_soups_vit_b32:mixup')


def test_the_demo_describes_characters():
  config = load('digits')
  assert config.anchor.prompts == 'characters'
  assert config.model.text.vocab_size == captions.VOCAB_SIZE
