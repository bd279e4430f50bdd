"""Writes the golden files again: a tiny CLIP of `transformers`, random.

    .venv-oracles/bin/python tests/clip/golden/generate.py

`huggingface/` is what `save_pretrained` of transformers writes. `features.npz`
holds inputs, and what transformers computes from them: images float32[2, 16,
16, 3], tokens int32[3, 10], image float32[2, 12] and text float32[3, 12], the
embeddings, not normalised.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
CONTEXT, VOCAB = 10, 64


def create() -> transformers.CLIPModel:
  """A CLIP whose sizes all differ, with no bias at 0 and no scale at 1."""
  config = transformers.CLIPConfig(
    projection_dim=12,
    vision_config={
      'projection_dim': 12,
      'image_size': 16,
      'patch_size': 8,
      'hidden_size': 24,
      'intermediate_size': 96,
      'num_hidden_layers': 2,
      'num_attention_heads': 3,
    },
    text_config={
      'projection_dim': 12,
      'max_position_embeddings': CONTEXT,
      'vocab_size': VOCAB,
      'hidden_size': 16,
      'intermediate_size': 64,
      'num_hidden_layers': 2,
      'num_attention_heads': 2,
      'bos_token_id': VOCAB - 2,
      'eos_token_id': VOCAB - 1,
    },
  )
  model = transformers.CLIPModel(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, leaf in model.named_parameters():
      mean, std = 0.0, 0.2
      if leaf.ndim == 1 and name.endswith('weight'):
        mean = 1.0
      elif leaf.ndim > 1 and 'embedding' not in name:
        std = leaf[0].numel() ** -0.5
      leaf.normal_(mean, std, generator=generator)
  return model


def draw() -> tuple[np.ndarray, np.ndarray]:
  """Images, and texts of different lengths: start, ids, end, zeros."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
  tokens = rng.integers(1, VOCAB - 2, (3, CONTEXT)).astype(np.int32)
  tokens[:, 0] = VOCAB - 2
  for text, end in zip(tokens, (3, 6, CONTEXT - 1), strict=True):
    text[end:] = 0
    text[end] = VOCAB - 1
  return images, tokens


def main() -> None:
  """Writes the files."""
  model = create()
  images, tokens = draw()
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  with torch.inference_mode():
    image = model.get_image_features(pixels).pooler_output
    text = model.get_text_features(torch.from_numpy(tokens).long())
  model.save_pretrained(FOLDER / 'huggingface')
  np.savez(
    FOLDER / 'features.npz',
    images=images,
    tokens=tokens,
    image=image.numpy(),
    text=text.pooler_output.numpy(),
  )


if __name__ == '__main__':
  main()
