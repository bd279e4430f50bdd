"""Anchors: checkpoints of Scenic, of AugReg and of CLIP."""

from collections.abc import Mapping
import pathlib
import re
from typing import Any

from absl import logging
import flax
from flax.training import checkpoints
import jax
from jax import numpy as jnp
import numpy as np
from scipy import ndimage

from modelstock_jax import clip
from modelstock_jax.clip import heads
from modelstock_jax.clip import layouts
from modelstock_jax.clip import weights
from modelstock_jax.formats import compare
from modelstock_jax.formats import detect
from modelstock_jax.formats import npy
from modelstock_jax.formats import text
from modelstock_jax.scenic import options as options_lib
from modelstock_jax.training import class_texts
from modelstock_jax.training import config_keys

Params = Any
Leaves = dict[str, Any]  # arrays by flat names, such as 'head/kernel'

# The heads of Scenic's models, by their key in the params.
HEADS = ('output_projection', 'head')
_POSITIONS = 'Transformer/posembed_input/pos_embedding'


def load(
  anchor: options_lib.Anchor, params: Params, model_state: Any, pixels: int
) -> tuple[Params, Any]:
  """Return the weights that a run starts from, in place of its initialisation.

  Args:
    anchor: `config.model_stock.anchor`.
    params: the initialisation of the model.
    model_state: its other variables, such as {'batch_stats': ...}.
    pixels: side of the images.

  Returns:
    Params and model_state, structure, shapes and dtypes of the initialisation.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is of another model, or of no known one.
  """
  if not anchor.path:
    logging.warning(
      'config.model_stock.anchor.path is not set: models start from the '
      'initialisation and are measured from it. Model Stock is a method for '
      'fine-tuning: set it to pretrained weights.'
    )
    return params, model_state
  like = flax.core.unfreeze(params)
  path = pathlib.Path(anchor.path)
  pretrained = None
  if path.suffix == '.npz':
    leaves = from_augreg(path, like)
  elif re.fullmatch(r'checkpoint_\d+', path.name) or any(
    path.glob('checkpoint_*')
  ):
    leaves, statistics = from_scenic(path)
    if model_state:
      model_state = fitted(statistics, model_state, path)
  elif 'visual' in like:
    pretrained = clip.load_pretrained(
      anchor.path,
      image_size=pixels,
      allow_pickle=anchor.allow_pickle,
      activation='quick_gelu',  # that of Scenic's CLIP
    )
    leaves = from_clip(pretrained, anchor.path)
  else:
    raise ValueError(
      f'config.model_stock.anchor.path: {path} is no Scenic checkpoint and no '
      'AugReg .npz. CLIP is read into a `CLIPClassificationModel` only.'
    )
  for name in set(HEADS) & like.keys():
    if anchor.head != 'checkpoint':
      leaves = {n: x for n, x in leaves.items() if not n.startswith(f'{name}/')}
      head = _head(anchor, like[name], pretrained)
      leaves |= {f'{name}/{key}': leaf for key, leaf in head.items()}
  stored = fitted(leaves, like, path)
  # As `initialize_model` has it, and the optimizer's masks.
  frozen = isinstance(params, flax.core.FrozenDict)
  return (flax.core.freeze(stored) if frozen else stored), model_state


def from_scenic(path: text.PathLike) -> tuple[Leaves, Leaves]:
  """Read params and model_state of a Scenic checkpoint.

  Args:
    path: a workdir, whose last checkpoint is taken, or `checkpoint_<step>`.

  Returns:
    The leaves of both.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or holds something else.
  """
  leaves: dict[str, Leaves] = {'params': {}, 'model_state': {}}
  for name, tensor in detect.read(path).tensors.items():
    part, _, key = name.partition('/')
    leaves[part][key] = tensor.load()
  return leaves['params'], leaves['model_state']


def from_augreg(path: text.PathLike, like: Params) -> Leaves:
  """Read params of Scenic's ViT from an AugReg `.npz`.

  Positional embeddings are resized (bilinear) to the grid that `like` has,
  the class token's stays; a `pre_logits` layer that the model has not is left
  out.

  Args:
    path: of the file.
    like: params of the model.

  Returns:
    The leaves, with the head of the file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or holds something else.

  Source: https://github.com/google-research/vision_transformer, the files of
  arXiv:2106.10270.
  """
  flat = {tuple(name.split('/')): x for name, x in _read_npz(path).items()}
  # These files have Flax's names of before Linen: MlpBlock_3 is MlpBlock_0.
  tree = checkpoints.convert_pre_linen(flax.traverse_util.unflatten_dict(flat))
  stored = {
    re.sub('^head/', 'output_projection/', name): leaf
    for name, leaf in weights.flatten(tree)
  }
  if _POSITIONS not in stored or 'cls' not in stored:
    raise ValueError(
      f"{path} is no AugReg ViT: it takes 'cls' and {_POSITIONS!r}, it holds "
      f'{text.listed(stored)}.'
    )
  if 'pre_logits' not in like:
    stored = {n: x for n, x in stored.items() if n[:11] != 'pre_logits/'}
  class_tokens = int('cls' in like)
  if not class_tokens:
    del stored['cls']
  wanted = dict(weights.flatten(like)).get(_POSITIONS)
  if wanted is not None:  # else `fitted` reports the difference
    stored[_POSITIONS] = _resize(
      stored[_POSITIONS], class_tokens, wanted.shape[1] - class_tokens
    )
  return stored


