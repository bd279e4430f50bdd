"""`modelstock merge`, as a user calls it."""

import json

import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax.cli import main


@pytest.fixture
def paths(tmp_path):
  rng = np.random.default_rng(0)
  shapes = {
    'embed.weight': (20, 4),
    'layers.0.self_attn.q_proj.weight': (4, 4),
    'layers.1.mlp.fc1.bias': (9,),
  }
  trees = [{name: rng.normal(size=s) for name, s in shapes.items()}]
  trees[0]['layers.1.turned'] = rng.normal(size=30)
  shared = {name: rng.normal(size=s) for name, s in shapes.items()}
  for sign in (1, -1):
    tree = {
      name: trees[0][name] + step + 0.5 * rng.normal(size=step.shape)
      for name, step in shared.items()
    }
    # Nearly opposite: a negative cosine.
    step = sign * np.arange(30.0) + rng.normal(size=30)
    tree['layers.1.turned'] = trees[0]['layers.1.turned'] + step
    trees.append(tree)
  for name, tree in zip('abc', trees, strict=True):
    (tmp_path / name).mkdir()
    safetensors.numpy.save_file(
      {k: np.float32(v) for k, v in tree.items()},
      tmp_path / name / 'model.safetensors',
    )
    (tmp_path / name / 'config.json').write_text('{}')
  return tmp_path


def _load(path):
  return safetensors.numpy.load_file(path / 'model.safetensors')


def test_flags(paths, capsys):
  a, b, c, out = (str(paths / name) for name in ('a', 'b', 'c', 'out'))
  arguments = ['merge', '--anchor', a, '--models', b, c, '--output', out]
  assert main.main(arguments) == 0
  said = capsys.readouterr().out
  assert f'Wrote {out}: 4 tensors.' in said
  assert 'Cosine of a tensor: -' in said
  assert '1 cosines are negative, taken as 0: they stay the anchor.' in said
  assert (paths / 'out/config.json').is_file()
  report = json.loads((paths / 'out/model_stock.json').read_text())
  assert report['tensors']['layers.1.turned']['ratio'] == 0
  picture = (paths / 'out/model_stock.svg').read_text()
  for name in report['tensors']:
    assert picture.count(f'<title>{name}: cosine ') == 1
    assert picture.count(f'<title>{name}: ratio ') == 1

  # once more: it is there
  assert main.main(arguments) == 1
  assert 'out already exists' in capsys.readouterr().err


@pytest.mark.parametrize('unit', ['filter', 'model'])
def test_cosines_below_zero_are_counted(tmp_path, capsys, unit):
  """One of two filters turns; together, 2 x 1 - 3 x 3 < 0."""
  for name, rows in (
    ('a', [[0, 0], [0, 0]]),
    ('b', [[1, 1], [3, 0]]),
    ('c', [[1, 1], [-3, 0]]),
  ):
    path = tmp_path / f'{name}.safetensors'
    tensors = {k: np.array(rows, np.float32) for k in ('x', 'y')}
    safetensors.numpy.save_file(tensors, path)
  a, b, c, out = (str(tmp_path / f'{n}.safetensors') for n in 'abcm')
  arguments = ['merge', '--anchor', a, '--models', b, c, '--output', out]
  assert main.main([*arguments, '--unit', unit]) == 0
  count = {'filter': 2, 'model': 1}[unit]
  assert f'{count} cosines are negative' in capsys.readouterr().out


def test_every_option(paths, capsys):
  a, b, c = (str(paths / name) for name in 'abc')
  out = str(paths / 'm.safetensors')
  arguments = ['merge', f'--anchor={a}', '--models', b, c, f'--output={out}']
  arguments += ['--no-clip', '--strength=0.5', '--dtype=float16', '--threads=1']
  arguments += ['--average=angle', '--layers=(layers).*', '--common']
  assert main.main(arguments) == 0
  said = capsys.readouterr().out
  assert 'cosines are negative, taken as they are.' in said
  report = json.loads((paths / 'm.model_stock.json').read_text())
  assert report['clip'] is False
  assert report['strength'] == 0.5
  assert report['dtype'] == 'float16'
  assert report['average'] == 'angle'
  cosines = {n: line['cosine'] for n, line in report['tensors'].items()}
  assert len(set(cosines.values())) == 2  # of the embedding, of the layers
  assert (paths / 'm.model_stock.svg').is_file()
  array = safetensors.numpy.load_file(out)['embed.weight']
  assert array.dtype == np.float16


@pytest.mark.parametrize('unit', ['filter', 'model'])
def test_units(paths, unit):
  a, b, c, out = (str(paths / name) for name in ('a', 'b', 'c', 'out'))
  arguments = ['merge', '--anchor', a, '--models', b, c, '--output', out]
  assert main.main([*arguments, f'--unit={unit}']) == 0
  report = json.loads((paths / 'out/model_stock.json').read_text())
  cosine = report['tensors']['embed.weight']['cosine']
  assert np.shape(cosine) == {'filter': (20,), 'model': ()}[unit]


