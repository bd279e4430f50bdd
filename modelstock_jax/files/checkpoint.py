"""What lies at a path that a user names: the tensors of a checkpoint."""

from collections.abc import Mapping
import json
import os
import pathlib
import re
from typing import NamedTuple

from modelstock_jax.files import msgpack_file
from modelstock_jax.files import safetensors_file
from modelstock_jax.files import stored as stored_lib

PathLike = str | os.PathLike[str]
Tensors = Mapping[str, stored_lib.Stored]

INDEX = '.safetensors.index.json'
PICKLES = ('.bin', '.pt', '.pth', '.npy', '.pkl', '.ckpt', '.pickle')
# Beside the weights: config, tokenizer, code. Not the model card, which tells
# of one model, nor what training has left.
_BESIDE = ('.json', '.txt', '.model', '.jinja', '.tiktoken', '.py')
_NOT_BESIDE = re.compile(
  r'(trainer_state|(all|train|eval)_results|model_stock)\.json$|.*\.index\.json$'
)


class Checkpoint(NamedTuple):
  """A checkpoint on disk.

  Attributes:
    path: the file or folder.
    kind: 'file' or 'folder' (of safetensors), 'run' (of this library), or
      'scenic'.
    tensors: by name, in the order of the files.
    metadata: texts of the first safetensors file.
    stem: of a folder, the name of its files: 'model'.
    beside: files that a merged folder needs as well: config, tokenizer.
    averaged: names of what is averaged, not merged by its angle: running
      statistics.
  """

  path: pathlib.Path
  kind: str
  tensors: Tensors
  metadata: Mapping[str, str]
  stem: str = 'model'
  beside: tuple[pathlib.Path, ...] = ()
  averaged: frozenset[str] = frozenset()


