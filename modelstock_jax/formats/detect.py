"""The checkpoint at a path that a user names."""

from collections.abc import Mapping
import os
import pathlib
import re
from typing import Literal
from typing import NamedTuple

from modelstock_jax.formats import flax
from modelstock_jax.formats import hub
from modelstock_jax.formats import lora
from modelstock_jax.formats import npy
from modelstock_jax.formats import orbax
from modelstock_jax.formats import remote
from modelstock_jax.formats import runs
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text
from modelstock_jax.formats import torch

Tensors = Mapping[str, tensors_lib.Tensor]

ARRAYS = {'.msgpack': flax.read, '.npz': npy.read_archive}
_PICKLES = ('.npy', '.pkl', '.pickle')
# Files that a merged folder needs: config, tokenizer, code. Not the model card,
# which describes one model, nor what training has left.
_COMPANIONS = ('.json', '.txt', '.model', '.jinja', '.tiktoken', '.py')
_NO_COMPANIONS = re.compile(
  r'(trainer_state|(all|train|eval)_results|model_stock)\.json$|.*\.index\.json$'
)


class Location(NamedTuple):
  """A checkpoint's format, and the file or folder that holds its tensors."""

  format: Literal[
    'safetensors', 'torch', 'pickle', 'run', 'scenic', 'orbax', 'arrays', 'lora'
  ]
  path: pathlib.Path


class Checkpoint(NamedTuple):
  """A checkpoint on disk.

  Attributes:
    path: the file or folder.
    kind: 'file' or 'folder' (of safetensors, PyTorch, Flax or NumPy), 'run' (of
      this library), 'scenic', 'orbax', or 'lora' (an adapter of peft, whose
      tensors are the displacements of those of its base, or whole ones).
    tensors: by name, in the order of the files.
    metadata: texts that a safetensors file of the tensors has; of an adapter,
      what its base is.
    stem: of a folder, the name of its files: 'model'; of Orbax, where in
      `path` the item lies.
    companions: other files that a merged folder needs: config, tokenizer.
    averaged: names of what is averaged, not merged by its angle: running
      statistics.
  """

  path: pathlib.Path
  kind: str
  tensors: Tensors
  metadata: Mapping[str, str]
  stem: str = 'model'
  companions: tuple[pathlib.Path, ...] = ()
  averaged: frozenset[str] = frozenset()


def detect(path: text.PathLike) -> Location:
  """Find out what lies at a path, without reading weights.

  Args:
    path: a file of weights; a Hugging Face folder, of one file or several; the
      workdir of a run of this library or one of its checkpoints; a checkpoint
      of Scenic, or a workdir of such; an item of Orbax, a step, or the folder
      of the steps.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: it is of no known format.
  """
  path = hub.local_path(path)
  if path.is_dir():
    return _detect_in_folder(path)
  if path.suffix == '.safetensors' or path.name.endswith(safetensors.INDEX):
    return Location('safetensors', path)
  if path.suffix in torch.SUFFIXES or path.name.endswith(torch.INDEX):
    return Location('torch', path)
  if path.suffix in ARRAYS:
    return Location('arrays', path)
  if path.suffix in _PICKLES:
    return Location('pickle', path)
  if re.fullmatch(r'checkpoint_\d+', path.name):
    return Location('scenic', path)
  raise ValueError(
    f'{path} is of no known format: it is neither a .safetensors file, nor a '
    '.pt, .pth, .bin or .ckpt of PyTorch, nor a .msgpack of Flax, nor a .npz, '
    'nor a .npy of a CLIP, nor a checkpoint_<step> of Scenic, nor a folder.'
  )


