"""The training step that others have: torch, and the CLIP of transformers.

The loss, optimizer and precision of ours: float32 weights, moments and head,
products of the tower in bfloat16 by autocast, attention by
`scaled_dot_product_attention`, fused AdamW, decay on every tensor, gradients
clipped to a global norm. float32 products on a GPU are TF32 in both.
"""

import contextlib
import importlib
import pathlib
from typing import Any

import numpy as np
import programs
import safetensors.torch
import torch


class Classifier(torch.nn.Module):
  """CLIP's image tower with a head on the normalised embedding."""

  def __init__(self, folder: pathlib.Path):
    """Reads what `clip.save_pretrained` has written."""
    super().__init__()
    transformers: Any = importlib.import_module('transformers')
    self.tower = transformers.CLIPVisionModelWithProjection.from_pretrained(
      folder, attn_implementation='sdpa', dtype=torch.float32
    )
    head = safetensors.torch.load_file(folder / 'classifier.safetensors')
    self.head = torch.nn.Linear(*reversed(head['weight'].shape))
    self.head.load_state_dict(head)
    for name in ('mean', 'std'):
      value = torch.tensor(getattr(programs, name.upper()))
      self.register_buffer(name, value)

  def forward(self, images: Any) -> Any:
    """uint8[B, H, W, C] to logits float32[B, K]."""
    pixels = (images.float() / 255 - self.mean) / self.std
    features = self.tower(pixel_values=pixels.permute(0, 3, 1, 2)).image_embeds
    with torch.autocast(images.device.type, enabled=False):
      return self.head(torch.nn.functional.normalize(features.float(), dim=-1))


class Step:
  """Advances one model on one batch."""

  def __init__(
    self, folder: pathlib.Path, batch: dict[str, np.ndarray], dtype: str
  ):
    """Puts model and batch on the GPU if there is one.

    Args:
      folder: of `clip.save_pretrained`, with a head.
      batch: 'image' uint8[B, H, W, C] and 'label' int32[B].
      dtype: 'bfloat16' or 'float32', of the products.
    """
    self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self._dtype = dtype
    self._model = Classifier(folder).to(self._device).train()
    self._forward: Any = self._model
    self._images = torch.from_numpy(batch['image']).to(self._device)
    self._labels = torch.from_numpy(batch['label']).long().to(self._device)
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(),
      lr=programs.LEARNING_RATE,
      weight_decay=programs.WEIGHT_DECAY,
      fused=True,
    )

  def compile(self) -> None:
    """From now on by torch.compile."""
    self._forward = torch.compile(self._model)

  def logits(self) -> np.ndarray:
    """Return logits of the batch, computed in full float32."""
    with torch.no_grad(), _products('highest'):
      return self._model(self._images).cpu().numpy()

  def __call__(self) -> tuple[Any, Any]:
    """A step: the loss, and the norm of the gradient, on the device."""
    with _products('high'):
      with torch.autocast(
        self._device, torch.bfloat16, enabled=self._dtype == 'bfloat16'
      ):
        logits = self._forward(self._images)
      loss = torch.nn.functional.cross_entropy(logits, self._labels)
      self._optimizer.zero_grad(set_to_none=True)
      loss.backward()
      norm = torch.nn.utils.clip_grad_norm_(
        self._model.parameters(), programs.CLIP_NORM
      )
      self._optimizer.step()
    return loss.detach(), norm

  def wait(self) -> None:
    """Returns when the device is done."""
    if self._device == 'cuda':
      torch.cuda.synchronize()

  def peak_bytes(self) -> int | None:
    """The most the GPU has held; None without one."""
    if self._device == 'cpu':
      return None
    return torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def _products(precision: str):
  """'high' has a GPU use TF32 for float32; a CPU is always exact."""
  tf32 = precision == 'high'
  if torch.cuda.is_available():
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
  yield
