"""Forms of mergekit's recipes as people publish them, with other names.

Each of RUN gives the merge of the two models; each of REFUSED is an error that
names the line.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import files
from modelstock_jax.files import mergekit

HEAD = 'merge_method: model_stock\nbase_model: base\n'
MODELS = 'models:\n  - model: a\n  - model: b\n'
PLAIN = HEAD + MODELS
SLICE = '  - sources:\n      - model: a\n        layer_range: [{0}, {1}]\n'
SLICE += '      - model: b\n        layer_range: [{0}, {1}]\n'
WHOLE = SLICE.format(0, 4)

# The recipe, and words of what is said to be ignored.
RUN = {
  'plain': (PLAIN, ''),
  'models first': (MODELS + HEAD, ''),
  'in JSON': (
    '{"merge_method": "model_stock", "base_model": "base", '
    '"models": [{"model": "a"}, {"model": "b"}]}',
    '',
  ),
  'base among the models': (PLAIN + '  - model: base\n', ''),
  'base by its path': (
    'models:\n  - model: base\n  - model: a\n  - model: b\n'
    'merge_method: model_stock\nbase_model: ./base/\n',
    '',
  ),
  'name': (PLAIN + 'name: someone/merged-7b\n', ''),
  'dtype': (PLAIN + 'dtype: float32\n', ''),
  'out_dtype': (PLAIN + 'dtype: bfloat16\nout_dtype: float32\n', ''),
  'no filters': (PLAIN + 'parameters:\n  filter_wise: false\n', ''),
  'tokenizer of the base': (PLAIN + 'tokenizer_source: base\n', ''),
  'tokenizer by its path': (PLAIN + 'tokenizer_source: ./base\n', ''),
  'tokenizer in parts': (PLAIN + 'tokenizer:\n  source: base\n', ''),
  'no tokens': (PLAIN + 'tokenizer:\n  source: base\n  tokens: {}\n', ''),
  'weights': (
    PLAIN.replace('el: b\n', 'el: b\n    parameters:\n      weight: 0.5\n'),
    'line 7: models[1].parameters.weight has no effect',
  ),
  'weights and densities': (
    HEAD + 'models:\n'
    '  - model: a\n    parameters: {density: 0.53, weight: [0, 1]}\n'
    '  - model: b\n    parameters: {}\n',
    'line 5: models[0].parameters.weight[1] has no effect',
  ),
  'weights by filters': (
    PLAIN + '    parameters:\n      weight:\n'
    '        - filter: mlp\n          value: [0, 0.5]\n        - value: 1\n',
    'line 9: models[1].parameters.weight[0].value[1] has no effect',
  ),
  'int8_mask and normalize': (
    PLAIN + 'parameters:\n  int8_mask: true\n  normalize: true\n',
    'line 8: parameters.normalize has no effect',
  ),
  'chat template': (
    PLAIN + 'chat_template: auto\n',
    'line 6: chat_template has no effect',
  ),
  'one slice': (HEAD + 'slices:\n' + WHOLE, ''),
  'one slice, the base too': (
    HEAD
    + 'slices:\n'
    + WHOLE
    + '      - model: base\n        layer_range: [0, 4]\n',
    '',
  ),
  'slices that join': (
    HEAD + 'slices:\n' + SLICE.format(0, 1) + SLICE.format(1, 4),
    '',
  ),
  'slices with weights': (
    HEAD + 'slices:\n' + WHOLE + '        parameters: {weight: 1}\n'
    'dtype: float32\nparameters:\n  normalize: true\n',
    'slices[0].sources[1].parameters.weight has no effect',
  ),
  'slices with a base of their own': (
    HEAD + 'slices:\n' + WHOLE + '    base_model: base\n',
    '',
  ),
  'an adapter': (PLAIN.replace('model: a', 'model: base+adapter'), ''),
  'a path in parts': (
    PLAIN.replace('model: a', 'model:\n      model:\n        path: a'),
    '',
  ),
  'an adapter in parts': (
    PLAIN.replace(
      'model: a',
      'model:\n      model: {path: base}\n      lora: {path: adapter}',
    ),
    '',
  ),
  'anchors and aliases of YAML': (
    'name: &x base\nmerge_method: model_stock\nbase_model: *x\n' + MODELS,
    '',
  ),
  'an empty list of slices': (PLAIN + 'slices: []\nparameters:\n', ''),
}

REFUSED = {
  'another method': (
    PLAIN.replace('model_stock', 'ties'),
    "line 1: merge_method: is 'ties', must be one of ('model_stock',)",
  ),
  'no base': (MODELS + 'merge_method: model_stock', 'base_model: is missing'),
  'a key that is misspelt': (
    PLAIN + 'tokenizer_sorce: base\n',
    'line 6: tokenizer_sorce: is not known here; the nearest is tokenizer_so',
  ),
  'a parameter that is misspelt': (
    PLAIN + '    parameters:\n      wieght: 1\n',
    'line 7: models[1].parameters.wieght: is not known here; the nearest is '
    'models[].parameters.weight',
  ),
  'filters of a model': (
    PLAIN + '    parameters: {filter_wise: true}\n',
    'line 6: models[1].parameters.filter_wise: is not known here; the nearest '
    'is parameters.filter_wise',
  ),
  'filters by filters': (
    PLAIN + 'parameters:\n  filter_wise:\n    - {filter: mlp, value: true}\n',
    'line 8: parameters.filter_wise[0].filter: is not known here',
  ),
  'a dtype that is misspelt': (
    PLAIN + 'dtype: bfloat\n',
    "line 6: dtype: is 'bfloat', must be one of (None, 'float64', 'float32', "
    "'float16', 'bfloat16'); the nearest is bfloat16",
  ),
  'any dtype': (PLAIN + 'dtype: auto\n', "line 6: dtype: is 'auto', must be"),
  'a union of tokenizers': (
    PLAIN + 'tokenizer_source: union\n',
    "line 6: tokenizer_source: is 'union', must be one of (None, 'base'",
  ),
  'the tokenizer of a model': (
    PLAIN + 'tokenizer_source: a\n',
    "line 6: tokenizer_source: is 'a', must be",
  ),
  'tokens': (
    PLAIN + 'tokenizer:\n  source: base\n  tokens:\n    x: {source: a}\n',
    'line 9: tokenizer.tokens.x.source: is not known here; the nearest is '
    'tokenizer.tokens',
  ),
  'part of the layers': (
    HEAD + 'slices:\n' + SLICE.format(0, 3),
    'line 7: layer_range of b: [0, 3] must join from 0 to 4, the layers of the',
  ),
  'slices with a gap': (
    HEAD + 'slices:\n' + SLICE.format(0, 1) + SLICE.format(2, 4),
    'line 5: layer_range of a: [0, 1, 2, 4] must join from 0 to 4',
  ),
  'slices without a range': (
    HEAD + 'slices:\n  - sources:\n      - model: a\n',
    'line 5: layer_range of a: [None, None] must join',
  ),
  'slices of another base': (
    HEAD + 'slices:\n' + WHOLE + '    base_model: a\n',
    "line 9: slices[0].base_model: is 'a', must be one of ('base',)",
  ),
  'parts of a model': (
    HEAD + 'modules:\n  text_decoder:\n    models:\n      - model: a\n',
    'line 6: modules.text_decoder.models[0].model: is not known here',
  ),
  'names without a key': (
    HEAD + 'models:\n  - a\n  - b\n',
    'line 4: models[0]: is not known here; the nearest is models',
  ),
  'a model that is no name': (
    HEAD + 'models:\n  - model: 7\n',
    'line 4: models[0].model: is 7, must be a checkpoint',
  ),
  'several documents': (
    PLAIN + '---\n' + PLAIN,
    'line 6, column 1: --- ^; save each as a file of its own, and merge them',
  ),
  'a key that stands twice': (
    PLAIN + 'dtype: float32\ndtype: float16\n',
    'one of the keys from line 1 on stands twice',
  ),
  'a tab': (
    PLAIN + '\t- model: c\n',
    'is not a recipe in YAML: while scanning',
  ),
  'an unknown revision': (
    PLAIN.replace('model: b', 'model: some/b@main'),
    'some/b@main: there is no such file or folder, and the Hugging Face hub '
    'did not give',
  ),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A base, an adapter, which is also added to it as a, and b."""
  folder = tmp_path_factory.mktemp('recipes')
  rng = np.random.default_rng(0)
  name = 'model.layers.0.q_proj'
  base, learnt = rng.normal(size=(2, 6, 4)).astype(np.float32)
  u, v = rng.normal(size=(6, 2)), rng.normal(size=(2, 4))
  trees = {
    'base': base,
    'a': base + u @ v,
    'b': base + u @ v + 0.5 * learnt,
  }
  for each, array in trees.items():
    (folder / each).mkdir()
    config = {'num_hidden_layers': 4}
    (folder / each / 'config.json').write_text(json.dumps(config))
    safetensors.numpy.save_file(
      {f'{name}.weight': np.float32(array)}, folder / each / 'model.safetensors'
    )
  (folder / 'adapter').mkdir()
  prefix = f'base_model.model.{name}.lora_'
  safetensors.numpy.save_file(
    {f'{prefix}A.weight': np.float32(v), f'{prefix}B.weight': np.float32(u)},
    folder / 'adapter' / 'adapter_model.safetensors',
  )
  config = {'peft_type': 'LORA', 'lora_alpha': 2}
  (folder / 'adapter' / 'adapter_config.json').write_text(json.dumps(config))
  u, v = (trees[each].astype(np.float64) - base for each in 'ab')
  cosine = np.sum(u * v) / np.linalg.norm(u) / np.linalg.norm(v)
  t = 2 * cosine / (1 + cosine)
  return folder, {f'{name}.weight': base + t * (u + v) / 2}


