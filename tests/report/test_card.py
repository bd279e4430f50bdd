import dataclasses
import json
import os
import pathlib
import re
import shlex

import huggingface_hub
import jax
import numpy as np
import pytest

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.cli import demo
from modelstock_jax.clip import weights
from modelstock_jax.report import card
from modelstock_jax.report import models
from modelstock_jax.report import results
from modelstock_jax.training import config as config_lib

B32 = clip.SIZES['ViT-B/32']
TOWER = dataclasses.replace(B32, text=None)
PIXELS = dict(mean=(0.25, 0.5, 0.75), std=(0.1, 0.2, 0.3))
STEP = 20  # a merge after epoch 5, as the fixture `merge_line` counts


@pytest.fixture
def config():
  return config_lib.load(
    demo.digits_config(),
    ['--config.merge.every=5', '--config.train.epochs=9'],
  )


@pytest.fixture
def workdir(tmp_path, config, merge_line, rows):
  """Write what a card reads of a run; its numbers are invented."""
  folder = tmp_path / 'run'
  for step in (STEP, 36):
    (folder / 'checkpoints' / str(step)).mkdir(parents=True)
  (folder / 'config.json').write_text(config.to_json())
  lines = [
    {'step': 4, 'kind': 'train', 'loss': [1.0, 2.0]},
    merge_line(5, 0.25, restarts=True),
    merge_line(9, 0.6, head_bias=-0.5),
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  results.save([row for row in rows if row.seed == 0], folder / 'results.json')
  return folder


def _card(config, source, format='huggingface', num_classes=None, **changes):
  head = {'head': {'bias': np.zeros(num_classes)}} if num_classes else {}
  step = source if isinstance(source, pathlib.Path) else None
  pixels = {**PIXELS, **changes}
  model = models.Model(config, head, **pixels, step=step)
  return card.card(model, format, str(source))


def _front_matter(text):
  start, block, _ = text.split('---\n', 2)
  assert start == ''
  return block.splitlines()


def _table(text, header):
  """The cells of a table, by those of its first column."""
  lines = text[text.index(f'| {header}') :].split('\n\n')[0].splitlines()
  cells = [[x.strip() for x in line.split('|')[1:-1]] for line in lines[2:]]
  return {name: rest for name, *rest in cells}


@pytest.mark.parametrize(
  ('model', 'format', 'classes', 'library', 'task'),
  [
    (
      B32,
      'huggingface',
      None,
      'transformers',
      'zero-shot-image-classification',
    ),
    (B32, 'open_clip', 10, 'open_clip', 'zero-shot-image-classification'),
    (TOWER, 'huggingface', 10, 'transformers', 'image-classification'),
    (TOWER, 'scenic', None, None, 'image-feature-extraction'),
  ],
)
def test_front_matter(model, format, classes, library, task):
  text = _card(model, '`x.pt`', format, num_classes=classes)
  lines = _front_matter(text)
  assert f'pipeline_tag: {task}' in lines
  names = [x for x in lines if x.startswith('library_name')]
  assert names == ([f'library_name: {library}'] if library else [])
  assert lines[-2:] == ['tags:', '- clip']
  assert 'license' not in text  # nobody has said which


def test_conversion_is_short():
  text = _card(B32, 'the Scenic file `clip.npy`')
  assert '# CLIP ViT-B/32\n\nConverted from the Scenic file `clip.npy`.' in text
  assert '151,277,313 parameters' in text
  assert 'mean (0.25, 0.5, 0.75)' in text
  assert 'deviation (0.1, 0.2, 0.3)' in text
  assert 'CLIPModel.from_pretrained(directory)' in text
  headings = [x for x in text.splitlines() if x.startswith('## ')]
  assert headings == ['## Sizes', '## Loading', '## Versions']
  assert 'classifier' not in text
  assert 'Model Stock' not in text


def _code(text):
  """The Python of a card, by blocks."""
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


def test_loaders_are_those_of_the_format():
  assert 'safetensors.torch' not in _card(B32, '`x`')
  in_torch, of_head, in_jax = _code(_card(TOWER, '`x`', num_classes=10))
  assert 'CLIPVisionModelWithProjection.from_pretrained(directory)' in in_torch
  assert len(of_head.splitlines()) == 10
  compile(of_head, 'README.md', 'exec')
  assert 'clip.load_head(directory)' in in_jax
  for format, call in {
    'open_clip': "open_clip.create_model(f'local-dir:{directory}')",
    'scenic': "load_pretrained(f'{directory}/clip.npy', allow_pickle=True)",
  }.items():
    text = _card(B32, '`x`', format, num_classes=10)
    assert call in text
    assert 'safetensors.torch' not in text
    assert '@ weight.T + bias' in text
    assert 'clip.load_head(directory)' in text


def test_run(workdir):
  text = _card(B32, workdir / 'checkpoints' / '36', num_classes=10)
  assert _front_matter(text)[-3:] == ['- clip', '- model-stock', '- merge']
  assert '# Model Stock of CLIP ViT-B/32' in text
  assert '2 classifiers' in text
  assert 'from `mini_clip`' in text
  assert 'arXiv:2403.19522' in text
  assert 'every 5 epochs' in text
  assert 'step 36 (epoch 9 of 9)' in text
  assert 'head began zero-shot, of the prompts `characters`' in text
  assert 'text tower and the temperature are those of `mini_clip`' in text
  assert str(workdir.parent) not in text


def test_run_without_its_text_tower(workdir):
  text = _card(TOWER, workdir / 'checkpoints' / '36', num_classes=10)
  assert 'There is no text tower.' in text
  assert 'temperature' not in text


def test_accuracy_of_a_run(workdir):
  """Means by hand: (50 + 30) / 2 and (70 + 10) / 2."""
  actual = _table(_card(B32, workdir / 'checkpoints' / '36'), 'Method')
  assert actual == {
    'Fine-tuned': ['90.0', '**40.0**', '50.0', '**30.0**', '1'],
    'Model Stock (end)': ['**92.0**', '**40.0**', '**70.0**', '10.0', '2'],
  }


def test_accuracy_is_that_of_the_latest_checkpoint(workdir):
  assert '## Accuracy' not in _card(B32, workdir / 'checkpoints' / str(STEP))


def test_accuracy_of_before_the_checkpoint(workdir):
  file = workdir / 'results.json'
  before = (workdir / 'checkpoints' / '36').stat().st_mtime - 10
  os.utime(file, (before, before))
  assert '## Accuracy' not in _card(B32, workdir / 'checkpoints' / '36')


def test_merge_of_the_step(workdir):
  """For two models t = 2 c / (1 + c): 2/5 at c = 1/4, 3/4 at c = 3/5."""
  text = _card(B32, workdir / 'checkpoints' / str(STEP))
  assert 'step 20 (epoch 5 of 9)' in text
  first = _table(text, 'Layer')
  assert set(map(tuple, first.values())) == {('0.250', '0.400')}
  last = _table(_card(B32, workdir / 'checkpoints' / '36'), 'Layer')
  assert last.pop('`head/bias`') == ['-0.500', '-2.000']
  assert set(map(tuple, last.values())) == {('0.600', '0.750')}
  # From the input to the output; query, key and value are one.
  names = list(first)
  assert names[:2] == ['`image/ln_pre/scale`', '`image/patch_embedding/kernel`']
  assert names[-1] == '`image/ln_post/scale`'
  assert '`image/block_0/attention/qkv/kernel`' in names
  assert not any('query' in name for name in names)
  # 2 of the head, 7 of each block, of which 3 are one, and 3 more.
  assert len(names) == 2 + 2 * (7 - 2) + 3


def test_step_without_a_merge_in_the_metrics(workdir):
  (workdir / 'checkpoints' / '40').mkdir()
  text = _card(B32, workdir / 'checkpoints' / '40')
  assert 'merge after step 40.' in text
  assert 'by layer' not in text


def test_many_layers(workdir):
  """Block b has the cosine (b + 1) / 16, what is outside of blocks -1/3."""
  model = clip.classifier(B32, 10)
  like = jax.eval_shape(model.init, jax.random.key(0))
  cosine = {}
  for path, _ in weights.flatten(like):
    depth = clip.layer_depth(path)
    cosine[path] = -1 / 3 if depth is None else (depth + 1) / 16
  ratio = {path: 2 * c / (1 + c) for path, c in cosine.items()}
  line = {'step': 36, 'kind': 'merge', 'epoch': 9, 'restarts': False}
  line |= {'cosine': cosine, 'ratio': ratio}
  (workdir / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  text = _card(B32, workdir / 'checkpoints' / '36')
  details = text.split('<details>')[1].split('</details>')[0]
  assert '<summary>All 154 layers</summary>' in details
  layers = _table(details, 'Layer')
  assert len(layers) == 154
  assert layers['`image/block_11/mlp/fc/kernel`'] == ['0.750', '0.857']
  names = list(layers)
  assert names.index('`image/block_2/ln_1/bias`') < names.index(
    '`image/block_10/ln_1/bias`'
  )


@pytest.mark.parametrize(
  'changes',
  [
    [],
    ['--config.merge.every=end', '--config.merge.anchor=last_merge'],
    ['--config.merge.every=3', '--config.merge.clip=False'],
    ['--config.evaluate.benchmarks=("noise",)', '--config.data.mean=(1e-5,)'],
    ['--config.data.train=train[:20]+train[40:]', '--config.seed=7'],
  ],
)
def test_flags_make_the_config(config, changes):
  changed = config_lib.override(config, changes)
  again = config_lib.override(config_lib.defaults(), changed.to_flags())
  assert again.to_dict() == _without_sections(changed)


def _without_sections(config):
  """Values of a config but for the sections that its file adds."""
  values = config.to_dict()
  assert values.pop('pretrain')['steps'] == 1000
  return values


def test_flags_of_the_defaults():
  assert config_lib.Config().to_flags() == []


def test_command_is_one_for_a_shell(workdir, config):
  text = _card(B32, workdir / 'checkpoints' / '36')
  command = text.split('```sh\n')[1].split('```')[0]
  words = shlex.split(command.replace('\\\n', ' '))
  assert words[:2] == ['modelstock', 'train']
  flags = [word for word in words if word.startswith('--config.')]
  again = config_lib.override(config_lib.defaults(), flags)
  assert again.to_dict() == _without_sections(config)


def test_anchor_that_moves(workdir, config):
  moving = config_lib.override(config, ['--config.merge.anchor=last_merge'])
  (workdir / 'config.json').write_text(moving.to_json())
  text = _card(B32, workdir / 'checkpoints' / '36')
  assert 'measured from the last merge' in text


def test_damaged_files_are_named(workdir):
  (workdir / 'results.json').write_text('[{}]')
  with pytest.raises(ValueError, match=r'results\.json does not hold results'):
    _card(B32, workdir / 'checkpoints' / '36')
  (workdir / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match=r'config\.json'):
    _card(B32, workdir / 'checkpoints' / '36')


def _metadata(text, tmp_path):
  """What the hub reads of a card."""
  file = tmp_path / 'README.md'
  file.write_text(text)
  return huggingface_hub.ModelCard.load(file, ignore_metadata_errors=False).data


@pytest.mark.parametrize(
  ('weights', 'base_model'),
  [
    ('openai/clip-vit-base-patch32', 'openai/clip-vit-base-patch32'),
    ('mini_clip', None),
    ('/data/clip/ViT-B-32.pt', None),
  ],
)
def test_the_hub_reads_the_run(
  workdir, config, rows, tmp_path, weights, base_model
):
  flags = [f'--config.anchor.weights={weights}', '--config.merge.every=end']
  ended = config_lib.override(config, flags)
  (workdir / 'config.json').write_text(ended.to_json())
  text = _card(B32, workdir / 'checkpoints' / '36', num_classes=10)
  read = _metadata(text, tmp_path)
  assert (read.base_model, read.datasets) == (base_model, ['digits'])
  assert read.model_name == 'Model Stock of CLIP ViT-B/32'
  accuracies = {
    row.benchmark: row.accuracy
    for row in rows
    if row.method == 'model_stock_end' and row.seed == ended.seed
  }
  assert accuracies
  assert {
    x.dataset_name: (x.task_type, x.dataset_type, x.metric_type, x.metric_value)
    for x in read.eval_results
  } == {
    results.benchmark_title(name): (
      'image-classification',
      data.BENCHMARKS[name].dataset,
      'accuracy',
      accuracy,
    )
    for name, accuracy in accuracies.items()
  }


def test_the_hub_reads_a_conversion(tmp_path):
  model = models.Model(B32, {}, **PIXELS)
  text = card.card(
    model, 'huggingface', '`a/b`', base_model='a/b', license='mit'
  )
  read = _metadata(text, tmp_path)
  assert (read.base_model, read.license) == ('a/b', 'mit')
  assert read.eval_results is None


def test_the_data_of_imagenet_has_the_name_of_the_hub(
  workdir, config, tmp_path
):
  imagenet = config_lib.override(
    config, ['--config.data.dataset=imagenet2012:5.1.0']
  )
  (workdir / 'config.json').write_text(imagenet.to_json())
  text = _card(B32, workdir / 'checkpoints' / '36', num_classes=10)
  assert _metadata(text, tmp_path).datasets == ['imagenet-1k']
