"""The training step that others have: torch, and the CLIP of transformers.

The loss, optimizer and precision of ours: float32 weights, moments and head,
products of the tower in bfloat16 by autocast, attention by
`scaled_dot_product_attention`, fused AdamW, decay on every tensor, gradients
clipped to a global norm. float32 products on a GPU are TF32 in both.
"""

from collections.abc import Callable
import pathlib
from typing import Any

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


def row(
  folder: str, batch: dict[str, np.ndarray], dtype: str, compiled: bool
) -> Callable[[], tuple[Any, Any]]:
  """Return the row of one model, on the GPU if there is one; see `step.Row`.

  Args:
    folder: of `clip.save_pretrained`, with a head.
    batch: 'image' uint8[B, H, W, C] and 'label' int32[B].
    dtype: 'bfloat16' or 'float32', of the products.
    compiled: by `torch.compile`.
  """
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.allow_tf32 = True
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = Classifier(folder).to(device).train()
  forward: Any = torch.compile(model) if compiled else model
  images = torch.from_numpy(batch['image']).to(device)
  labels = torch.from_numpy(batch['label']).long().to(device)
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=programs.LEARNING_RATE,
    weight_decay=programs.WEIGHT_DECAY,
    fused=True,
  )
  half = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')

  def step():
    with half:
      logits = forward(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      model.parameters(), programs.CLIP_NORM
    )
    optimizer.step()
    return [loss.detach()], [norm]

  return step


def peak_bytes() -> int:
  """Return the most memory the GPU has held; 0 without one."""
  return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
