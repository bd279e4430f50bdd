import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from modelstock_jax import clip
from modelstock_jax.cli import demo
from modelstock_jax.cli import main
from modelstock_jax.formats import hub
from modelstock_jax.training import anchor
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import loop

pytestmark = pytest.mark.usefixtures('two_devices')

MINI_CLIP = anchor.SHIPPED / 'mini_clip.safetensors'
# Two epochs of two steps, merged after each.
SHORT = [
  '--config.data.train=train[:40]',
  '--config.data.validation=validation[:40]',
  '--config.train.batch_size=20',
  '--config.train.epochs=2',
  '--config.train.warmup_steps=1',
  '--config.checkpoint.every_merges=1',
  '--config.evaluate.batch_size=200',
  "--config.evaluate.benchmarks=('digits',)",
]
# What every format can hold: three channels, heads of 64 features.
TINY = clip.CLIPConfig(
  embed_dim=5,
  vision=clip.VisionConfig(
    image_size=16, patch_size=8, width=64, depth=1, heads=1
  ),
  text=clip.TextConfig(
    context_length=7, vocab_size=19, width=64, depth=2, heads=1
  ),
)
NAMES = ['cat', 'dog', 'eel']
PIXELS = dict(mean=[0.25, 0.5, 0.75], std=[0.125, 0.25, 0.5])


@pytest.fixture(scope='module')
def trained(tmp_path_factory, two_devices):
  """A workdir, and the merged params as training had them in memory."""
  folder = tmp_path_factory.mktemp('run')
  config = config_lib.load(demo.digits_config(), SHORT)
  result = loop.train(config, folder, setup=clip_task.prepare(config))
  assert main.main(['evaluate', f'--workdir={folder}']) == 0
  return folder, jax.device_get(result.merged.params)


@pytest.fixture(scope='module')
def workdir(trained):
  return trained[0]


@pytest.fixture(scope='module')
def converted(workdir, tmp_path_factory):
  """That run for Hugging Face."""
  target = tmp_path_factory.mktemp('converted') / 'model'
  _convert(workdir, target)
  return target


@pytest.fixture
def moved(workdir, tmp_path):
  """Makes a copy of the run whose config has other values."""

  def make(**changes):
    folder = tmp_path / 'moved'
    shutil.copytree(workdir, folder)
    config = json.loads((folder / 'config.json').read_text())
    for key, value in changes.items():
      block, name = key.split('__')
      config[block][name] = str(value)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder

  return make


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """A CLIP of random weights as Hugging Face has it, a head beside it."""
  folder = tmp_path_factory.mktemp('theirs')
  tokenizer, target = folder / 'tokenizer', folder / 'model'
  tokenizer.mkdir()
  (tokenizer / 'vocab.json').write_text('{"a": 0}')
  (tokenizer / 'merges.txt').write_text('a b')
  clip.save_pretrained(
    _random(TINY, classes=3),
    target,
    config=TINY,
    labels=NAMES,
    tokenizer=tokenizer,
    **PIXELS,
  )
  return target


def _random(config, classes=0, seed=0):
  rng = np.random.default_rng(seed)
  like = jax.eval_shape(clip.create(config).init, jax.random.key(0))
  if classes:
    like['head'] = {
      'kernel': jax.ShapeDtypeStruct((config.embed_dim, classes), np.float32),
      'bias': jax.ShapeDtypeStruct((classes,), np.float32),
    }
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like
  )


def _convert(source, target, *flags, format='huggingface'):
  arguments = [str(source), str(target), f'--format={format}', *flags]
  assert main.main(['convert', *arguments]) == 0


def _refused(capsys, source, target, *flags, format='huggingface'):
  """The one message of a conversion that fails; nothing is written."""
  before = target.exists() and sorted(target.iterdir())
  arguments = [str(source), str(target), f'--format={format}', *flags]
  assert main.main(['convert', *arguments]) == 1
  assert (target.exists() and sorted(target.iterdir())) == before
  return capsys.readouterr().err


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for one, other in pairs:
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype == np.float32
    assert one.tobytes() == other.tobytes()


