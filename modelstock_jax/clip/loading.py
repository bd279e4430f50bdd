"""Pretrained CLIPs in the formats of several tools."""

import dataclasses
import logging
import math
import pathlib
import re
from typing import Any
from typing import NamedTuple

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import config_files
from modelstock_jax.clip import layouts
from modelstock_jax.clip import model as clip_model
from modelstock_jax.clip import saving
from modelstock_jax.clip import weights
from modelstock_jax.formats import compare
from modelstock_jax.formats import detect
from modelstock_jax.formats import hub
from modelstock_jax.formats import runs
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text as text_lib

Params = Any

# Names of weights in a folder of Hugging Face, open_clip or `save_pretrained`.
_NAMES = re.compile(r'(open_clip_)?(pytorch_)?model\.[\w.]+|clip\.npy')
# What classifiers that keep the image tower keep of OpenAI's text tower.
_TEXT = re.compile('(positional|token)_emb|text_proj|ln_final|logit_scale')
# The widest of OpenAI's towers, and of open_clip's with heads of 64 features.
_WIDEST = 1024

_log = logging.getLogger(__name__)


class Pretrained(NamedTuple):
  """A CLIP with its weights.

  Attributes:
    model: the functions; `model.config` has the sizes.
    params: {'image': ..., 'text': ..., 'logit_scale': float32[]}, nested
      dicts of float32. Where there is an image tower alone, 'image' only. The
      classification 'head' {'kernel': [D, K], 'bias': [K]} if there is one,
      as of a training run.
  """

  model: clip_model.CLIP
  params: Params


def load_pretrained(
  path: text_lib.PathLike,
  *,
  shardings: Any = None,
  image_size: int | None = None,
  allow_pickle: bool = False,
  activation: clip_config.Activation | None = None,
) -> Pretrained:
  """Read a CLIP with a vision transformer in any of several formats.

  `path` may be, by the tool that wrote it:

  * Hugging Face: a folder with `config.json` and `model.safetensors`,
    `pytorch_model.bin`, or the index of such; or the id of a model on the hub.
  * open_clip: a folder with `open_clip_config.json` and
    `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`.
  * OpenAI: a `.pt` archive.
  * Model Soups, WiSE-FT and Model Stock: a state dict whose names begin with
    `visual.` and `classification_head.`, perhaps after prefixes of wrappers. It
    is OpenAI's tower, with QuickGELU.
  * Any state dict of OpenAI's names, as open_clip's training writes it, with
    `activation`.
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
    activation: of the MLPs, 'quick_gelu' or 'gelu', for a state dict; not used
      where the checkpoint states it.

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
  path = hub.local_path(path)
  source = _recognise(path, allow_pickle, activation)
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
  path: text_lib.PathLike,
  *,
  allow_pickle: bool = False,
  activation: clip_config.Activation | None = None,
) -> clip_config.CLIPConfig:
  """Read the sizes of a CLIP without its weights.

  Args:
    path: as `load_pretrained`.
    allow_pickle: as `load_pretrained`.
    activation: as `load_pretrained`.

  Returns:
    The sizes; a run has no text tower.

  Raises:
    FileNotFoundError, ValueError: as `load_pretrained`.
  """
  return _recognise(hub.local_path(path), allow_pickle, activation).config


class _Source(NamedTuple):
  path: pathlib.Path  # of the file that states the config; of a run, the step
  config: clip_config.CLIPConfig  # that the checkpoint was made for
  layout: layouts.Layout | None  # None of a run, which writes what it reads
  tensors: detect.Tensors

  @property
  def num_classes(self) -> int | None:
    """Outputs of the classification head; None without one."""
    names = {'classification_head.bias', 'head/bias'} & self.tensors.keys()
    return self.tensors[names.pop()].size if names else None


def folder_of(path: pathlib.Path) -> pathlib.Path | None:
  """Return the folder whose other files belong to weights; None without one.

  Args:
    path: a folder, or a file, which has one if a tool names it so.
  """
  if path.is_dir():
    return path
  return path.parent if _NAMES.fullmatch(path.name) else None


def read_pixels(
  path: pathlib.Path, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Return the mean and std of pixels that weights state, else CLIP's.

  Args:
    path: a folder or a file.
    channels: of an image.

  Raises:
    ValueError: they cannot be read, or are of other channels.
  """
  with text_lib.explained(
    f'{path}: the mean and std of pixels that it states cannot be read: ',
    kinds=(ValueError, TypeError, AttributeError),
  ):
    stated = _stated_pixels(path)
    mean = tuple(map(float, stated.get('mean') or saving.MEAN))
    std = tuple(map(float, stated.get('std') or saving.STD))
  if not len(mean) == len(std) == channels:
    raise ValueError(
      f'{path}: mean {mean} and std {std} of pixels are not those of images '
      f'with {channels} channels. State them in preprocessor_config.json '
      '(image_mean, image_std) next to the weights.'
    )
  return mean, std


