import dataclasses
import json
import stat

import jax
import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import clip


@pytest.fixture(scope='session')
def params(tiny, randomize):
  model = clip.create(tiny)
  return randomize(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture
def head():
  rng = np.random.default_rng(1)
  return {
    'kernel': rng.normal(size=(10, 3)).astype(np.float32),
    'bias': rng.normal(size=3).astype(np.float32),
  }


def test_files_of_hugging_face(params, tiny, tmp_path):
  clip.save_pretrained(
    params, tmp_path / 'a/b', config=tiny, card='# Card\n', mean=(0.3,)
  )
  actual = {file.name for file in (tmp_path / 'a/b').iterdir()}
  assert actual == {
    'README.md',
    'config.json',
    'model.safetensors',
    'preprocessor_config.json',
  }
  assert [file.name for file in (tmp_path / 'a').iterdir()] == ['b']
  mode = (tmp_path / 'a/b/model.safetensors').stat().st_mode
  assert stat.S_IMODE(mode) & 0o044 == 0o044  # for others to read
  pixels = json.loads((tmp_path / 'a/b/preprocessor_config.json').read_text())
  assert pixels['crop_size'] == {'height': 6, 'width': 6}
  assert pixels['image_mean'] == [0.3]
  assert (tmp_path / 'a/b/README.md').read_text() == '# Card\n'


def test_head_next_to_the_towers(params, tiny, head, tmp_path):
  both = {**params, 'head': head}
  labels = ['cat', 'dog', 'bird']
  clip.save_pretrained(both, tmp_path / 'a', config=tiny, labels=labels)
  # As torch.nn.Linear has it.
  tensors = safetensors.numpy.load_file(tmp_path / 'a/classifier.safetensors')
  assert tensors['weight'].shape == (3, 10)
  np.testing.assert_array_equal(tensors['weight'], head['kernel'].T)
  assert json.loads((tmp_path / 'a/labels.json').read_text()) == labels

  actual, names = clip.load_head(tmp_path / 'a')
  assert names == labels
  np.testing.assert_array_equal(actual['kernel'], head['kernel'])
  np.testing.assert_array_equal(actual['bias'], head['bias'])
  (tmp_path / 'a/labels.json').write_text('["cat"]')
  with pytest.raises(
    ValueError, match=r"holds \['cat'\], not the names of the 3 classes"
  ):
    clip.load_head(tmp_path / 'a')
  (tmp_path / 'a/classifier.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='classifier'):
    clip.load_head(tmp_path / 'a')


@pytest.mark.parametrize(
  ('labels', 'message'),
  [(None, 'labels are 0'), (['cat'], 'has 3 classes, labels are 1')],
)
def test_labels_are_as_many_as_classes(
  labels, message, params, tiny, head, tmp_path
):
  both = {**params, 'head': head}
  with pytest.raises(ValueError, match=message):
    clip.save_pretrained(both, tmp_path / 'a', config=tiny, labels=labels)
  assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_nothing_is_overwritten(params, tiny, tmp_path):
  (tmp_path / 'mine').touch()
  with pytest.raises(FileExistsError, match='not empty'):
    clip.save_pretrained(params, tmp_path, config=tiny)
  with pytest.raises(FileExistsError, match='not empty'):
    clip.save_pretrained(params, tmp_path / 'mine', config=tiny)
  (tmp_path / 'empty').mkdir()
  clip.save_pretrained(params, tmp_path / 'empty', config=tiny)
  assert (tmp_path / 'empty/model.safetensors').is_file()


def test_tokenizer_files_come_along(params, tiny, tmp_path):
  source = tmp_path / 'source'
  source.mkdir()
  with pytest.raises(FileNotFoundError, match='none of the files'):
    clip.save_pretrained(params, tmp_path / 'a', config=tiny, tokenizer=source)
  (source / 'vocab.json').write_text('{}')
  (source / 'merges.txt').write_text('')
  (source / 'secret').touch()
  clip.save_pretrained(params, tmp_path / 'a', config=tiny, tokenizer=source)
  assert (tmp_path / 'a/vocab.json').read_text() == '{}'
  assert (tmp_path / 'a/merges.txt').is_file()
  assert not (tmp_path / 'a/secret').exists()


def test_params_that_are_not_finite(params, tiny, tmp_path):
  broken = {**params, 'logit_scale': np.float32(np.nan)}
  with pytest.raises(ValueError, match=r'not saved\..*\n  logit_scale$'):
    clip.save_pretrained(broken, tmp_path / 'a', config=tiny)


def test_params_of_another_config(params, tiny, tmp_path):
  with pytest.raises(ValueError, match='Give the config they are of') as caught:
    clip.save_pretrained(params, tmp_path / 'a', config=clip.SIZES['ViT-B/32'])
  assert 'missing image/block_11/ln_1/bias: [768]' in str(caught.value)
  text = dataclasses.replace(tiny.text, context_length=9)
  longer = dataclasses.replace(tiny, text=text)
  with pytest.raises(
    ValueError, match=r'has \[7, 8\], the model takes \[9, 8\]'
  ):
    clip.save_pretrained(params, tmp_path / 'a', config=longer)


def test_params_that_are_no_clip(tiny, tmp_path):
  with pytest.raises(ValueError, match=r'extra kernel: \[3\]'):
    clip.save_pretrained({'kernel': np.zeros(3)}, tmp_path / 'a', config=tiny)


def test_format_that_cannot_hold_it(params, tiny, tmp_path):
  with pytest.raises(ValueError, match='3 channels, not 2'):
    clip.save_pretrained(params, tmp_path / 'a', 'open_clip', config=tiny)
  with pytest.raises(ValueError, match='heads of 64 features'):
    clip.save_pretrained(params, tmp_path / 'a', 'scenic', config=tiny)
  with pytest.raises(ValueError, match="format='onnx' must be one of"):
    clip.save_pretrained(params, tmp_path / 'a', 'onnx', config=tiny)
  assert list(tmp_path.iterdir()) == []