RECIPE = """
merge_method: model_stock
base_model: {a}
models:
  - model: {a}
  - model: {b}
  - model: {c}
parameters:
  filter_wise: {filter_wise}
dtype: {dtype}
tokenizer_source: base
"""


def _recipe(paths, **options):
  options = {'filter_wise': 'false', 'dtype': 'float32'} | options
  path = paths / 'recipe.yaml'
  names = {name: paths / name for name in 'abc'}
  path.write_text(RECIPE.format(**names, **options))
  return str(path)


def test_a_recipe_is_merged_as_its_flags_would_be(paths):
  recipe = _recipe(paths, filter_wise='true')
  assert main.main(['merge', recipe, str(paths / 'one')]) == 0
  a, b, c, two = (str(paths / name) for name in ('a', 'b', 'c', 'two'))
  arguments = ['merge', '--anchor', a, '--models', b, c, '--output', two]
  # mergekit does not clip
  assert main.main([*arguments, '--unit=filter', '--no-clip']) == 0
  one, two = _load(paths / 'one'), _load(paths / 'two')
  for name in two:
    np.testing.assert_array_equal(one[name], two[name])


def test_out_dtype_is_that_of_the_result(paths):
  recipe = _recipe(paths, dtype='float32\nout_dtype: bfloat16')
  assert main.main(['merge', recipe, str(paths / 'out')]) == 0
  assert _load(paths / 'out')['embed.weight'].dtype.name == 'bfloat16'


def test_a_recipe_is_inspected_alone(paths, capsys):
  recipe = _recipe(paths)
  before = sorted(paths.rglob('*'))
  assert main.main(['merge', recipe, '--dry-run']) == 0
  said = capsys.readouterr().out
  a, b, c = (str(paths / name) for name in 'abc')
  assert main.main(['inspect', a, b, c, '--no-clip']) == 0
  assert capsys.readouterr().out == said
  assert main.main(['merge', recipe, str(paths / 'out'), '--dry-run']) == 0
  assert capsys.readouterr().out == said
  assert sorted(paths.rglob('*')) == before


def test_recipes_of_something_else(paths, capsys):
  path = paths / 'bad.yaml'
  for text, words in (
    ('[', 'is not a recipe in YAML'),
    ('- 1', 'is not a recipe in YAML: it is no mapping'),
    ('merge_method: model_stock', 'base_model: is missing'),
    ('parameters: [1]', 'line 1: parameters[0]: is not known here'),
    ('[' * 5000, 'is not a recipe in YAML'),
    ('x: 2020-99-99', 'is not a recipe in YAML'),
    ('? [1]\n: 2', 'is not a recipe in YAML'),
    ('base_model: {model: {path: [1]}}', 'base_model[0]: is not known here'),
    ('merge_method: "\\e[2J"', "merge_method: is '\\x1b[2J', must be"),
    ('parameters.filter_wise: true', 'line 1: parameters filter_wise: is not'),
  ):
    path.write_text(text)
    assert main.main(['merge', str(path), str(paths / 'out')]) == 1
    assert words in capsys.readouterr().err
  assert main.main(['merge', str(paths / 'no.yaml'), 'out']) == 1
  assert 'there is no such file' in capsys.readouterr().err


def test_wrong_usage(paths, capsys):
  a, b = (str(paths / name) for name in 'ab')
  for arguments, words in (
    (['--anchor', a], '--models, --output: not given'),
    ([a], 'give RECIPE OUT'),
    ([a, b, 'c', '--dry-run'], 'give RECIPE OUT'),
    ([a, b, '--anchor', a], 'give RECIPE OUT and none of --anchor'),
    (['--anchor', a, '--config.x=1'], '`modelstock merge` has no config'),
    (
      ['--anchor', a, '--models', b, '--output', 'o'],
      'at least two models',
    ),
  ):
    assert main.main(['merge', *arguments]) == 1
    assert words in capsys.readouterr().err


def test_numbers_of_srun(paths, monkeypatch, capsys):
  command = ['merge', '--models', str(paths / 'b'), str(paths / 'c')]
  command += ['--anchor', str(paths / 'a'), '--output', str(paths / 'out')]
  command += ['--num_processes']
  monkeypatch.delenv('OMPI_COMM_WORLD_RANK', raising=False)
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
  monkeypatch.setenv('SLURM_PROCID', '2')
  assert main.main([*command, 'auto']) == 1
  assert 'process_id 2, num_processes 2: processes' in capsys.readouterr().err
  assert main.main([*command, 'auto', '--process_id=1']) == 1
  assert '--num_processes auto takes it from srun' in capsys.readouterr().err
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  monkeypatch.setenv('SLURM_PROCID', '0')
  assert main.main([*command, 'auto']) == 0
  with pytest.raises(SystemExit):
    main.main([*command, 'all'])
  assert "invalid int_or_auto value: 'all'" in capsys.readouterr().err
