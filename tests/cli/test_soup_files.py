"""Files of Model Soups and Model Stock: merged, evaluated and converted."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import clip
from modelstock_jax.cli import main
from modelstock_jax.data import sources

pytestmark = pytest.mark.usefixtures('two_devices')

THIN = clip.CLIPConfig(
  embed_dim=16,
  vision=clip.VisionConfig(
    image_size=64, patch_size=32, width=64, depth=1, heads=1
  ),
  text=clip.TextConfig(
    context_length=5, vocab_size=9, width=64, depth=1, heads=1
  ),
)
EPS = 1e-8  # in the denominators of the authors' example notebook


@pytest.fixture(scope='module')
def states(tmp_path_factory):
  """Zero-shot CLIP with its head, and two models, as Model Soups names them.

  q, k and v of the models agree in part; those of one bias disagree.
  """
  folder = tmp_path_factory.mktemp('clip') / 'clip'
  like = jax.eval_shape(clip.create(THIN).init, jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), like
  )
  clip.save_pretrained(params, folder, 'open_clip', config=THIN)
  tensors = safetensors.numpy.load_file(folder / 'open_clip_model.safetensors')
  anchor = {
    f'model.{name}': x
    for name, x in tensors.items()
    if not name.startswith('transformer.')
  }
  anchor['classification_head.weight'] = rng.normal(size=(1000, 16))
  anchor['classification_head.bias'] = rng.normal(size=1000)
  anchor = {name: np.float32(x) for name, x in anchor.items()}
  models = [dict(anchor), dict(anchor)]
  for name, x in anchor.items():
    if 'visual' in name or 'head' in name:
      shared = rng.normal(0, 0.1, x.shape)
      for model in models:
        step = shared + rng.normal(0, 0.1, x.shape)
        model[name] = np.float32(x + step)
  for sign, model in zip((1, -1), models, strict=True):
    name = 'model.visual.ln_post.bias'
    step = 0.1 * sign + rng.normal(0, 0.1, anchor[name].shape)
    model[name] = np.float32(anchor[name] + step)
  return [anchor, *models]


@pytest.fixture(scope='module')
def files(states, save_torch, tmp_path_factory):
  """Written with prefixes of DataParallel, but for one of the models."""
  folder = tmp_path_factory.mktemp('soup')
  for name, state, prefix in zip(
    ('zeroshot', 'model_1', 'model_2'), states, ('', 'module.', ''), strict=True
  ):
    wrapped = {prefix + key: x for key, x in state.items()}
    save_torch(folder / f'{name}.pt', wrapped)
  arguments = [
    *('merge', '--anchor', str(folder / 'zeroshot.pt'), '--models'),
    *(str(folder / 'model_1.pt'), str(folder / 'model_2.pt'), '--no-clip'),
    *('--output', str(folder / 'merged.safetensors')),
  ]
  assert main.main(arguments) == 0
  return folder


def _notebook(w0, w1, w2):
  """The merge of one key, in float64."""
  w0, w1, w2 = (np.asarray(w, np.float64) for w in (w0, w1, w2))
  d1, d2 = w1 - w0, w2 - w0
  norms = np.linalg.norm(d1) * np.linalg.norm(d2)
  cosine = np.sum(d1 * d2) / (norms + EPS)
  ratio = 2 * cosine / (1 + cosine + EPS)
  return ratio * (w1 + w2) / 2 + (1 - ratio) * w0


def test_the_example_notebook(files, states):
  merged = safetensors.numpy.load_file(files / 'merged.safetensors')
  assert merged.keys() == states[0].keys()
  for name, actual in merged.items():
    expected = _notebook(*(state[name] for state in states))
    limit = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)
  # A negative cosine is taken as it is: it passes the anchor.
  name = 'model.visual.ln_post.bias'
  report = json.loads((files / 'merged.model_stock.json').read_text())
  assert report['tensors'][name]['ratio'] < 0


def test_it_is_evaluated_and_converted(files, imagenet, tmp_path, capsys):
  """1000 outputs are those of ImageNet; the same numbers when converted."""
  model = files / 'model_1.pt'
  folder = tmp_path / 'converted'
  command = ['convert', str(model), str(folder), '--format=huggingface']
  assert main.main(command) == 0
  labels = json.loads((folder / 'labels.json').read_text())
  assert tuple(labels) == sources.imagenet_wnids()
  rows = []
  for checkpoint, flags in ((model, ()), (folder, ('--benchmarks=imagenet',))):
    flags = (f'--checkpoint={checkpoint}', f'--data_dir={imagenet}', *flags)
    assert main.main(['evaluate', *flags]) == 0
    name = 'model_1.results.json' if checkpoint == model else 'results.json'
    path = (files if checkpoint == model else folder) / name
    assert f'Wrote {path}.' in capsys.readouterr().out
    rows.append(json.loads(path.read_text()))
  for row in rows[0] + rows[1]:
    del row['method']
  assert rows[0] == rows[1]
  assert [row['benchmark'] for row in rows[0]] == ['imagenet']


def test_a_training_checkpoint_of_open_clip(files, tmp_path, capsys):
  state = safetensors.numpy.load_file(files / 'merged.safetensors')
  tower = {n: x for n, x in state.items() if 'visual' in n}
  safetensors.numpy.save_file(tower, tmp_path / 'epoch_3.safetensors')
  command = ['convert', str(tmp_path / 'epoch_3.safetensors'), '--vision-only']
  command += [str(tmp_path / 'out'), '--format=huggingface']
  assert main.main(command) == 1
  assert 'neither the activation' in capsys.readouterr().err
  assert main.main([*command, '--activation=gelu']) == 0
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert config['hidden_act'] == 'gelu'


def test_a_head_whose_classes_have_no_names(
  states, save_torch, imagenet, tmp_path, capsys
):
  state = {name: x for name, x in states[0].items() if 'visual' in name}
  state['classification_head.weight'] = np.zeros((3, 16), np.float32)
  state['classification_head.bias'] = np.zeros(3, np.float32)
  save_torch(tmp_path / 'three.pt', state)
  command = ['convert', str(tmp_path / 'three.pt'), str(tmp_path / 'out')]
  assert main.main([*command, '--format=huggingface']) == 1
  assert 'them with --labels=FILE' in capsys.readouterr().err
  assert main.main(['evaluate', f'--checkpoint={tmp_path / "three.pt"}']) == 1
  assert 'give --benchmarks=a,b' in capsys.readouterr().err
  flags = [f'--checkpoint={tmp_path / "three.pt"}', f'--data_dir={imagenet}']
  assert main.main(['evaluate', *flags, '--benchmarks=paper_b32']) == 1
  error = capsys.readouterr().err
  assert 'three.pt has a head of 3 classes, imagenet has 1000' in error
  assert not (tmp_path / 'three.results.json').exists()