def read(path: PathLike) -> Checkpoint:
  """Finds the tensors of a checkpoint, and reads none of them.

  Args:
    path: a safetensors file; a Hugging Face folder, of one file or several;
      the workdir of a run of this library or one of its checkpoints; a
      checkpoint of Scenic, or a workdir of such.

  Raises:
    FileNotFoundError: there is nothing, or a file of it is missing.
    ValueError: it is of another format, a pickle, or not whole.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    hub = ''
    if re.fullmatch(r'[\w.-]+/[\w.-]+', str(path)):
      hub = f' If it is on the hub: `hf download {path} --local-dir FOLDER`.'
    raise FileNotFoundError(f'{path}: there is no such file or folder.{hub}')
  if path.is_dir():
    return _folder(path)
  if path.suffix == '.safetensors':
    tensors, metadata = safetensors_file.read(path)
    return Checkpoint(path, 'file', tensors, metadata)
  if path.suffix in PICKLES:
    raise _pickle(path)
  if re.fullmatch(r'checkpoint_\d+', path.name):
    return _scenic(path)
  raise ValueError(
    f'{path} is of no known format: it is neither a .safetensors file, nor a '
    'checkpoint_<step> of Scenic, nor a folder.'
  )


def _folder(path: pathlib.Path) -> Checkpoint:
  indices = sorted(path.glob(f'*{INDEX}'))
  files = sorted(path.glob('*.safetensors'))
  # What transformers would take: the whole file, then its index.
  if path / 'model.safetensors' in files:
    indices, files = [], [path / 'model.safetensors']
  elif path / f'model{INDEX}' in indices:
    indices = [path / f'model{INDEX}']
  if (path / 'adapter_config.json').exists():
    raise ValueError(
      f'{path} holds an adapter, not a model. Merge it into its base first '
      "(peft's merge_and_unload) and save that."
    )
  if len(indices) == 1:
    return _sharded(path, indices[0])
  if not indices and len(files) == 1:
    tensors, metadata = safetensors_file.read(_inside(path, files[0]))
    stem = files[0].name.removesuffix('.safetensors')
    return Checkpoint(path, 'folder', tensors, metadata, stem, _beside(path))
  if indices or files:
    names = [file.name for file in (*indices, *files)]
    raise ValueError(
      f'{path} holds several sets of weights: {names[:8]}. Name the '
      '.safetensors file, or keep one index.'
    )
  if (path / 'checkpoints').is_dir() or path.parent.name == 'checkpoints':
    run = _run(path)
    if run is not None:
      return run
  scenic = [
    (int(found[1]), file)
    for file in path.glob('checkpoint_*')
    if (found := re.fullmatch(r'checkpoint_(\d+)', file.name))
    and file.is_file()
  ]
  if scenic:
    return _scenic(max(scenic)[1])
  pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
  if pickles:
    raise _pickle(pickles[0])
  names = sorted(file.name for file in path.iterdir())
  raise ValueError(
    f'{path} holds no weights: neither *.safetensors, nor checkpoints of a run '
    f'or of Scenic. There are {names[:20]}.'
  )


def _sharded(path: pathlib.Path, index: pathlib.Path) -> Checkpoint:
  try:
    files = json.loads(index.read_text('utf-8'))['weight_map']
    bare = all(pathlib.PurePath(file).name == file for file in files.values())
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ValueError(
      f"{index} is not an index of safetensors: it takes 'weight_map', names "
      f'of tensors to files ({error!r}).'
    ) from error
  if not bare:
    away = [f for f in files.values() if pathlib.PurePath(f).name != f]
    raise ValueError(
      f'{index} names files outside its own folder: {sorted(set(away))}. Do '
      'not use it unless you know who wrote it.'
    )
  tensors: dict[str, stored_lib.Stored] = {}
  metadata: dict[str, str] = {}
  for file in sorted(set(files.values())):
    if not (path / file).is_file():
      raise FileNotFoundError(
        f'{index} names {file}, which is not there. Copy the checkpoint again.'
      )
    found, more = safetensors_file.read(_inside(path, path / file))
    metadata = metadata or more
    tensors |= {n: t for n, t in found.items() if files.get(n) == file}
  absent = sorted(files.keys() - tensors.keys())
  if absent:
    raise ValueError(
      f'{index} names tensors that its files do not hold: {absent[:8]} '
      f'({len(absent)} of them). Copy the checkpoint again.'
    )
  stem = index.name.removesuffix(INDEX)
  return Checkpoint(path, 'folder', tensors, metadata, stem, _beside(path))


def _inside(folder: pathlib.Path, file: pathlib.Path) -> pathlib.Path:
  """The file, if it lies in its folder or in the cache that links to it."""
  target, home = file.resolve(), folder.resolve()
  # <cache>/models--a--b/snapshots/<commit> links to <cache>/models--a--b/blobs.
  blobs = home.parent.parent / 'blobs'
  cached = home.parent.name == 'snapshots' and target.parent == blobs
  if target.parent != home and not cached:
    raise ValueError(
      f'{file} is a link to {target}, outside its folder. Put the file itself '
      'there if you trust it.'
    )
  return file


def _beside(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
  return tuple(
    _inside(path, file)
    for file in sorted(path.iterdir())
    if file.is_file()
    and file.suffix in _BESIDE
    and not _NOT_BESIDE.fullmatch(file.name)
  )


def _run(path: pathlib.Path) -> Checkpoint | None:
  """A run of this library, where there is one."""
  from modelstock_jax.clip import runs

  step = runs.find(path)
  if step is None:
    return None
  tensors = {
    name: stored_lib.in_memory(
      shape, dtype, load, filters=max(len(shape) - 1, 0)
    )
    for name, (shape, dtype, load) in runs.merged_tensors(step).items()
  }
  return Checkpoint(step, 'run', tensors, {'run': str(path)})


def _scenic(path: pathlib.Path) -> Checkpoint:
  found = msgpack_file.arrays(path)
  tensors = {
    name: tensor
    for name, tensor in found.items()
    if name.startswith(('params/', 'model_state/'))
  }
  if not any(name.startswith('params/') for name in tensors):
    raise ValueError(
      f'{path} is not a checkpoint of Scenic: it has no params. It holds '
      f'{sorted({name.split("/")[0] for name in found})}.'
    )
  averaged = frozenset(n for n in tensors if n.startswith('model_state/'))
  return Checkpoint(path, 'scenic', tensors, {}, averaged=averaged)


def _pickle(path: pathlib.Path) -> ValueError:
  return ValueError(
    f'{path} is a pickle, which can run any code when it is read, and is not '
    'read here. Where you trust it, load it with the tool that wrote it and '
    'save it as safetensors (transformers: `save_pretrained`).'
  )