def _detect_in_folder(path: pathlib.Path) -> Location:
  names = sorted(file.name for file in path.iterdir())
  # Editors lock files by hidden links to nowhere.
  if broken := [n for n in names if n[0] != '.' and not (path / n).exists()]:
    raise FileNotFoundError(
      f'{path}: {text.listed(broken)} are links to files that are not there. '
      'Download the model again.'
    )
  if lora.CONFIG in names:
    return Location('lora', path)
  stems = ('model', 'open_clip_model')
  config = path / 'config.json'
  if config.is_file() and b'"model_type"' not in config.read_bytes():
    stems = stems[::-1]  # it is of timm, or of a run: not of transformers
  if file := _weights(path, names, ('.safetensors',), safetensors.INDEX, stems):
    return Location('safetensors', file)
  if step := runs.find(path):
    return Location('run', step)
  if item := orbax.find(path):
    return Location('orbax', item)
  steps = [
    int(name.removeprefix('checkpoint_'))
    for name in names
    if re.fullmatch(r'checkpoint_\d+', name) and (path / name).is_file()
  ]
  if steps:
    return Location('scenic', path / f'checkpoint_{max(steps)}')
  stems = tuple(stem.replace('model', 'pytorch_model') for stem in stems)
  if file := _weights(path, names, torch.SUFFIXES, torch.INDEX, stems):
    return Location('torch', file)
  if file := _weights(path, names, (*ARRAYS,), '.msgpack', ('flax_model',)):
    return Location('arrays', file)
  if pickles := [name for name in names if name.endswith(_PICKLES)]:
    return Location('pickle', path / pickles[0])
  raise ValueError(
    f'{path} holds no weights: neither *.safetensors, nor checkpoints of a run '
    f'or of Scenic. There are {text.listed(names, most=20)}.'
  )


def _weights(
  path: pathlib.Path,
  names: list[str],
  suffixes: tuple[str, ...],
  index: str,
  stems: tuple[str, ...],
) -> pathlib.Path | None:
  """Return the file of weights in a folder, or the index of several.

  Args:
    path: the folder.
    names: of its files.
    suffixes: of files of weights.
    index: the end of the name of an index.
    stems: of the names that transformers or open_clip would take: the whole
      file, then its index.

  Raises:
    ValueError: there are several, and none has such a name.
  """
  files = [name for name in names if name.endswith(suffixes)]
  indices = [name for name in names if name.endswith(index)]
  known = [
    name
    for stem in stems
    for name in (f'{stem}{index.removesuffix(".index.json")}', stem + index)
    if name in names
  ]
  weights = known[:1] or indices or files
  shard = re.search(r'-of-0*(\d+)\.\w+$', weights[0] if weights else '')
  if shard:
    raise ValueError(
      f'{path} holds {len(files)} of {shard[1]} shards, and no *{index}, which '
      'names them. Copy the whole checkpoint.'
    )
  if len(weights) > 1:
    raise ValueError(
      f'{path} holds several sets of weights: {text.listed(indices + files)}. '
      'Name the file of weights, or keep one index.'
    )
  return safetensors.check_inside(path / weights[0]) if weights else None


def read(
  path: text.PathLike, select: str | None = None, *, replicas: bool = False
) -> Checkpoint:
  """Find the tensors of a checkpoint, and read none of them.

  Args:
    path: see `detect`; an id of the Hugging Face hub, with `@revision` or
      without; `BASE+ADAPTER`, a checkpoint with a LoRA adapter added to it; or
      the address of a checkpoint of Orbax or safetensors in a bucket, see
      `remote`.
    select: a regular expression; the tensors whose complete names it matches.
      None: all, and of Orbax, Flax and NumPy see `tensors.select`.
    replicas: see `tensors.select`.

  Raises:
    FileNotFoundError: there is nothing, or a file of it is missing.
    ValueError: it is of another format, a pickle of arrays, or not whole.
  """
  base, _, adapter = str(path).rpartition('+')
  if base and not os.path.exists(path):
    return selected(add(read(base), read(adapter), str(path)), select)
  url = remote.is_url(path) and str(path)
  path = remote.mirror(url) if url else hub.local_path(path)
  location = detect(path)
  if url and location.format not in ('orbax', 'safetensors'):
    raise ValueError(
      f'{url}: of buckets, only Orbax and safetensors are read. Copy it first.'
    )
  if location.format == 'orbax':
    tensors = orbax.read(location.path, select, replicas=replicas)
    inner = location.path.relative_to(path)
    return Checkpoint(path, 'orbax', tensors, {}, str(inner))
  checkpoint = _read(path, location)
  if select is None and location.format != 'arrays':
    return checkpoint
  return selected(checkpoint, select, replicas)


def add(base: Checkpoint, adapter: Checkpoint, path: str) -> Checkpoint:
  """Add a LoRA adapter to a checkpoint, whose other tensors stay the same.

  Args:
    base: the checkpoint.
    adapter: of kind 'lora'.
    path: of the result, for messages.

  Raises:
    ValueError: it is no adapter, or not one of this base.
  """
  if adapter.kind != 'lora':
    raise ValueError(f'{adapter.path} holds no LoRA adapter of peft to add.')
  with text.explained(f'{adapter.path} does not fit {base.path}. '):
    tensors = lora.add(base.tensors, adapter.tensors)
  return base._replace(path=pathlib.Path(path), tensors=tensors)