@pytest.mark.parametrize('form', RUN)
def test_recipes_that_run(form, folder, tmp_path, monkeypatch, caplog):
  folder, expected = folder
  monkeypatch.chdir(folder)
  caplog.set_level('INFO')
  recipe, said = RUN[form]
  path = tmp_path / 'recipe.yaml'
  path.write_text(recipe)
  files.merge(**files.read_recipe(path), output=tmp_path / 'out')
  written = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  assert written.keys() == expected.keys()
  for name, array in expected.items():
    assert written[name].dtype == np.float32
    np.testing.assert_allclose(written[name], array, rtol=0, atol=2e-6)
  assert said in caplog.text
  assert bool(said) == ('effect' in caplog.text)


@pytest.mark.parametrize('form', REFUSED)
def test_recipes_that_are_refused(form, folder, tmp_path, monkeypatch):
  monkeypatch.chdir(folder[0])
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  recipe, message = REFUSED[form]
  path = tmp_path / 'recipe.yaml'
  path.write_text(recipe)
  with pytest.raises((ValueError, FileNotFoundError)) as caught:
    files.merge(**files.read_recipe(path), output=tmp_path / 'out')
  assert message in str(caught.value)
  assert not (tmp_path / 'out').exists()


def test_aliases_that_repeat_without_bound(tmp_path):
  lines = ['a0: &a0 []']
  lines += [f'a{i}: &a{i} [{f"*a{i - 1}, " * 9}]' for i in range(1, 9)]
  path = tmp_path / 'recipe.yaml'
  path.write_text('\n'.join([*lines, PLAIN]))
  with pytest.raises(ValueError, match='it has more than 10000 values'):
    mergekit.read_recipe(path)


