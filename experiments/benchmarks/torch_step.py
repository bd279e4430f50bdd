"""The training step that others have: torch, and the CLIP of transformers.

The loss, optimizer and precision of ours: float32 weights, moments and head,
products of the tower in bfloat16 by autocast, attention by
`scaled_dot_product_attention`, fused AdamW, decay on every tensor, gradients
clipped to a global norm. float32 products on a GPU are TF32 in both.
"""

import pathlib
from typing import Any

import common
import numpy as np
import programs
import safetensors.torch
import torch
import transformers


class Classifier(torch.nn.Module):
  """CLIP's image tower with a head on the normalised embedding."""

  def __init__(self, folder: str):
    """Read what `clip.save_pretrained` has written."""
    super().__init__()
    tower: Any = transformers.CLIPVisionModelWithProjection
    self.tower = tower.from_pretrained(
      folder, attn_implementation='sdpa', dtype=torch.float32
    )
    path = pathlib.Path(folder, 'classifier.safetensors')
    head = safetensors.torch.load_file(path)
    self.head = torch.nn.Linear(*reversed(head['weight'].shape))
    self.head.load_state_dict(head)

  def forward(self, images: Any) -> Any:
    """Turn uint8[B, H, W, C] into logits float32[B, K]."""
    pixels = programs.normalize(images.float()).permute(0, 3, 1, 2)
    features = self.tower(pixel_values=pixels).image_embeds
    with torch.autocast(images.device.type, enabled=False):
      return self.head(torch.nn.functional.normalize(features.float(), dim=-1))


class Step:
  """One model in training, with the methods of `step.Stacked`."""

  models = 1

  def __init__(
    self, folder: str, batch: dict[str, np.ndarray], dtype: str, compiled: bool
  ):
    """Put model and batch on the GPU if there is one.

    Args:
      folder: of `clip.save_pretrained`, with a head.
      batch: 'image' uint8[B, H, W, C] and 'label' int32[B].
      dtype: 'bfloat16' or 'float32', of the products.
      compiled: by `torch.compile`.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self._half = dtype == 'bfloat16'
    self._model = Classifier(folder).to(self._device).train()
    self._forward: Any = torch.compile(self._model) if compiled else self._model
    self._images = torch.from_numpy(batch['image']).to(self._device)
    self._labels = torch.from_numpy(batch['label']).long().to(self._device)
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(),
      lr=programs.LEARNING_RATE,
      weight_decay=programs.WEIGHT_DECAY,
      fused=True,
    )

  def step(self) -> None:
    """Start a step."""
    with torch.autocast(self._device, torch.bfloat16, enabled=self._half):
      logits = self._forward(self._images)
    loss = torch.nn.functional.cross_entropy(logits, self._labels)
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      self._model.parameters(), programs.CLIP_NORM
    )
    self._optimizer.step()
    self._last = loss.detach(), norm

  def results(self) -> np.ndarray:
    """Wait for the step; return its loss and the norm of its gradient."""
    if self._device == 'cuda':
      torch.cuda.synchronize()
    return np.array([float(value) for value in self._last])

  def peak_bytes(self) -> int:
    """Return the most memory the GPU has held, or this process."""
    if self._device == 'cuda':
      return torch.cuda.max_memory_allocated()
    return common.peak_bytes()