def selected(
  checkpoint: Checkpoint, select: str | None, replicas: bool = False
) -> Checkpoint:
  """Return a checkpoint of the tensors of `tensors.select`."""
  names = tensors_lib.select(
    str(checkpoint.path), checkpoint.tensors, select, replicas=replicas
  )
  tensors = {name: checkpoint.tensors[key] for name, key in names.items()}
  return checkpoint._replace(tensors=tensors)


def _read(path: pathlib.Path, location: Location) -> Checkpoint:
  form, source = location
  if form == 'pickle':
    raise ValueError(
      f'{source} is a pickle, which can run any code when it is read, and is '
      'not read here. Where you trust it, load it with the tool that wrote it '
      'and save it as safetensors (transformers: `save_pretrained`).'
    )
  if form == 'run':
    metadata = {'run': str(path), **runs.metadata(source)}
    return Checkpoint(source, form, runs.tensors(source), metadata)
  if form == 'scenic':
    return _read_scenic(source)
  if form == 'lora':
    tensors, metadata = lora.read(path)
    config = (path / lora.CONFIG,)
    return Checkpoint(path, form, tensors, metadata, companions=config)
  tensors, metadata = read_weights(location)
  if not path.is_dir():
    return Checkpoint(path, 'file', tensors, metadata)
  stem = pathlib.Path(source.name.removesuffix('.index.json')).stem
  if form != 'safetensors':
    stem = re.sub('(pytorch|flax)_model', 'model', stem)
  # Modules of sentence-transformers lie in folders such as 1_Pooling.
  inside = sorted([*path.iterdir(), *path.glob('[0-9]_*/*')])
  companions = tuple(
    safetensors.check_inside(file)
    for file in inside
    if file.is_file()
    and file.suffix in _COMPANIONS
    and not _NO_COMPANIONS.fullmatch(file.name)
  )
  for file in inside:
    if file.parent != path and file.suffix in ('.safetensors', '.bin'):
      raise ValueError(
        f'{file} would not be merged with {path}. Merge its folder by itself, '
        'and this one without it.'
      )
  return Checkpoint(path, 'folder', tensors, metadata, stem, companions)


def read_weights(
  location: Location, *, allow_pickle: bool = False
) -> tuple[Tensors, Mapping[str, str]]:
  """Find the tensors in a file of weights, and its metadata.

  Args:
    location: a file of safetensors or PyTorch, the index of such, or a `.npy`,
      `.npz` or `.msgpack`.
    allow_pickle: trust a `.npy`, which can run any code.

  Raises:
    FileNotFoundError: a file of an index is missing.
    ValueError: it is of another format, damaged, or a pickle of arrays.
  """
  form, path = location
  if form == 'lora':
    raise ValueError(
      f'{path} holds an adapter, not a model. Merge it into its base first '
      "(peft's merge_and_unload) and save that; `modelstock merge` alone takes "
      'adapters.'
    )
  if form == 'safetensors':
    return safetensors.read(path)
  if form == 'torch':
    # transformers reads a safetensors file only if it says this.
    return torch.read(path), {'format': 'pt'}
  if form == 'arrays':
    return ARRAYS[path.suffix](path), {}
  if path.suffix == '.npy':
    return npy.read(path, allow_pickle=allow_pickle), {}
  raise ValueError(
    f'{path} is of no known format: it is neither a folder nor a .pt, .npy or '
    '.safetensors file.'
  )


def _read_scenic(path: pathlib.Path) -> Checkpoint:
  # Older ones keep the parameters in the optimizer.
  arrays = {
    re.sub('^optimizer/target/(params/)?', 'params/', name): tensor
    for name, tensor in flax.read(path).items()
  }
  tensors = {
    name: tensor
    for name, tensor in arrays.items()
    if name.startswith(('params/', 'model_state/'))
  }
  if not any(name.startswith('params/') for name in tensors):
    keys = sorted({name.split('/')[0] for name in arrays})
    raise ValueError(
      f'{path} is not a checkpoint of Scenic: it has no params. It holds '
      f'{text.listed(keys)}.'
    )
  averaged = frozenset(n for n in tensors if n.startswith('model_state/'))
  return Checkpoint(path, 'scenic', tensors, {}, averaged=averaged)
