"""Adapters that a merge refuses, and why."""

import numpy as np
import pytest
import safetensors.numpy

from modelstock_jax import clip
from modelstock_jax import files

PREFIX = 'base_model.model.'
QUERY, CONV = 'model.layers.0.q_proj', 'model.conv'
_A, _B = (f'{PREFIX}{QUERY}.lora_{letter}.weight' for letter in 'AB')
ZEROS = np.zeros((3, 6), np.float32)


@pytest.mark.parametrize(
  ('config', 'tensors', 'message'),
  [
    ({'use_dora': True}, {}, 'use_dora is set'),
    ({'peft_type': 'IA3'}, {}, "peft_type='IA3', init_lora_weights=None"),
    ({'init_lora_weights': 'pissa_niter_4'}, {}, "='pissa_niter_4'"),
    ({'alpha_pattern': {'(a+)+': 1}}, {}, r"'\(a\+\)\+' is not read"),
    ({'alpha_pattern': [1]}, {}, r'adapter_config\.json: '),
    ({'lora_alpha': None}, {}, r'adapter_config\.json: '),
    (
      {'base_model_name_or_path': 'someone/else'},
      {},
      r"_0 has .*_or_path': 'someone/base'.*\n.*_1 has .*: 'someone/else'",
    ),
    ({}, {_B: None}, r'q_proj\.lora_A\.weight float32\[3, 6\]'),
    ({}, {_A: None}, r'q_proj\.lora_B\.weight float32\[8, 3\]'),
    ({}, {_A: ZEROS.astype(np.float16)}, r'lora_A\.weight float16\[3, 6\]'),
    ({}, {_A: ZEROS[:2]}, r'lora_A\.weight float32\[2, 6\]'),
    ({}, {f'{PREFIX}{QUERY}.lora_magnitude_vector': ZEROS}, 'magnitude_vector'),
    ({}, {f'{PREFIX}{QUERY}.weight': ZEROS}, r'q_proj\.weight float32\[3, 6\]'),
    ({}, {'unet.w': ZEROS}, r'unet\.w float32'),
    (
      {},
      {_A: None, _B: None},
      r'fit the anchor someone/base\..*\n.*q_proj\.weight: not in .*er_1$',
    ),
    (
      {},
      {_A: ZEROS * np.nan},
      r'q_proj\.weight: values that are not finite: .*_1',
    ),
  ],
)
def test_adapters_that_do_not_fit(
  save_adapters, edit_adapter, tmp_path, config, tensors, message
):
  _, folders = save_adapters()
  edit_adapter(folders[1], tensors, **config)
  with pytest.raises(ValueError, match=message):
    files.merge('someone/base', folders, tmp_path / 'out')
  assert not list(tmp_path.glob('*out*'))


def test_what_float16_does_not_hold(save_adapters, tmp_path):
  _, folders = save_adapters(lora_alpha=3e5)
  with pytest.raises(
    ValueError, match=r'has values that float16 does not hold'
  ):
    files.merge('someone/base', folders, tmp_path / 'out', dtype='float16')


def test_an_adapter_is_no_anchor(save_adapters, tmp_path):
  _, folders = save_adapters((3, 3, 3))
  with pytest.raises(ValueError, match='adapter_0 is an adapter itself'):
    files.merge(folders[0], folders[1:], tmp_path / 'out')


def test_an_adapter_is_no_model(save_adapters):
  _, folders = save_adapters()
  with pytest.raises(ValueError, match='holds an adapter, not a model'):
    clip.load_pretrained(folders[0])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'rank must be at least 1, got 0'),
    ({'rank': 2, 'dense': True}, 'rank is for LoRA adapters'),
    ({'output': 'out.safetensors'}, 'Let --output name a folder'),
    (
      {'anchor': 'someone/else'},
      "the anchor is 'someone/else', not 'someone/b",
    ),
  ],
)
def test_options_that_do_not_fit(save_adapters, tmp_path, options, message):
  base, folders = save_adapters()
  arguments = {'anchor': base, 'models': folders, 'output': 'out'} | options
  arguments['output'] = tmp_path / arguments['output']
  with pytest.raises(ValueError, match=message):
    files.merge(**arguments)


def test_a_base_that_does_not_fit(save_adapters, tmp_path):
  base, folders = save_adapters()
  path = base / 'model.safetensors'
  weights = safetensors.numpy.load_file(path)
  weights[f'{QUERY}.weight'] = np.zeros((6, 4), np.int8)
  del weights[f'{CONV}.weight']
  safetensors.numpy.save_file(weights, path)
  with pytest.raises(ValueError, match='before it was quantised') as caught:
    files.merge(base, folders, tmp_path / 'out', dense=True)
  assert 'q_proj.weight float32[8, 6]: the base has int8[6, 4]' in str(
    caught.value
  )
  assert 'conv.weight float32[5, 3, 2, 2]: the base has none' in str(
    caught.value
  )
  with pytest.raises(ValueError, match='base holds no LoRA adapter of peft'):
    files.merge(base, [f'{base}+{base}', folders[0]], tmp_path / 'out')
