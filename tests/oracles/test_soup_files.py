"""Classifiers as Model Soups, WiSE-FT and Model Stock save them, with torch.

The tower is OpenAI's own code; what wraps it is written here: the image
embedding is normalised, then a linear layer.
"""

import io
import pickle
import sys
import types

import jax
import numpy as np
from PIL import Image
import pytest
import torch

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.cli import main
from modelstock_jax.report import results

pytestmark = pytest.mark.oracle
EPS = 1e-8


class _Wrapper(torch.nn.Module):
  """An image tower with what is left of the text tower, and a head."""

  def __init__(self, model, classes):
    super().__init__()
    del model.transformer
    self.model = model
    self.classification_head = torch.nn.Linear(model.visual.output_dim, classes)

  def forward(self, images):
    features = self.model.encode_image(images)
    features = features / features.norm(dim=-1, keepdim=True)
    return self.classification_head(features)


@pytest.fixture(scope='module')
def family(create_openai, sizes, spread):
  """Zero-shot CLIP with a head, and two models of half that displacement."""
  size = sizes['tiny']

  def make(seed):
    wrapper = spread(_Wrapper(create_openai(size), 7), seed)
    with torch.no_grad():
      wrapper.classification_head.weight.mul_(30)  # as 100 times a cosine
    return wrapper

  anchor, shared, *models = map(make, range(4))
  with torch.no_grad():
    for model in models:
      for w0, w1, w in zip(
        anchor.parameters(),
        shared.parameters(),
        model.parameters(),
        strict=True,
      ):
        w.copy_(w0 + 0.1 * (w1 + w))
  return anchor, models, size


def test_logits_and_the_example_notebook(
  family, inputs, close, tmp_path, monkeypatch
):
  anchor, models, size = family
  openai = types.ModuleType('openai_clip')  # which pickle imports
  openai.__dict__.update(type(anchor.model).__init__.__globals__)
  monkeypatch.setitem(sys.modules, 'openai_clip', openai)
  with (tmp_path / 'zeroshot.pt').open('wb') as file:
    pickle.dump(anchor, file)  # as WiSE-FT does
  torch.save(
    torch.nn.DataParallel(models[0]).state_dict(), tmp_path / 'model_1.pt'
  )
  torch.save(models[1].state_dict(), tmp_path / 'model_2.pt')
  names = ('zeroshot', 'model_1', 'model_2')
  paths = [str(tmp_path / f'{name}.pt') for name in names]
  out = str(tmp_path / 'merged.safetensors')
  command = ['merge', '--anchor', paths[0], '--models', *paths[1:]]
  assert main.main([*command, '--output', out, '--no-clip']) == 0

  # The merge of every key, in float64.
  states = [
    {name: x.double() for name, x in module.state_dict().items()}
    for module in (anchor, *models)
  ]
  merged = {}
  for name, w0 in states[0].items():
    d1, d2 = (state[name] - w0 for state in states[1:])
    cosine = (d1 * d2).sum() / (d1.norm() * d2.norm() + EPS)
    ratio = 2 * cosine / (1 + cosine + EPS)
    merged[name] = w0 + ratio * (d1 + d2) / 2
  anchor.load_state_dict(merged)  # which rounds to float32

  images, _ = inputs(size)
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  with torch.inference_mode():
    expected = anchor(pixels)
  model, params = clip.load_pretrained(out)
  classifier = clip.classifier(model.config, 7)
  actual = jax.jit(classifier.apply)(params, images)
  scale = float(expected.abs().max())
  close(
    'logits of the merge, of their largest',
    np.asarray(actual) / np.float32(scale),
    expected / scale,
    1e-5,
  )


def _pixels(encoded, side):
  """CLIP's transform with Pillow and torch."""
  with Image.open(io.BytesIO(encoded)) as image:
    shorter = min(image.size)
    new = [int(side * x / shorter) for x in image.size]
    left, top = (round((x - side) / 2) for x in new)
    image = image.resize(new, Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + side, top + side)).convert('RGB')
  scaled = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
  mean, std = map(torch.tensor, (clip.saving.MEAN, clip.saving.STD))
  return (scaled - mean[:, None, None]) / std[:, None, None]


def test_the_evaluation_of_a_released_file(
  create_openai, sizes, spread, imagenet, make_imagenet, tmp_path
):
  """The counts of `paper_b32` are those of the wrapper in torch.

  Rows of the head are embeddings of every second image, so that it knows some.
  """
  size = sizes['tiny']
  wrapper = spread(_Wrapper(create_openai(size), 1000))
  names = data.GROUPS['paper_b32'].benchmarks
  known = {}
  with torch.inference_mode():
    for name in names:
      source = data.open_benchmark(data.find_benchmark(name), imagenet)
      records = list(source)
      batch = [_pixels(x['image'], size.image_size) for x in records]
      features = wrapper.model.encode_image(torch.stack(batch))
      features = features / features.norm(dim=-1, keepdim=True)
      known[name] = [x['label'] for x in records], features
  classes = list(make_imagenet.OBJECTNET.values())
  with torch.no_grad():
    for name, (labels, features) in known.items():
      for label, feature in zip(labels[1::2], features[1::2], strict=True):
        members = classes[label] if 'objectnet' in name else [label]
        wrapper.classification_head.weight[members[-1]] = 3 * feature
    wrapper.classification_head.weight.mul_(10)
  torch.save(wrapper.state_dict(), tmp_path / 'model_7.pt')
  flags = [f'--checkpoint={tmp_path / "model_7.pt"}', f'--data_dir={imagenet}']
  assert main.main(['evaluate', *flags, '--benchmarks=paper_b32']) == 0
  rows = results.load(tmp_path / 'model_7.results.json')
  assert [row.benchmark for row in rows] == list(names)

  # `project_logits` of the data sets of Model Soups.
  choices = {'imagenet_r': range(1, 1000, 5), 'imagenet_a': range(4, 1000, 5)}
  for row in rows:
    labels, features = known[row.benchmark]
    with torch.inference_mode():
      logits = wrapper.classification_head(features)
    groups = [[k] for k in choices.get(row.benchmark, range(1000))]
    if row.benchmark == 'objectnet_uncropped':
      groups = classes
    best = torch.stack([logits[:, k].amax(1) for k in groups], 1).argmax(1)
    answers = [x if groups is classes else groups[x][0] for x in best.tolist()]
    right = sum(x == y for x, y in zip(answers, labels, strict=True))
    print(f'{row.benchmark}: {right} of {row.n}')
    assert (row.n, row.accuracy) == (len(labels), right / len(labels))
    assert row.n < 12 or 0.05 < row.accuracy < 0.95
