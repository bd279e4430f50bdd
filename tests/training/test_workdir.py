"""A run resumes only with what it was started with."""

import shutil

import jax
import pytest

from modelstock_jax.data import sources as sources_lib
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import clip_task
from modelstock_jax.training import loop
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import workdir as workdir_lib


def _differences(error):
  return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_newer_data_set_is_refused(tiny_config, setup, tmp_path):
  versions = tmp_path / 'data' / 'digits'
  shutil.copytree(sources_lib.BUNDLED_DIR / 'digits', versions)
  workdir = tmp_path / 'run'
  config = tiny_config({'data.data_dir': str(versions.parent)})

  def claim():
    sources = clip_task.sources(config.data, config.augment, 8)
    inputs = {**setup.inputs, **setup_lib.inputs(setup.task, sources)}
    return workdir_lib.claim(workdir, config.to_json(), inputs)

  claim()
  newer = shutil.copytree(versions / '1.0.0', versions / '1.1.0')
  info = newer / 'dataset_info.json'
  info.write_text(info.read_text().replace('1.0.0', '1.1.0'))
  with pytest.raises(ValueError, match='inputs of its run have cha') as error:
    claim()
  assert _differences(error) == [
    "data.train.name: 'digits/1.0.0/train[:32]' -> 'digits/1.1.0/train[:32]'",
    "data.validation.name: 'digits/1.0.0/validation[:48]' -> "
    "'digits/1.1.0/validation[:48]'",
  ]
  shutil.rmtree(newer)
  assert claim() == workdir


def test_other_inputs_are_refused(tiny_config, setup, tmp_path):
  config = tiny_config()
  workdir_lib.claim(tmp_path, config.to_json(), setup.inputs)
  before = (tmp_path / 'inputs.json').read_bytes()
  with jax.default_prng_impl('rbg'):
    inputs = setup_lib.inputs(setup.task, setup.sources)
  inputs['data']['train']['examples'] = 40
  inputs['example']['image'] = 'float32[8, 8, 1]'
  inputs['anchor'] = 'another'
  with pytest.raises(ValueError, match=f'{tmp_path}: the inputs') as error:
    loop.train(config, tmp_path, setup=setup._replace(inputs=inputs))
  assert _differences(error) == [
    f"anchor: '{setup.inputs['anchor']}' -> 'another'",
    'data.train.examples: 32 -> 40',
    "example.image: 'uint8[8, 8, 1]' -> 'float32[8, 8, 1]'",
    "jax.jax_default_prng_impl: 'threefry2x32' -> 'rbg'",
  ]
  assert (tmp_path / 'inputs.json').read_bytes() == before
  assert not (tmp_path / 'checkpoints').exists()
  # Older versions did not record them.
  (tmp_path / 'inputs.json').unlink()
  workdir_lib.claim(tmp_path, config.to_json(), inputs)
  assert 'another' in (tmp_path / 'inputs.json').read_text()


@pytest.mark.parametrize('text', ['', '[]', 'null'])
def test_broken_inputs_are_named(text, tiny_config, setup, tmp_path):
  (tmp_path / 'inputs.json').write_text(text)
  with pytest.raises(ValueError, match=r'inputs\.json: is not the inputs of'):
    workdir_lib.claim(tmp_path, tiny_config().to_json(), setup.inputs)


def test_the_anchor_is_its_files(tiny_config, weights, tmp_path):
  folder = tmp_path / 'clip'
  folder.mkdir()
  shutil.copy(weights, folder / 'model.safetensors')
  prompts = tmp_path / 'prompts.json'
  prompts.write_text('{}')
  changes = {'anchor.weights': str(folder), 'anchor.prompts': str(prompts)}
  anchor = tiny_config(changes).anchor
  digest = anchor_lib.digest_files(anchor)
  # A run writes these two there.
  cached = folder / 'zero_shot_head-0123456789abcdef.safetensors'
  cached.write_bytes(b'head')
  (folder / 'results.json').write_text('{}')
  assert anchor_lib.digest_files(anchor) == digest
  seen = {digest}
  for path in (folder / 'merges.txt', prompts, folder / 'model.safetensors'):
    path.write_text('changed')
    seen.add(anchor_lib.digest_files(anchor))
  assert len(seen) == 4