def _resize(
  embedding: np.ndarray, class_tokens: int, patches: int
) -> np.ndarray:
  """Resize positional embeddings [1, 1 + tokens, D] to a grid of `patches`."""
  token, grid = embedding[:, :class_tokens], embedding[:, 1:]
  old, new = (round(n**0.5) for n in (grid.shape[1], patches))
  if old != new:
    width = grid.shape[-1]
    # As Scenic and AugReg's own code do it: corners stay corners.
    grid = ndimage.zoom(
      grid.reshape(old, old, width), (new / old, new / old, 1), order=1
    ).reshape(1, -1, width)
  return np.concatenate([token, grid], axis=1)


def from_clip(pretrained: clip.Pretrained, path: text.PathLike) -> Leaves:
  """Return a CLIP's image tower and head for a `CLIPClassificationModel`.

  Args:
    pretrained: as `clip.load_pretrained` returns it.
    path: of its file, for the error.

  Returns:
    The leaves of 'visual', as `scenic.projects.baselines.clip` has them, and
    those of 'head' if there is one.

  Raises:
    ValueError: Scenic has no such network.
  """
  params, network = pretrained.params, pretrained.model.config
  if network.activation != 'quick_gelu':
    raise ValueError(
      f'config.model_stock.anchor.path: {path} uses {network.activation}, '
      "Scenic's CLIP has quick_gelu only."
    )
  num_heads, patch_size = network.vision.heads, network.vision.patch_size
  leaves = {}
  parts = {key: params[key] for key in params.keys() & {'image', 'head'}}
  for path, leaf in weights.flatten(parts):
    leaf = np.asarray(leaf)
    name = layouts.tensor_name(path, 'scenic')
    if name == 'visual/conv1/kernel':
      leaf = leaf.reshape(patch_size, patch_size, -1, leaf.shape[-1])
    elif re.search(r'attn/(query|key|value)/', name):
      leaf = leaf.reshape(*leaf.shape[:-1], num_heads, -1)
    elif name.endswith('attn/out/kernel'):
      leaf = leaf.reshape(num_heads, -1, leaf.shape[-1])
    leaves[name] = leaf
  return leaves


def _head(
  anchor: options_lib.Anchor,
  like: Params,
  pretrained: clip.Pretrained | None,
) -> Mapping[str, Any]:
  """Return the head [D, K] that is not that of the checkpoint."""
  if anchor.head == 'init':
    return like
  if anchor.head != 'zero_shot':
    return _read_npz(anchor.head)
  tower = pretrained.model.config.text if pretrained else None
  if pretrained is None or tower is None:
    raise ValueError(
      "config.model_stock.anchor.head: 'zero_shot' takes a text tower, which "
      f"{anchor.path} has not. Set 'checkpoint', 'init' or a file."
    )
  settings = config_keys.Anchor(
    weights=anchor.path, prompts=anchor.prompts, tokenizer=anchor.tokenizer
  )
  prompts = clip.read_prompts(anchor.prompts)
  tokens = class_texts.tokenize(
    settings, prompts, tower, pathlib.Path(anchor.path)
  )
  encode_text, params = pretrained.model.encode_text, pretrained.params
  return heads.text_head(encode_text, params, tokens)


def _read_npz(path: text.PathLike) -> dict[str, np.ndarray]:
  tensors = npy.read_archive(text.existing_file(path))
  return {name: tensor.load() for name, tensor in tensors.items()}


def fitted(leaves: Leaves, like: Params, path: text.PathLike) -> Params:
  """Return stored leaves with the structure and dtypes of the model's.

  Args:
    leaves: arrays by flat names.
    like: nested dicts of the arrays that the model takes.
    path: of the file, for the error.

  Raises:
    ValueError: names or shapes differ; all differences are listed.
  """
  wanted = dict(weights.flatten(like))
  problems = compare.differences(wanted, leaves, dtypes=False)
  text.raise_problems(
    f'config.model_stock.anchor.path: {path} is not of this model. If only the '
    "head differs, set config.model_stock.anchor.head to 'init', 'zero_shot' "
    'or a file.',
    problems,
  )
  ordered = [jnp.asarray(leaves[name], x.dtype) for name, x in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), ordered)
