"""Pretrained CLIPs in the formats of several tools."""

import dataclasses
import math
import pathlib
import re
from typing import Any
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import config_files
from modelstock_jax.clip import layouts
from modelstock_jax.clip import model as clip_model
from modelstock_jax.clip import weights
from modelstock_jax.formats import compare
from modelstock_jax.formats import detect
from modelstock_jax.formats import runs
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text as text_lib

Params = Any


class Pretrained(NamedTuple):
  """A CLIP with its weights.

  Attributes:
    model: the functions; `model.config` has the sizes.
    params: {'image': ..., 'text': ..., 'logit_scale': float32[]}, nested
      dicts of float32. Where there is an image tower alone, 'image' only; of
      a training run 'image' and the classification 'head'.
  """

  model: clip_model.CLIP
  params: Params


def load_pretrained(
  path: text_lib.PathLike,
  *,
  shardings: Any = None,
  image_size: int | None = None,
  allow_pickle: bool = False,
) -> Pretrained:
  """Read a CLIP with a vision transformer in any of several formats.

  `path` may be, by the tool that wrote it:

  * Hugging Face: a folder with `config.json` and `model.safetensors`,
    `pytorch_model.bin`, or the index of such; or the id of a model on the hub.
  * open_clip: a folder with `open_clip_config.json` and
    `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`.
  * OpenAI: a `.pt` archive.
  * Scenic: a `.npy` of its CLIP project, with `allow_pickle=True`.
  * This library: a `.safetensors` file, the workdir of a training run, or one
    of its checkpoints.

  None needs torch. Tensors are read one at a time, turned into float32 and
  placed, so that no second copy of the weights is held.

  Args:
    path: see above.
    shardings: where the params go: a `jax.sharding.Sharding`, or a prefix
      tree of them as in `jax.jit(out_shardings=...)`. None is the first
      device.
    image_size: of the images that the tower is to take, in pixels, where it
      is not what the checkpoint was made for. Positional embeddings are
      resized (bicubic, antialiased, as open_clip does).
    allow_pickle: trust a `.npy`, a pickle that can run any code.

  Returns:
    A `Pretrained`. Embeddings of its `model.encode_image(params, images)`
    and `model.encode_text(params, tokens)` are not normalised.

  Raises:
    FileNotFoundError: there is no such file, and no such model on the hub.
    ValueError: the format is not one of these, a file is damaged, or its
      tensors are not those of its config: all that are missing,
      extra, of another shape or not finite are listed.

  >>> from modelstock_jax.training import anchor
  >>> model, params = load_pretrained(anchor.SHIPPED / 'mini_clip.safetensors')
  >>> model.encode_image(params, jnp.zeros((1, 8, 8, 1))).shape
  (1, 48)
  """
  path = local_path(path)
  source = _recognise(path, allow_pickle)
  config = source.config
  if source.layout is None:
    if image_size not in (None, config.vision.image_size):
      raise ValueError(
        f'image_size={image_size}: a run keeps the size that it was trained '
        f'with, {config.vision.image_size}. Resize what it started from.'
      )
    params = runs.read(source.path, shardings=shardings)
    return Pretrained(clip_model.create(config), params)
  if image_size is not None:
    vision = dataclasses.replace(config.vision, image_size=image_size)
    config = dataclasses.replace(config, vision=vision)
  model = clip_model.create(config)
  return Pretrained(model, _read(path, source, model, shardings))


def read_config(
  path: text_lib.PathLike, *, allow_pickle: bool = False
) -> clip_config.CLIPConfig:
  """Read the sizes of a CLIP without its weights.

  Args:
    path: as `load_pretrained`.
    allow_pickle: as `load_pretrained`.

  Returns:
    The sizes; a run has no text tower.

  Raises:
    FileNotFoundError, ValueError: as `load_pretrained`.
  """
  return _recognise(local_path(path), allow_pickle).config


class _Source(NamedTuple):
  path: pathlib.Path  # of the file that states the config; of a run, the step
  config: clip_config.CLIPConfig  # that the checkpoint was made for
  layout: layouts.Layout | None  # None of a run, which writes what it reads
  tensors: detect.Tensors


def _recognise(path: pathlib.Path, allow_pickle: bool) -> _Source:
  """Find the config and the tensors of a checkpoint."""
  location = detect.detect(path)
  if location.format == 'run':
    config = clip_config.from_dict(runs.read_model(location.path))
    config = dataclasses.replace(config, text=None)
    return _Source(location.path, config, None, {})
  tensors, metadata = detect.read_weights(location, allow_pickle=allow_pickle)
  stated = file = location.path
  if path.is_dir():  # which may hold the files of both tools
    configs = [path / 'config.json', path / 'open_clip_config.json']
    if file.name.startswith('open_clip_'):
      configs.reverse()
    stated = next((c for c in configs if c.is_file()), file)
  layout: layouts.Layout = 'openai'
  # JSON may hold anything anywhere.
  with text_lib.explained(f'{stated}: ', kinds=Exception):
    if stated.name == 'config.json':
      layout = 'huggingface'
      config = config_files.from_huggingface(text_lib.read_json(stated))
    elif stated.name == 'open_clip_config.json':
      content = text_lib.read_json(stated)
      config = config_files.from_open_clip(content['model_cfg'])
    elif 'model' in metadata:
      layout = 'ours'
      config = clip_config.from_dict(text_lib.parse_json(metadata['model']))
    elif file.suffix in ('.safetensors', '.json'):
      raise ValueError(
        'it does not state the sizes of its network. Pass the folder, with its '
        'config.json or open_clip_config.json.'
      )
    else:
      shapes = {name: tensor.shape for name, tensor in tensors.items()}
      config = config_files.from_openai_shapes(shapes)
  return _Source(stated, config, layout, tensors)


