"""Merged LoRA adapters in peft, against the dense merge of what peft merges.

The dense merge is that of equation 3 in float64 over the weights that peft's
`merge_and_unload` gives for each adapter, also in float64.
"""

import copy

import numpy as np
import peft
import pytest
import torch
import transformers

from modelstock_jax import files

pytestmark = [
  pytest.mark.oracle,
  pytest.mark.filterwarnings('ignore'),  # peft's, on how it saves embeddings
]


@pytest.fixture(scope='module', autouse=True)
def offline():
  """peft asks the hub for the config of a base that has a name."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HF_HUB_OFFLINE', '1')
    yield


def _llama():
  return transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=50,
      hidden_size=16,
      intermediate_size=24,
      num_hidden_layers=2,
      num_attention_heads=2,
      num_key_value_heads=1,
    )
  )


def _gpt2():
  """Has weights stored [in, out], and names without its prefix."""
  return transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2
    )
  )


class _Conv(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.conv = torch.nn.Conv2d(3, 5, 3)
    self.head = torch.nn.Linear(5, 4)

  def forward(self, images):
    return self.head(self.conv(images).mean((2, 3)))


LINEAR = {'target_modules': ['q_proj', 'down_proj'], 'r': 3, 'lora_alpha': 7}
CASES = {
  'ranks': (_llama, [LINEAR, LINEAR | {'r': 5}]),
  'patterns': (
    _llama,
    [
      LINEAR | {'rank_pattern': {'layers.1.mlp.down_proj': 2}},
      LINEAR | {'use_rslora': True, 'alpha_pattern': {'q_proj': 3}},
      LINEAR,
    ],
  ),
  'embeddings': (
    _llama,
    [
      {
        'target_modules': ['embed_tokens', 'v_proj'],
        'modules_to_save': ['lm_head'],
      }
    ]
    * 2,
  ),
  'gpt2': (_gpt2, [{'target_modules': ['c_attn'], 'fan_in_fan_out': True}] * 2),
  'conv': (_Conv, [{'target_modules': ['conv', 'head'], 'r': 2}] * 2),
}


def _outputs(model, base):
  inputs = torch.arange(14).reshape(2, 7)
  if isinstance(base, _Conv):
    inputs = (
      torch.sin(torch.arange(2.0 * 3 * 8 * 8)).reshape(2, 3, 8, 8).double()
    )
  with torch.no_grad():
    out = model.double().eval()(inputs)
  return (out if torch.is_tensor(out) else out.logits).numpy()


def _save(model, folder):
  if hasattr(model, 'save_pretrained'):
    model.save_pretrained(folder)
  else:
    folder.mkdir()
    torch.save(model.state_dict(), folder / 'pytorch_model.bin')


@pytest.fixture(scope='module', params=CASES)
def family(request, tmp_path_factory):
  """A base and adapters of it, saved; the base, and the merge in float64."""
  folder = tmp_path_factory.mktemp('family')
  make, configs = CASES[request.param]
  torch.manual_seed(0)
  base = make()
  _save(base, folder / 'base')
  models, adapters = [], []
  for number, config in enumerate(configs):
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(1 + number)
    for _, leaf in sorted(model.named_parameters()):
      if leaf.requires_grad:
        size = (max(leaf.shape), max(leaf.shape), *leaf.shape[2:])
        shared, noisy = (
          torch.randn(size, generator=g)[: leaf.shape[0], : leaf.shape[1]]
          for g in (generator, noise)
        )
        leaf.data += 0.3 * shared + 0.15 * noisy
    model.peft_config['default'].base_model_name_or_path = str(folder / 'base')
    adapters.append(folder / f'adapter_{number}')
    model.save_pretrained(adapters[-1])
    models.append(model.double().merge_and_unload().state_dict())
  weights = copy.deepcopy(base).double().state_dict()
  for name, anchor in weights.items():
    steps = [(model[name] - anchor).numpy().ravel() for model in models]
    cosines = [
      one @ two / np.linalg.norm(one) / np.linalg.norm(two) if one.any() else 0
      for i, one in enumerate(steps)
      for two in steps[:i]
    ]
    cosine = np.clip(np.mean(cosines), 0, 1)
    t = len(steps) * cosine / (1 + (len(steps) - 1) * cosine)
    mean = torch.from_numpy(np.reshape(sum(steps) / len(steps), anchor.shape))
    weights[name] = anchor + t * mean
  merged = copy.deepcopy(base).double()
  merged.load_state_dict(weights)
  return folder, adapters, base, merged


def test_peft_loads_the_merge(family):
  folder, adapters, base, merged = family
  files.merge(folder / 'base', adapters, folder / 'merged')
  model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / 'merged')
  expected, actual = _outputs(merged, base), _outputs(model, base)
  moved = np.max(np.abs(expected - _outputs(copy.deepcopy(base), base)))
  apart = np.max(np.abs(actual - expected))
  print(f'max abs difference {apart:.1e}, moved {moved:.1e}')
  assert moved > 1e-2
  assert apart < 1e-6 * max(1, np.max(np.abs(expected)))


def test_full_weights_are_those_of_peft(family):
  folder, adapters, base, merged = family
  files.merge(folder / 'base', adapters, folder / 'dense', dense=True)
  if isinstance(base, _Conv):
    import safetensors.torch

    model = copy.deepcopy(base)
    file = folder / 'dense' / 'model.safetensors'
    model.load_state_dict(safetensors.torch.load_file(file))
  else:
    model = type(base).from_pretrained(folder / 'dense')
  expected = merged.state_dict()
  for name, weights in model.state_dict().items():
    size = float(expected[name].abs().max())
    apart = float((weights - expected[name]).abs().max())
    assert apart <= 1e-6 * size, name
