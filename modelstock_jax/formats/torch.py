"""PyTorch archives: TorchScript, as OpenAI's, or saved state dicts."""

import os
from typing import Any
import warnings
import zipfile

import numpy as np

from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

PathLike = str | os.PathLike[str]


def read(path: PathLike) -> dict[str, tensors_lib.Tensor]:
  """Read the tensors of an archive, by name.

  No Python code of the file is run: TorchScript brings none along, and state
  dicts are read with `weights_only=True`.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: torch is not installed.
    ValueError: it is not an archive, or holds something else than tensors.
  """
  path = text.existing_file(path)
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f'{path} is not a PyTorch archive (a zip file). If it was saved by '
      'torch < 1.6, save its state dict again with a newer one; if it broke '
      'off, copy it again.'
    )
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f'{path} can be read with torch only, which is not installed: '
      '`pip install torch` (or a CPU build of it), or use the same weights '
      'in safetensors.'
    ) from error
  try:
    with zipfile.ZipFile(path) as archive:
      scripted = any(
        name.endswith('/constants.pkl') for name in archive.namelist()
      )
    with warnings.catch_warnings():
      # Newer versions of torch say that TorchScript is old: so are the files.
      warnings.simplefilter('ignore')
      if scripted:
        content = torch.jit.load(str(path), map_location='cpu').state_dict()
      else:
        content = torch.load(
          path, map_location='cpu', weights_only=True, mmap=True
        )
  except Exception as error:  # of many kinds: pickle, zip, C++
    cause = text.plain(str(error).strip().split('\n')[0])
    raise ValueError(
      f'{path} cannot be read as weights alone: {cause}'
    ) from error
  if isinstance(content, dict) and isinstance(content.get('state_dict'), dict):
    content = content['state_dict']  # of a training script
  if (
    not isinstance(content, dict)
    or not content
    or not all(isinstance(name, str) for name in content)
    or not all(isinstance(x, torch.Tensor) for x in content.values())
  ):
    raise ValueError(f'{path} does not hold a state dict of tensors.')
  # DistributedDataParallel puts 'module.' before every name.
  return {name.removeprefix('module.'): _of(x) for name, x in content.items()}


def _of(tensor: Any) -> tensors_lib.Tensor:
  import torch

  name = str(tensor.dtype).split('.')[-1]
  # No numpy dtype has the name of a quantised one.
  dtype = tensors_lib.DTYPES.get(name, np.dtype(object))

  def load() -> np.ndarray:
    array = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # torch gives numpy none
      return array.contiguous().view(torch.int16).numpy().view(dtype)
    return array.numpy()

  return tensors_lib.Tensor(tuple(tensor.shape), dtype, load)
