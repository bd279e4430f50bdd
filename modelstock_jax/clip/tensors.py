"""The tensors of a checkpoint file, read one at a time whatever its format."""

from collections.abc import Callable
import json
import os
import pathlib
from typing import Any
from typing import NamedTuple
import warnings
import zipfile

import numpy as np

from modelstock_jax.clip import weights

PathLike = str | os.PathLike[str]


class Tensors(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    shapes: by name.
    dtypes: by name, such as 'float16'.
    read: name -> the tensor. It is not kept: only the caller holds it.
  """

  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, str]
  read: Callable[[str], np.ndarray]


def from_safetensors(path: PathLike) -> Tensors:
  """A safetensors file, or the index of several: '*.safetensors.index.json'.

  Raises:
    FileNotFoundError: the file, or one that the index names, is not there.
    ValueError: a file is damaged, or the index names tensors that are not in
      its files.
  """
  path = pathlib.Path(path)
  if path.suffix != '.json':
    shapes, dtypes = _header(path)
    return Tensors(shapes, dtypes, lambda name: _read(path, name))
  files = _index(path)
  shapes, dtypes = {}, {}
  for file in sorted(set(files.values())):
    more = _header(path.parent / file)
    shapes.update(more[0])
    dtypes.update(more[1])
  absent = sorted(files.keys() - shapes.keys())
  if absent:
    raise ValueError(
      f'{path} names tensors that its files do not hold: {absent}. Copy the '
      'checkpoint again.'
    )
  listed = {name: path.parent / file for name, file in files.items()}
  return Tensors(
    {name: shapes[name] for name in listed},
    {name: dtypes[name] for name in listed},
    lambda name: _read(listed[name], name),
  )


def from_torch(path: PathLike) -> Tensors:
  """A PyTorch archive: TorchScript, as OpenAI's, or a saved state dict.

  No Python code of the file is run: TorchScript brings none along, and state
  dicts are read with `weights_only=True`.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: torch is not installed.
    ValueError: it is not an archive, or holds something else than tensors.
  """
  path = weights.existing(path)
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
  with zipfile.ZipFile(path) as archive:
    scripted = any(
      name.endswith('/constants.pkl') for name in archive.namelist()
    )
  try:
    with warnings.catch_warnings():
      # Newer versions of torch say that TorchScript is old: so are the files.
      warnings.simplefilter('ignore')
      if scripted:
        found = torch.jit.load(str(path), map_location='cpu').state_dict()
      else:
        found = torch.load(
          path, map_location='cpu', weights_only=True, mmap=True
        )
  except Exception as error:  # of many kinds: pickle, zip, C++
    cause = str(error).strip().split('\n')[0]
    raise ValueError(
      f'{path} cannot be read as weights alone: {cause}'
    ) from error
  found = _state_dict(found)
  if found is None:
    raise ValueError(f'{path} does not hold a state dict of tensors.')
  return Tensors(
    {name: tuple(tensor.shape) for name, tensor in found.items()},
    {name: str(tensor.dtype).split('.')[-1] for name, tensor in found.items()},
    lambda name: _numpy(found[name]),
  )


def from_pickled_npy(path: PathLike, *, allow_pickle: bool) -> Tensors:
  """A pickled dict of arrays, as Scenic keeps OpenAI's weights.

  Args:
    path: the `.npy` file.
    allow_pickle: unpickling a file can run any code that its author put
      there; True says that it is trusted.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: `allow_pickle` is False, or the file holds something else.
  """
  path = weights.existing(path)
  if not allow_pickle:
    raise ValueError(
      f'{path} is a pickle, which can run any code when it is read. If you '
      'trust where it comes from, pass allow_pickle=True (--allow-pickle; of a '
      'run --config.anchor.allow_pickle=true).'
    )
  try:
    found = np.load(path, allow_pickle=True).item()
  except Exception as error:  # pickle raises whatever it likes
    raise ValueError(
      f'{path} is not a whole .npy file of a dict of arrays: {error}'
    ) from error
  if not isinstance(found, dict) or not all(
    isinstance(array, np.ndarray | np.generic) for array in found.values()
  ):
    raise ValueError(f'{path} does not hold a dict of arrays by name.')
  return Tensors(
    {name: array.shape for name, array in found.items()},
    {name: array.dtype.name for name, array in found.items()},
    lambda name: np.asarray(found[name]),
  )


def _header(
  path: pathlib.Path,
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
  with weights.open_safetensors(path) as file:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return (
      {name: tuple(s.get_shape()) for name, s in slices.items()},
      {name: weights.dtype_name(s) for name, s in slices.items()},
    )


def _read(path: pathlib.Path, name: str) -> np.ndarray:
  # The file is opened for every tensor, because the pages of one that stays
  # open stay in memory: twice the checkpoint in the end.
  with weights.open_safetensors(path) as file:
    return file.get_tensor(name)


def _index(path: pathlib.Path) -> dict[str, str]:
  try:
    files = json.loads(weights.existing(path).read_text('utf-8'))['weight_map']
    bare = all(pathlib.PurePath(file).name == file for file in files.values())
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ValueError(
      f"{path} is not an index of safetensors: it takes 'weight_map', names "
      f'of tensors to files ({error!r}).'
    ) from error
  if not bare:
    raise ValueError(f'{path} names files outside its own folder.')
  return files


def _state_dict(found: Any) -> dict[str, Any] | None:
  """The tensors in what a training script saved, by their own names."""
  import torch

  if isinstance(found, dict) and isinstance(found.get('state_dict'), dict):
    found = found['state_dict']
  if not isinstance(found, dict) or not found:
    return None
  if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
    return None
  # DistributedDataParallel puts 'module.' before every name.
  return {name.removeprefix('module.'): t for name, t in found.items()}


def _numpy(tensor: Any) -> np.ndarray:
  import torch

  tensor = tensor.detach()
  if tensor.dtype == torch.bfloat16:  # numpy has none; float32 holds it
    tensor = tensor.float()
  return tensor.numpy()