def _read(
  path: pathlib.Path, source: _Source, model: clip_model.CLIP, shardings: Any
) -> Params:
  """Read and place the leaves of a CLIP, one tensor at a time."""
  entries = _checked_entries(path, source)
  like = jax.eval_shape(model.init, jax.random.key(0))
  full = jax.tree.broadcast(shardings, like, is_leaf=lambda x: x is None)
  places = dict(weights.flatten(full))
  leaves: dict[str, jax.Array] = {}
  broken = []
  # The largest first: its temporary copies are freed before most of the
  # weights are placed.
  for entry in sorted(entries, key=lambda e: -math.prod(e.shape)):
    tensor = source.tensors[entry.name].load().astype(np.float32, copy=False)
    # The sum of a finite tensor may overflow, its extremes do not.
    if not np.isfinite([tensor.min(), tensor.max()]).all():
      count = np.sum(~np.isfinite(tensor))
      broken.append(f'{entry.name}: {count} of {tensor.size} values')
      continue
    parts = layouts.split(entry, tensor)
    for name, leaf in zip(entry.leaves, parts, strict=True):
      if name == 'image/positional_embedding':
        leaf = _resize(leaf, model.config.vision.tokens)
      leaf, place = np.asarray(leaf, order='C'), places.get(name)
      if place is None:
        leaves[name] = jnp.asarray(leaf)
      else:  # each process places its part: none is sent, nor compared
        leaves[name] = jax.make_array_from_callback(
          leaf.shape, place, leaf.__getitem__
        )
    del tensor, parts, leaf
  text_lib.raise_problems(
    f'{path}: weights are not finite. Get the checkpoint again, or one of an '
    'earlier step.',
    broken,
  )
  ordered = [leaves[name] for name, _ in weights.flatten(like)]
  return jax.tree.unflatten(jax.tree.structure(like), ordered)


def _checked_entries(
  path: pathlib.Path, source: _Source
) -> list[layouts.Entry]:
  """Return the tensors that the config takes, if they are those stored."""
  # Before a network of these sizes is built.
  config = source.config
  depth = config.vision.depth + (config.text.depth if config.text else 0)
  if depth > len(source.tensors):
    raise ValueError(
      f'{source.path} describes {depth} blocks, the weights are '
      f'{len(source.tensors)} tensors: they are not those of its config. Copy '
      'both from one checkpoint.'
    )
  assert source.layout is not None
  entries = layouts.entries(config, source.layout)
  stored = {
    name: tensor
    for name, tensor in source.tensors.items()
    if name.split('.')[-1] not in layouts.CONSTANTS
  }
  # Whatever their floating dtype, they become float32.
  wanted = {entry.name: entry for entry in entries}
  problems = compare.differences(wanted, stored, dtypes=False)
  problems += [
    f'{name}: is {tensor.dtype.name}, must be one of {tensors_lib.FLOATING}'
    for name, tensor in stored.items()
    if not tensor.floating
  ]
  text_lib.raise_problems(
    f'{path}: the tensors are not those of its config, {config}. Copy both '
    'from one checkpoint.',
    problems,
  )
  return entries


def _resize(embedding: np.ndarray, tokens: int) -> np.ndarray:
  """Resize the grid of positional embeddings; the class token's stays."""
  if len(embedding) == tokens:
    return embedding
  old, new = (round((count - 1) ** 0.5) for count in (len(embedding), tokens))
  width = embedding.shape[1]
  grid = jax.image.resize(
    embedding[1:].reshape(old, old, width), (new, new, width), 'bicubic'
  )
  return np.concatenate([embedding[:1], np.reshape(grid, (-1, width))])


# Suffixes of files, which are no ids of the hub.
_FILES = ('.safetensors', '.pt', '.pth', '.bin', '.npy')


def local_path(path: text_lib.PathLike) -> pathlib.Path:
  """Return a path, or that of the local copy of a model of the hub.

  Args:
    path: a file, a folder, or the id of a model on the Hugging Face hub, which
      is downloaded if it has not been.

  Raises:
    FileNotFoundError: there is no such file, and no such model on the hub.
  """
  local = pathlib.Path(path).expanduser()
  if local.exists():
    return local
  absent = f'{path}: there is no such file or folder'
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', str(path)) or local.suffix in _FILES:
    raise FileNotFoundError(f'{absent}.')
  import huggingface_hub

  try:
    # Many hold the same weights in several formats: one is enough.
    for weights_name in (
      'model*.safetensors',
      'open_clip_model.safetensors',
      'pytorch_model*.bin',
    ):
      patterns = ['*.json', 'merges.txt', weights_name]
      local = pathlib.Path(
        huggingface_hub.snapshot_download(str(path), allow_patterns=patterns)
      )
      if any(local.glob(weights_name)):
        break
    return local
  except Exception as error:  # of the network, and of every layer above it
    raise FileNotFoundError(
      f'{absent}, and the Hugging Face hub did not give a model of that id '
      f'({text_lib.plain(text_lib.line(error))}).'
    ) from error
