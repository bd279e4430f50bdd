"""The model card of a merged folder, as the Hugging Face hub reads it."""

import json

import pytest
import yaml

from modelstock_jax import files


def read(path):
  """Return the metadata of a card and its text."""
  before, metadata, text = path.read_text().split('---\n', 2)
  assert before == ''
  return yaml.safe_load(metadata), text


@pytest.fixture
def checkpoints(family, save):
  """Saves a family with a config of transformers; gives its paths."""

  def write(num_models=2):
    anchor, models = save(family(num_models))
    (anchor / 'config.json').write_text('{"model_type": "bert"}')
    return anchor, models

  return write


def test_the_card(checkpoints, tmp_path):
  anchor, models = checkpoints()
  merged = files.merge(anchor, models, tmp_path / 'out', strength=0.5)
  metadata, text = read(tmp_path / 'out/README.md')
  assert metadata == {
    'base_model': ['a', 'b', 'c'],
    'library_name': 'transformers',
    'tags': ['merge', 'model_stock'],
  }
  (verdict,) = merged.verdicts.values()
  assert verdict in text
  recipe = json.loads(text.split('```json')[1].split('```')[0])
  assert recipe['anchor'] == 'a'
  assert recipe['models'] == ['b', 'c']
  assert recipe['method'] == {'name': 'model_stock'}
  assert recipe['strength'] == 0.5
  assert str(tmp_path) not in text  # nobody's folders


def test_names_of_the_hub_are_kept(checkpoints, tmp_path):
  anchor, models = checkpoints()
  snapshot = tmp_path / 'hub/models--some--model/snapshots/0f3a'
  snapshot.parent.mkdir(parents=True)
  anchor.rename(snapshot)
  files.merge(snapshot, models, tmp_path / 'out')
  metadata, _ = read(tmp_path / 'out/README.md')
  assert metadata['base_model'] == ['some/model', 'b', 'c']


def test_names_cannot_write_metadata(checkpoints, tmp_path):
  anchor, models = checkpoints()
  path = models[0].rename(tmp_path / 'b"\n---\ntags: [x]\n')
  files.merge(anchor, [path, models[1]], tmp_path / 'out')
  metadata, _ = read(tmp_path / 'out/README.md')
  assert metadata['base_model'] == ['a', 'b"\\n---\\ntags: [x]\\n', 'c']
  assert metadata['tags'] == ['merge', 'model_stock']


def test_open_clip(checkpoints, tmp_path):
  anchor, models = checkpoints()
  for path in (anchor, *models):
    file = path / 'model.safetensors'
    file.rename(path / 'open_clip_model.safetensors')
  files.merge(anchor, models, tmp_path / 'out')
  metadata, _ = read(tmp_path / 'out/README.md')
  assert metadata['library_name'] == 'open_clip'


def test_a_card_for_each_alpha(checkpoints, tmp_path):
  anchor, models = checkpoints(1)
  method = files.Method('wise_ft', alphas=[0.25, 0.5])
  files.merge(anchor, models, tmp_path / 'out', method=method)
  for alpha in (0.25, 0.5):
    metadata, text = read(tmp_path / f'out/alpha_{alpha}/README.md')
    assert metadata['tags'] == ['merge', 'wise_ft']
    recipe = json.loads(text.split('```json')[1].split('```')[0])
    assert recipe['method'] == {'name': 'wise_ft', 'alphas': [alpha]}


def test_a_soup_without_an_anchor(checkpoints, tmp_path):
  _, models = checkpoints()
  files.merge(None, models, tmp_path / 'out', method=files.Method('soup'))
  metadata, _ = read(tmp_path / 'out/README.md')
  # The config of the models does not tell of transformers.
  assert metadata == {'base_model': ['b', 'c'], 'tags': ['merge', 'soup']}


def test_a_file_has_no_card(family, save, tmp_path):
  anchor, models = save(family(), form='file')
  files.merge(anchor, models, tmp_path / 'out')
  names = sorted(path.name for path in (tmp_path / 'out').iterdir())
  assert names == ['model.safetensors', 'model_stock.json']