def _stated_pixels(path: pathlib.Path) -> dict[str, Any]:
  """Return 'mean' and 'std' as far as a checkpoint states them."""
  folder = folder_of(path)
  if folder and (folder / 'preprocessor_config.json').is_file():
    stated = text_lib.read_json(folder / 'preprocessor_config.json')
    return {name: stated.get(f'image_{name}') for name in ('mean', 'std')}
  if folder and (folder / 'open_clip_config.json').is_file():
    stated = text_lib.read_json(folder / 'open_clip_config.json')
    return stated.get('preprocess_cfg') or {}
  if path.suffix == '.safetensors':  # as training.pretrain writes it
    return text_lib.parse_json(weights.read_metadata(path).get('pixels', '{}'))
  return {}


def _recognise(
  path: pathlib.Path,
  allow_pickle: bool,
  activation: clip_config.Activation | None,
) -> _Source:
  """Find the config and the tensors of a checkpoint."""
  location = detect.detect(path)
  if location.format == 'run':
    config = clip_config.from_dict(runs.read_model(location.path))
    config = dataclasses.replace(config, text=None)
    return _Source(location.path, config, None, {})
  tensors, metadata = detect.read_weights(location, allow_pickle=allow_pickle)
  plain = tensors_lib.unwrapped(tensors)
  tensors = {plain[name]: tensor for name, tensor in tensors.items()}
  stated = file = location.path
  if folder := folder_of(path):  # which may hold the files of both tools
    configs = [folder / 'config.json', folder / 'open_clip_config.json']
    if file.name.startswith('open_clip_'):
      configs.reverse()
    stated = next((c for c in configs if c.is_file()), file)
  layout: layouts.Layout = 'openai'
  # JSON may hold anything anywhere.
  with text_lib.explained(f'{stated}: ', kinds=Exception):
    if 'model' in metadata:
      layout = 'ours'
      config = clip_config.from_dict(text_lib.parse_json(metadata['model']))
    elif stated.name == 'config.json':
      layout = 'huggingface'
      config = config_files.from_huggingface(text_lib.read_json(stated))
      if 'visual_projection.weight' not in tensors:
        raise ValueError(
          f'{file.name} has no visual_projection. Save a CLIPModel or '
          'CLIPVisionModelWithProjection, whose embeddings are of one space; '
          'or name the file of other weights in the folder.'
        )
    elif stated.name == 'open_clip_config.json':
      content = text_lib.read_json(stated)
      config = config_files.from_open_clip(content['model_cfg'])
    else:
      config, tensors = _of_state_dict(file, tensors, activation)
  return _Source(stated, config, layout, tensors)


def _of_state_dict(
  file: pathlib.Path,
  tensors: detect.Tensors,
  activation: clip_config.Activation | None,
) -> tuple[clip_config.CLIPConfig, detect.Tensors]:
  """Infer the config that a state dict of OpenAI's names does not state."""
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  config = config_files.from_openai_shapes(shapes)
  # OpenAI's archives have constants, and Scenic's converter took those.
  if file.suffix != '.npy' and 'input_resolution' not in tensors:
    if activation is None and 'classification_head.weight' in tensors:
      what = "a classification_head, hence OpenAI's tower, with QuickGELU"
      _log.warning('%s: it has %s.', file, what)
    elif activation is None or config.vision.width > _WIDEST:
      raise ValueError(
        'it is a state dict, which states neither the activation nor the heads '
        'of its tower. Put its open_clip_config.json into its folder; or, up '
        f"to width {_WIDEST}, give activation='quick_gelu' (OpenAI's weights) "
        "or 'gelu' (most of open_clip's), --activation=... at a command."
      )
    config = dataclasses.replace(config, activation=activation or 'quick_gelu')
  rest = [] if config.text else [*filter(_TEXT.match, tensors)]
  if rest:
    what = f'{text_lib.listed(rest)} are of no text tower, and ignored'
    _log.warning('%s: %s.', file, what)
    tensors = {n: tensor for n, tensor in tensors.items() if n not in rest}
  return config, tensors


def _read(
  path: pathlib.Path, source: _Source, model: clip_model.CLIP, shardings: Any
) -> Params:
  """Read and place the leaves of a CLIP, one tensor at a time."""
  entries = _checked_entries(path, source)
  names = traverse_util.unflatten_dict(
    {leaf: leaf for entry in entries for leaf in entry.leaves}, sep='/'
  )
  full = jax.tree.broadcast(shardings, names, is_leaf=lambda x: x is None)
  places = dict(weights.flatten(full))
  leaves: dict[str, jax.Array] = {}
  broken = []
  # The largest first: its temporary copies are freed before most of the
  # weights are placed.
  for entry in sorted(entries, key=lambda e: -math.prod(e.shape)):
    tensor = source.tensors[entry.name].load().reshape(entry.shape)
    tensor = tensor.astype(np.float32, copy=False)
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
  return jax.tree.map(leaves.__getitem__, names)


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
  entries = layouts.entries(config, source.layout, source.num_classes)
  stored = {
    # Some write a scalar as an array of one element.
    name: tensor._replace(shape=())
    if name == 'logit_scale' and tensor.size == 1
    else tensor
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
    'from one checkpoint, or name the file of other weights in the folder.',
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