def _json(path):
  return json.loads(path.read_text('utf-8'))


def test_image_tower_is_the_merged_one(trained, converted):
  _, merged = trained
  model, params = clip.load_pretrained(converted)
  _assert_same(params['image'], merged['image'])
  assert model.config.vision.channels == 1
  # It has moved from the anchor.
  start = safetensors.load_file(MINI_CLIP)['image/projection/kernel']
  assert np.any(np.asarray(params['image']['projection']['kernel']) != start)


def test_text_tower_is_the_anchors(converted):
  _, params = clip.load_pretrained(converted)
  shipped = safetensors.load_file(MINI_CLIP)
  names = [name for name in shipped if not name.startswith('image/')]
  assert len(names) > 10
  for name in names:
    leaf = params
    for key in name.split('/'):
      leaf = leaf[key]
    _assert_same(leaf, shipped[name])


def test_head_and_its_labels(trained, converted):
  _, merged = trained
  head, labels = clip.load_head(converted)
  _assert_same(head, merged['head'])
  assert labels == list('0123456789')


def test_preprocessing_is_that_of_the_run(converted):
  actual = _json(converted / 'preprocessor_config.json')
  assert (actual['image_mean'], actual['image_std']) == ([0.3], [0.37])
  assert actual['size'] == {'shortest_edge': 8}


def test_card_of_a_run(converted):
  text = (converted / 'README.md').read_text('utf-8')
  text = re.sub(' +', ' ', text)  # of tables, whose columns are padded
  assert 'pipeline_tag: zero-shot-image-classification' in text
  assert 'step 4 (epoch 2 of 2)' in text
  # Of 3 blocks of 12, and 10 outside.
  assert 'The mean ratio of the 46 layers is' in text
  assert '| `image/block_2/attention/qkv/kernel` |' in text
  assert '| Zero-shot |' in text
  assert '| Model Stock (epoch, moments reset) |' in text


def test_code_of_the_card_runs(trained, converted):
  _, merged = trained
  names = {'directory': str(converted)}
  text = (converted / 'README.md').read_text('utf-8')
  [code] = re.findall(
    r'```python\n(from modelstock_jax.*?)```', text, re.DOTALL
  )
  exec(code, names)
  images = np.random.default_rng(0).normal(size=(3, 8, 8, 1))
  images = images.astype(np.float32)
  embeddings = names['model'].encode_image(names['params'], images)
  model = clip.classifier(names['model'].config, 10)
  np.testing.assert_array_equal(
    clip.heads.classify(names['head'], embeddings), model.apply(merged, images)
  )


def test_says_what_it_did(workdir, tmp_path, capsys):
  capsys.readouterr()
  _convert(workdir, tmp_path / 'out')
  first, second, third = capsys.readouterr().out.splitlines()
  assert f'Read {workdir}: image tower of 8 px' in first
  assert 'head of 10 classes' in first
  target = tmp_path / 'out'
  assert second == (
    f'Wrote {target}. Its README.md shows the code that loads it.'
  )
  assert 'no tokenizer' in third


def test_vision_only(trained, moved, tmp_path):
  """The anchor is not needed for it."""
  _, merged = trained
  source = moved(anchor__weights=tmp_path / 'gone.safetensors')
  _convert(source, tmp_path / 'out', '--vision-only')
  model, params = clip.load_pretrained(tmp_path / 'out')
  assert model.config.text is None
  assert params.keys() == {'image'}
  _assert_same(params['image'], merged['image'])
  head, _ = clip.load_head(tmp_path / 'out')
  _assert_same(head, merged['head'])


