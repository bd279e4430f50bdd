"""`modelstock inspect` and `modelstock merge --method`, as a user has them."""

import json

import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax.cli import main


@pytest.fixture
def paths(tmp_path):
  """Saves an anchor and models at right angles, of two blocks."""
  for name, step in (('a', [0, 0, 0]), ('b', [1, 0, 0]), ('c', [0, 1, 0])):
    weight = np.float32([9, 9, 9]) + np.float32(step)
    tensors = {f'layers.{i}.mlp.weight': weight for i in range(2)}
    (tmp_path / name).mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / name / 'model.safetensors')
  return tmp_path


TABLE = """\
layers   parameters  cosine  ratio  spread  norms        returned  unmoved  \
rounded
all      6           0.000   0.000  0.000   0.064 0.064  100%      67%      0%
mlp      6           0.000   0.000  0.000   0.064 0.064  100%      67%      0%
block 0  3           0.000   0.000  0.000   0.064 0.064  100%      67%      0%
block 1  3           0.000   0.000  0.000   0.064 0.064  100%      67%      0%
"""
BASE = (
  'The merge returns your base (100% of the parameters have a ratio below '
  '0.1): these models share little.\n'
)


def test_inspect(paths, capsys):
  a, b, c = (str(paths / name) for name in 'abc')
  before = sorted(paths.rglob('*'))
  assert main.main(['inspect', a, b, c]) == 0
  said = capsys.readouterr().out
  assert said == TABLE + BASE
  assert main.main(['merge', '--anchor', a, '--models', b, c, '--dry-run']) == 0
  assert capsys.readouterr().out == said
  assert sorted(paths.rglob('*')) == before


def test_inspect_into_a_file(paths, capsys):
  a, b, c = (str(paths / name) for name in 'abc')
  target = paths / 'look.json'
  arguments = ['inspect', a, b, c, '--output', str(target), '--unit=filter']
  assert main.main(arguments) == 0
  report = json.loads(target.read_text())
  assert report['verdicts'].keys() == {'base'}
  assert report['groups']['block 1']['parameters'] == 3
  picture = (paths / 'look.svg').read_text()
  assert picture.count('<title>layers.0.mlp.weight: cosine ') == 1
  assert (paths / 'look.png').is_file()
  assert main.main(arguments) == 1
  assert 'look.json already exists. Remove it' in capsys.readouterr().err


def test_a_merge_says_the_verdict(paths, capsys):
  a, b, c, out = (str(paths / name) for name in ('a', 'b', 'c', 'out'))
  arguments = ['merge', '--anchor', a, '--models', b, c, '--output', out]
  assert main.main(arguments) == 0
  assert BASE in capsys.readouterr().out


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ('--models b c --method soup --weights 0.75 0.25', {'': [9.75, 9.25, 9]}),
    (
      '--models b c --method soup --decay sqrt',
      {'': [9 + 0.5**0.5, 10 - 0.5**0.5, 9]},
    ),
    (
      '--anchor a --models b --method wise_ft --alphas 0.25 0.5',
      {'alpha_0.25': [9.25, 9, 9], 'alpha_0.5': [9.5, 9, 9]},
    ),
    (
      '--anchor a --models b c --method lines --alphas 0.5 --beta 0.25',
      {'': [9.375, 9.375, 9]},
    ),
  ],
)
def test_methods(paths, monkeypatch, capsys, flags, expected):
  monkeypatch.chdir(paths)
  assert main.main(['merge', *flags.split(), '--output', 'out']) == 0
  assert 'out: 2 tensors.' in capsys.readouterr().out
  for folder, weight in expected.items():
    path = paths / 'out' / folder / 'model.safetensors'
    actual = safetensors.numpy.load_file(path)['layers.1.mlp.weight']
    np.testing.assert_allclose(actual, weight, rtol=1e-7)


def test_wrong_usage(paths, monkeypatch, capsys):
  monkeypatch.chdir(paths)
  for flags, words in (
    ('merge --models b c --output o', '--anchor: not given'),
    ('merge --method soup --output o', '--models: not given'),
    ('merge --method soup --models b c', '--output: not given'),
    ('merge --dry-run --models b c', '--anchor: not given'),
    (
      'merge --dry-run --models b c --method soup',
      '--dry-run: is of model_stock, not soup',
    ),
    (
      'merge --anchor a --models b --output o --method wise_ft --beta 1',
      'beta: is of lines, not wise_ft',
    ),
    (
      'merge --models b c --output o --method soup --no-clip',
      'unit, average, clip, strength, layers, stacked: are of model_stock',
    ),
    ('inspect a b', 'model_stock takes the anchor and at least two models'),
  ):
    assert main.main(flags.split()) == 1
    assert words in capsys.readouterr().err