HUB = """
import sys
from modelstock_jax import files
files.merge(**files.read_recipe(sys.argv[1]), output=sys.argv[2])
"""


def test_ids_of_the_hub(folder, tmp_path):
  """From the hub's own cache, which it fills when there is a network."""
  folder, expected = folder
  for name, ref in (('base', 'main'), ('a', 'main'), ('b', 'v1.0')):
    commit = name[0] * 40
    cached = tmp_path / 'hub' / f'models--some--{name}'
    (cached / 'refs').mkdir(parents=True)
    (cached / 'refs' / ref).write_text(commit)
    (cached / 'snapshots').mkdir()
    (cached / 'snapshots' / commit).symlink_to(folder / name)
  path = tmp_path / 'recipe.yaml'
  recipe = HEAD + 'slices:\n' + WHOLE
  for name in ('base', 'a', 'b'):
    recipe = recipe.replace(f'del: {name}\n', f'del: some/{name}\n')
  path.write_text(recipe.replace('some/b\n', 'some/b@v1.0\n'))
  env = os.environ | {
    'HF_HUB_CACHE': str(tmp_path / 'hub'),
    'HF_HUB_OFFLINE': '1',
  }
  command = [sys.executable, '-c', HUB, path, tmp_path / 'out']
  subprocess.run(command, env=env, check=True)
  written = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  for name, array in expected.items():
    np.testing.assert_allclose(written[name], array, rtol=0, atol=2e-6)