def test_one_of_the_checkpoints(workdir, converted, tmp_path):
  _convert(workdir / 'checkpoints' / '4', tmp_path / 'last')
  same = (tmp_path / 'last' / 'model.safetensors').read_bytes()
  assert same == (converted / 'model.safetensors').read_bytes()

  _convert(workdir / 'checkpoints' / '2', tmp_path / 'first')
  other = (tmp_path / 'first' / 'model.safetensors').read_bytes()
  assert other != same
  text = (tmp_path / 'first' / 'README.md').read_text('utf-8')
  assert 'step 2 (epoch 1 of 2)' in text
  assert '## Accuracy' not in text  # it was measured at the last


def test_a_damaged_checkpoint_stops_every_command(moved, tmp_path, capsys):
  source = moved()
  arrays = (source / 'checkpoints/4/merged').rglob('d/*')
  path = max(arrays, key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  output = tmp_path / 'out'
  merge = [f'--anchor={MINI_CLIP}', '--models', str(source), str(source)]
  for arguments in (
    ['convert', str(source), str(output), '--format=huggingface'],
    ['evaluate', f'--workdir={source}', f'--output={output}'],
    ['evaluate', f'--checkpoint={source}', f'--output={output}'],
    ['merge', *merge, f'--output={output}'],
  ):
    assert main.main(arguments) == 1
    error = capsys.readouterr().err
    assert f'{path} is damaged' in error
    assert f'not damaged: {source / "checkpoints/2"}.' in error
    assert not output.exists()


def test_tokenizer_of_a_run(theirs, moved, tmp_path):
  source = moved(anchor__tokenizer=theirs)
  _convert(source, tmp_path / 'out')
  assert (tmp_path / 'out' / 'merges.txt').read_text() == 'a b'


def test_labels_of_a_file(moved, tmp_path):
  """They stand in for those of a data set that is not there."""
  labels = [f'digit {k}' for k in range(10)]
  (tmp_path / 'labels.json').write_text(json.dumps(labels))
  source = moved(data__data_dir=tmp_path / 'gone')
  flag = f'--labels={tmp_path / "labels.json"}'
  _convert(source, tmp_path / 'out', flag)
  assert clip.load_head(tmp_path / 'out')[1] == labels


def test_round_trip_is_bit_identical(theirs, tmp_path):
  a, b, c = (tmp_path / name for name in 'abc')
  _convert(theirs, a, format='open_clip')
  _convert(a, b, format='scenic')
  _convert(b / 'clip.npy', c, '--allow-pickle')
  before = safetensors.load_file(theirs / 'model.safetensors')
  after = safetensors.load_file(c / 'model.safetensors')
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype == np.float32
    assert tensor.shape == after[name].shape
    assert tensor.tobytes() == after[name].tobytes(), name
  assert _json(c / 'config.json') == _json(theirs / 'config.json')
  # What lies beside the weights comes along, head and tokenizer.
  for name in ('classifier.safetensors', 'vocab.json', 'merges.txt'):
    assert (c / name).read_bytes() == (theirs / name).read_bytes(), name
  assert _json(c / 'labels.json') == NAMES
  assert _json(a / 'open_clip_config.json')['preprocess_cfg'] == PIXELS
  # Each card names what was read.
  for folder, name in ((a, 'model'), (b, 'a'), (c, 'clip.npy')):
    text = (folder / 'README.md').read_text('utf-8')
    assert f'Converted from `{name}`.' in text


def test_our_file_states_its_pixels(tmp_path):
  _convert(MINI_CLIP, tmp_path / 'out')
  actual = _json(tmp_path / 'out' / 'preprocessor_config.json')
  assert (actual['image_mean'], actual['image_std']) == ([0.3], [0.37])
  text = (tmp_path / 'out' / 'README.md').read_text('utf-8')
  assert 'from `mini_clip.safetensors`.' in text


def test_model_of_the_hub(theirs, tmp_path, monkeypatch):
  asked = []

  def download(repo_id, **_):
    asked.append(repo_id)
    return str(theirs)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  monkeypatch.chdir(tmp_path)
  _convert('someone/clip', tmp_path / 'out')
  assert set(asked) == {'someone/clip'}
  assert (tmp_path / 'out' / 'merges.txt').read_text() == 'a b'
  text = (tmp_path / 'out' / 'README.md').read_text('utf-8')
  assert 'Converted from `someone/clip`.' in text


def test_image_size(theirs, tmp_path):
  """Check 24 pixels in patches of 8: 9 positions and that of the class."""
  _convert(theirs, tmp_path / 'out', '--image-size=24')
  tensors = safetensors.load_file(tmp_path / 'out' / 'model.safetensors')
  name = 'vision_model.embeddings.position_embedding.weight'
  assert tensors[name].shape == (10, 64)
  config = _json(tmp_path / 'out' / 'config.json')
  assert config['vision_config']['image_size'] == 24
  actual = _json(tmp_path / 'out' / 'preprocessor_config.json')
  assert actual['crop_size'] == {'height': 24, 'width': 24}


def test_tokenizer_of_a_folder(theirs, tmp_path):
  individual = tmp_path / 'own'
  individual.mkdir()
  (individual / 'tokenizer.json').write_text('{}')
  _convert(theirs, tmp_path / 'out', f'--tokenizer={individual}')
  assert (tmp_path / 'out' / 'tokenizer.json').exists()
  assert not (tmp_path / 'out' / 'merges.txt').exists()


def test_vision_only_of_a_checkpoint(theirs, tmp_path):
  _convert(theirs, tmp_path / 'out', '--vision-only', format='scenic')
  tensors = np.load(tmp_path / 'out' / 'clip.npy', allow_pickle=True).item()
  assert all(name.startswith('visual.') for name in tensors)
  assert not (tmp_path / 'out' / 'merges.txt').exists()
  assert clip.load_head(tmp_path / 'out')[1] == NAMES


def test_help_imports_nothing_heavy():
  script = (
    'import sys\n'
    'from modelstock_jax.cli import main\n'
    'try:\n'
    '  main.main(["convert", "--help"])\n'
    'except SystemExit as done:\n'
    '  assert done.code == 0, done.code\n'
    'print("heavy:", sorted({"jax", "numpy"} & set(sys.modules)))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  assert '--vision-only' in done.stdout
  assert 'heavy: []' in done.stdout


def test_no_such_input(capsys, tmp_path):
  error = _refused(capsys, tmp_path / 'absent', tmp_path / 'out')
  assert f'{tmp_path / "absent"}: there is no such file or folder' in error


def test_run_without_a_checkpoint(capsys, tmp_path, workdir):
  source = tmp_path / 'run'
  (source / 'checkpoints').mkdir(parents=True)
  shutil.copy(workdir / 'config.json', source)
  error = _refused(capsys, source, tmp_path / 'out')
  assert 'holds no checkpoint yet' in error


def test_output_that_is_not_empty(capsys, theirs, tmp_path):
  (tmp_path / 'mine.txt').write_text('keep')
  error = _refused(capsys, theirs, tmp_path)
  assert f'{tmp_path} is not empty' in error
  assert (tmp_path / 'mine.txt').read_text() == 'keep'


@pytest.mark.parametrize(
  ('labels', 'message'),
  [
    ('["a", "b"]', "params['head'] has 3 classes, labels are 2"),
    ('{"a": 0}', '--labels=PATH must hold a JSON list of names'),
    ('[1, 2, 3]', '--labels=PATH must hold a JSON list of names'),
    ('[', '--labels=PATH must hold a JSON list of names'),
  ],
)
def test_wrong_labels(capsys, theirs, tmp_path, labels, message):
  path = tmp_path / 'names.json'
  path.write_text(labels)
  error = _refused(capsys, theirs, tmp_path / 'out', f'--labels={path}')
  assert message.replace('PATH', str(path)) in error


def test_labels_without_a_head(capsys, tmp_path):
  flag = f'--labels={tmp_path / "names.json"}'
  error = _refused(capsys, MINI_CLIP, tmp_path / 'out', flag)
  assert 'has no classification head' in error


def test_labels_of_a_data_set_that_is_not_there(capsys, moved, tmp_path):
  source = moved(data__data_dir=tmp_path / 'gone')
  error = _refused(capsys, source, tmp_path / 'out')
  assert "'digits', which is not in data_dir" in error
  assert '--labels=FILE' in error


def test_pickle_without_the_flag(capsys, theirs, tmp_path):
  _convert(theirs, tmp_path / 'scenic', format='scenic')
  error = _refused(capsys, tmp_path / 'scenic' / 'clip.npy', tmp_path / 'out')
  assert '--allow-pickle' in error


def test_image_size_that_the_patch_does_not_divide(capsys, theirs, tmp_path):
  error = _refused(capsys, theirs, tmp_path / 'out', '--image-size=20')
  assert 'patch_size=8 does not divide image_size=20' in error


def test_image_size_of_a_run(capsys, workdir, tmp_path):
  error = _refused(capsys, workdir, tmp_path / 'out', '--image-size=16')
  assert 'a run keeps the size that it was trained with, 8' in error


def test_config_is_not_overridden(capsys, workdir, tmp_path):
  error = _refused(capsys, workdir, tmp_path / 'out', '--config.seed=3')
  assert '--config.seed=3: `modelstock convert` has no config' in error


@pytest.mark.parametrize(
  ('format', 'message'),
  [('open_clip', '3 channels'), ('scenic', 'heads of 64 features')],
)
def test_formats_that_cannot_hold_it(
  capsys, workdir, tmp_path, format, message
):
  error = _refused(capsys, workdir, tmp_path / 'out', format=format)
  assert message in error


def test_open_clip_takes_both_towers(capsys, theirs, tmp_path):
  error = _refused(
    capsys, theirs, tmp_path / 'out', '--vision-only', format='open_clip'
  )
  assert 'there is no text tower' in error


def test_anchor_that_is_gone(capsys, moved, tmp_path):
  gone = tmp_path / 'gone.safetensors'
  error = _refused(capsys, moved(anchor__weights=gone), tmp_path / 'out')
  assert f"anchor.weights: '{gone}'" in error
  assert 'put them back' in error
  assert '--vision-only' in error


def test_anchor_of_another_network(capsys, moved, tmp_path):
  """All that differs from width 48, depth 3, three heads, one channel."""
  other = tmp_path / 'other'
  clip.save_pretrained(_random(TINY), other, config=TINY)
  text = json.dumps(
    {
      'embed_dim': 5,
      'image': dataclasses.asdict(TINY.vision),
      'text': dataclasses.asdict(TINY.text),
    }
  )
  path = tmp_path / 'other.safetensors'
  clip.save_safetensors(_random(TINY), path, {'model': text})
  error = _refused(capsys, moved(anchor__weights=path), tmp_path / 'out')
  assert f"anchor.weights: '{path}'" in error
  for line in (
    'model.embed_dim: config 48, weights 5',
    'model.image.width: config 48, weights 64',
    'model.image.depth: config 3, weights 1',
    'model.image.heads: config 3, weights 1',
    'model.image.patch_size: config 2, weights 8',
    'model.image.channels: config 1, weights 3',
  ):
    assert line in error
  assert '--vision-only' in error


def test_anchor_without_a_text_tower(capsys, moved, tmp_path):
  sizes = json.loads(clip.read_metadata(MINI_CLIP)['model'])
  config = dataclasses.replace(
    clip.load_pretrained(MINI_CLIP).model.config, text=None
  )
  path = tmp_path / 'tower.safetensors'
  metadata = {'model': json.dumps({**sizes, 'text': None})}
  clip.save_safetensors(_random(config), path, metadata)
  error = _refused(capsys, moved(anchor__weights=path), tmp_path / 'out')
  assert 'has no text tower' in error
  assert '--vision-only' in error


def test_tokenizer_without_a_text_tower(capsys, theirs, tmp_path):
  flags = ['--vision-only', f'--tokenizer={theirs}']
  error = _refused(capsys, theirs, tmp_path / 'out', *flags)
  assert f'--tokenizer={theirs}: there is no text tower' in error


def test_tokenizer_that_is_not_there(capsys, theirs, tmp_path):
  flag = f'--tokenizer={tmp_path}'
  error = _refused(capsys, theirs, tmp_path / 'out', flag)
  assert 'holds none of the files of a tokenizer' in error


def test_head_of_another_tower(capsys, theirs, tmp_path):
  folder = tmp_path / 'mixed'
  shutil.copytree(theirs, folder)
  tensors = {
    'weight': np.zeros((3, 9), np.float32),
    'bias': np.zeros(3, np.float32),
  }
  safetensors.save_file(tensors, folder / 'classifier.safetensors')
  error = _refused(capsys, folder, tmp_path / 'out')
  assert 'takes 9 features, the tower gives 5' in error


@pytest.mark.parametrize(
  ('stated', 'message'),
  [
    ('{"image_mean": [0.5]}', 'not those of images with 3 channels'),
    ('{"image_mean": "grey"}', 'cannot be read'),
    ('[]', 'cannot be read'),
    ('{', 'cannot be read'),
  ],
)
def test_wrong_pixels(capsys, theirs, tmp_path, stated, message):
  folder = tmp_path / 'wrong'
  shutil.copytree(theirs, folder)
  (folder / 'preprocessor_config.json').write_text(stated)
  error = _refused(capsys, folder, tmp_path / 'out')
  assert message in error


def test_torch_file_that_is_no_state_dict(capsys, tmp_path):
  path = tmp_path / 'clip.pt'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('clip/data.pkl', b'\x80\2cos\nsystem\n(X\2\0\0\0lstR.')
  error = _refused(capsys, path, tmp_path / 'out')
  assert 'clip.pt: its content is made by os.system, which is not' in error
  assert 'torch.save(model.state_dict(), NEW_FILE)' in error


def test_a_dry_run_lists_what_would_be_uploaded(
  theirs, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  command = ['convert', str(theirs), '--format=huggingface', '--license=mit']
  capsys.readouterr()
  assert main.main([*command, 'out', '--push=me/stock', '--dry-run']) == 0
  *_, after = capsys.readouterr().out.partition('loads it.\n')
  *lines, last = after.splitlines()
  assert {line.split()[-1]: line.split()[0] for line in lines} == {
    path.name: f'{path.stat().st_size:,}'
    for path in pathlib.Path('out').iterdir()
  }
  assert last == (
    'Nothing was uploaded. `hf upload me/stock out` uploads these files.'
  )
  card = pathlib.Path('out/README.md').read_text()
  assert 'license: "mit"' in card.splitlines()


def test_a_push_uploads_what_was_converted(
  theirs, tmp_path, capsys, monkeypatch
):
  uploads = []

  def push(folder, name):
    uploads.append((sorted(os.listdir(folder)), name))
    return 'https://huggingface.co/me/stock'

  monkeypatch.setattr(hub, 'push', push)
  _convert(theirs, tmp_path / 'kept', '--push=me/stock')
  kept = sorted(x.name for x in (tmp_path / 'kept').iterdir())
  assert uploads == [(kept, 'me/stock')]
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == 'Uploaded to https://huggingface.co/me/stock.'


def test_a_dry_run_without_a_push(theirs, tmp_path, capsys):
  error = _refused(capsys, theirs, tmp_path / 'out', '--dry-run')
  assert error == (
    'modelstock convert: --dry-run: nothing would be uploaded without --push.\n'
  )
