"""Names of tensors that differ by prefixes; folders of links."""

import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import files


def test_prefixes_of_wrappers(family, save, load, tmp_path, caplog):
  """The anchor's names stay, whatever wrapped it or the models."""
  trees = family()
  anchor, models = save(trees, form='file')
  expected = load(files.merge(anchor, models, tmp_path / 'plain').output)
  prefixes = ('module.', '', 'image_encoder.model._orig_mod.')
  wrapped = [
    {prefix + name: x for name, x in tree.items()}
    for prefix, tree in zip(prefixes, trees, strict=True)
  ]
  (tmp_path / 'wrapped').mkdir()
  paths = [tmp_path / 'wrapped' / f'{name}.safetensors' for name in 'abc']
  for path, tree in zip(paths, wrapped, strict=True):
    safetensors.numpy.save_file(tree, path)
  with caplog.at_level('INFO'):
    merged = files.merge(paths[0], paths[1:], tmp_path / 'out')
  actual = load(merged.output)
  assert actual.keys() == {f'module.{name}' for name in expected}
  for name, array in expected.items():
    np.testing.assert_array_equal(actual[f'module.{name}'], array)
  lines = [
    r.getMessage() for r in caplog.records if 'prefixes' in r.msg % r.args
  ]
  assert [line.split(':')[0] for line in lines] == [str(p) for p in paths[1:]]


def test_names_that_would_be_one(family, save, load, tmp_path):
  """A checkpoint with 'w' and 'model.w' keeps both."""
  trees = [
    {'w': tree['norm.weight'], 'model.w': tree['norm.weight'] + 1}
    for tree in family()
  ]
  anchor, models = save(trees, form='file')
  merged = files.merge(anchor, models, tmp_path / 'out')
  assert load(merged.output).keys() == {'w', 'model.w'}


@pytest.mark.parametrize('common', [True, False])
@pytest.mark.parametrize('prefixed', [0, 2])
def test_names_that_differ_by_another_prefix(
  family, save, tmp_path, common, prefixed
):
  trees = family()
  trees[prefixed] = {f'bert.{name}': x for name, x in trees[prefixed].items()}
  names = sorted(['bert.norm.weight', 'norm.weight'], reverse=prefixed != 0)
  with pytest.raises(ValueError, match='do not fit') as caught:
    files.merge(*save(trees), tmp_path / 'out', common=common)
  assert f'{names[0]} and {names[1]} differ by the prefix' in str(caught.value)


def test_the_folder_of_a_model_in_the_cache(family, save, load, tmp_path):
  anchor, models = save(family())
  model = tmp_path / 'cache' / 'models--someone--model'
  (model / 'refs').mkdir(parents=True)
  (model / 'refs' / 'main').write_text(40 * 'a')
  (model / 'snapshots').mkdir()
  expected = load(files.merge(anchor, models, tmp_path / 'one').output)
  anchor.rename(model / 'snapshots' / (40 * 'a'))
  actual = load(files.merge(model, models, tmp_path / 'two').output)
  assert actual.keys() == expected.keys()
  assert all((actual[name] == expected[name]).all() for name in expected)


def test_links_to_nowhere(family, save, tmp_path):
  anchor, models = save(family())
  (anchor / 'tokenizer.json').unlink()
  (anchor / 'tokenizer.json').symlink_to(anchor / 'blob')
  with pytest.raises(
    FileNotFoundError, match=r"\['tokenizer.json'\] are links"
  ):
    files.merge(anchor, models, tmp_path / 'out')
