"""A tiny CLIP of `transformers`, without torch; see golden/generate.py."""

import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import clip

FOLDER = pathlib.Path(__file__).parent / 'golden'
AGAIN = (
  'If transformers itself has changed, write the golden files again with '
  '.venv-oracles/bin/python tests/clip/golden/generate.py'
)


@pytest.fixture(scope='module')
def golden():
  with np.load(FOLDER / 'features.npz') as file:
    return dict(file)


@pytest.mark.parametrize('compiled', [False, True])
def test_embeddings(golden, compiled):
  model, params = clip.load_pretrained(FOLDER / 'huggingface')
  towers = (
    ('image', model.encode_image, golden['images']),
    ('text', model.encode_text, golden['tokens']),
  )
  for name, encode, x in towers:
    got = (jax.jit(encode) if compiled else encode)(params, x)
    expected = golden[name]
    assert expected.std() > 0.1
    np.testing.assert_allclose(
      got, expected, rtol=0, atol=1e-5, err_msg=f'{name}: {AGAIN}'
    )


@pytest.mark.parametrize('layout', ['huggingface', 'open_clip'])
def test_tensors_survive_every_format(tmp_path, layout):
  model, params = clip.load_pretrained(FOLDER / 'huggingface')
  clip.save_pretrained(params, tmp_path, format=layout, config=model.config)
  again = clip.load_pretrained(tmp_path)
  assert again.model.config == model.config
  assert jax.tree.structure(again.params) == jax.tree.structure(params)
  pairs = zip(
    jax.tree.leaves(again.params), jax.tree.leaves(params), strict=True
  )
  for a, b in pairs:
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_we_write_is_what_transformers_wrote(tmp_path):
  # and transformers knows every tensor of it by name, shape and dtype
  model, params = clip.load_pretrained(FOLDER / 'huggingface')
  clip.save_pretrained(params, tmp_path, config=model.config)
  name = 'model.safetensors'
  got = safetensors.numpy.load_file(tmp_path / name)
  expected = safetensors.numpy.load_file(FOLDER / 'huggingface' / name)
  assert got.keys() == expected.keys()
  for key, tensor in expected.items():
    np.testing.assert_array_equal(got[key], tensor, strict=True)


def test_files_stay_small():
  files = [path for path in FOLDER.rglob('*') if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 150_000
