"""Anchors: checkpoints of Scenic, of AugReg and of CLIP."""

import os
import pathlib
import re
from typing import Any
import zipfile

from absl import logging
import flax
from flax.training import checkpoints
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
from scipy import ndimage

from modelstock_jax import clip
from modelstock_jax.clip import heads
from modelstock_jax.clip import weights
from modelstock_jax.formats import compare
from modelstock_jax.formats import detect
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import text
from modelstock_jax.scenic import options as options_lib
from modelstock_jax.training import class_texts

Params = Any
PathLike = str | os.PathLike[str]

# Where the heads of Scenic's models are.
HEADS = ('output_projection', 'head')


def load(
  anchor: options_lib.Anchor, params: Params, model_state: Any, pixels: int
) -> tuple[Params, Any]:
  """Return the weights that a run starts from, in place of its initialisation.

  Args:
    anchor: `config.model_stock.anchor`.
    params: the initialisation of the model.
    model_state: its other variables, such as {'batch_stats': ...}.
    pixels: sides of the images.

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
  augreg = path.suffix == '.npz'
  scenic = bool(re.fullmatch(r'checkpoint_\d+', path.name)) or any(
    path.glob('checkpoint_*')
  )
  if anchor.head == 'zero_shot' and (augreg or scenic):
    raise ValueError(
      "config.model_stock.anchor.head: 'zero_shot' takes a text tower, which "
      f"{path} has not. Set 'checkpoint' or 'init'."
    )
  if augreg:
    stored = from_augreg(path, like)
  elif scenic:
    stored, statistics = from_scenic(path)
    if model_state:
      model_state = fitted(statistics, model_state, path)
  elif 'visual' in like:
    stored = from_clip(anchor, pixels)
  else:
    raise ValueError(
      f'config.model_stock.anchor.path: {path} is no Scenic checkpoint and no '
      'AugReg .npz. CLIP is read into a `CLIPClassificationModel` only.'
    )
  for name in set(HEADS) & like.keys():
    if anchor.head == 'init':
      stored[name] = like[name]
    elif anchor.head not in ('checkpoint', 'zero_shot'):
      stored[name] = read_head(anchor.head)
  stored = fitted(stored, like, path)
  # As `initialize_model` has it, and the optimizer's masks.
  frozen = isinstance(params, flax.core.FrozenDict)
  return (flax.core.freeze(stored) if frozen else stored), model_state


def from_scenic(path: PathLike) -> tuple[Params, Any]:
  """Read params and model_state of a Scenic checkpoint.

  Args:
    path: a workdir, whose last checkpoint is taken, or `checkpoint_<step>`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or holds something else.
  """
  tensors = detect.read(path).tensors
  tree = flax.traverse_util.unflatten_dict(
    {tuple(name.split('/')): x.load() for name, x in tensors.items()}
  )
  return tree['params'], tree.get('model_state', {})


def from_augreg(path: PathLike, like: Params) -> Params:
  """Read params of Scenic's ViT from an AugReg `.npz`.

  Positional embeddings are resized (bilinear) to the grid that `like` has,
  the class token's stays; a `pre_logits` layer that the model has not is left
  out. The head is the file's: with other classes, ask for that of the
  initialisation.

  Args:
    path: of the file.
    like: params of the model, for its grid.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or holds something else.

  Source: https://github.com/google-research/vision_transformer, the files of
  arXiv:2106.10270.
  """
  flat = {tuple(name.split('/')): x for name, x in _read_npz(path).items()}
  # These files have Flax's names of before Linen: MlpBlock_3 is MlpBlock_0.
  stored = checkpoints.convert_pre_linen(
    flax.traverse_util.unflatten_dict(flat)
  )
  if 'Transformer' not in stored or 'embedding' not in stored:
    raise ValueError(
      f"{path} is no AugReg ViT: it takes 'Transformer' and 'embedding', it "
      f'holds {sorted(stored)}.'
    )
  if 'head' in stored:
    stored['output_projection'] = stored.pop('head')
  if 'pre_logits' not in like:
    stored.pop('pre_logits', None)
  before, after = int('cls' in stored), int('cls' in like)
  if not after:
    stored.pop('cls', None)
  name = 'pos_embedding'
  place, wanted = (
    tree.get('Transformer', {}).get('posembed_input', {})
    for tree in (stored, like)
  )
  if name in place and name in wanted:  # else `fitted` says that they differ
    tokens = wanted[name].shape[1]
    place[name] = _resize(place[name], before, tokens, min(before, after))
  return stored


def _resize(
  embedding: np.ndarray, before: int, wanted: int, after: int
) -> np.ndarray:
  """Resize positional embeddings [1, tokens, D] to another grid of patches.

  Args:
    embedding: class tokens and the tokens of a square grid.
    before: class tokens that it has.
    wanted: tokens of the result.
    after: class tokens that it keeps.
  """
  token, grid = embedding[:, :after], embedding[:, before:]
  old, new = (round(n**0.5) for n in (grid.shape[1], wanted - after))
  if old != new:
    width = grid.shape[-1]
    # As Scenic and AugReg's own code do it: corners stay corners.
    grid = ndimage.zoom(
      grid.reshape(old, old, width), (new / old, new / old, 1), order=1
    ).reshape(1, -1, width)
  return np.concatenate([token, grid], axis=1)


def from_clip(anchor: options_lib.Anchor, pixels: int) -> Params:
  """Read a CLIP of any kind as params of a `CLIPClassificationModel`.

  Args:
    anchor: what is read, and which head.
    pixels: sides of the images.

  Returns:
    {'visual': as `scenic.projects.baselines.clip` has it, 'head': the
    checkpoint's or that of its text tower}; without 'head' if another is
    asked for.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, of another network, or has no such head.
  """
  pretrained = clip.load_pretrained(
    anchor.path, image_size=pixels, allow_pickle=anchor.allow_pickle
  )
  network, params = pretrained.model.config, pretrained.params
  if network.activation != 'quick_gelu':
    raise ValueError(
      f'config.model_stock.anchor.path: {anchor.path} uses '
      f"{network.activation}, Scenic's CLIP has quick_gelu only."
    )
  vision = network.vision
  stored = {
    'visual': to_scenic(params['image'], vision.heads, vision.patch_size)
  }
  if anchor.head == 'zero_shot':
    stored['head'] = _zero_shot_head(anchor, pretrained)
  elif anchor.head == 'checkpoint':
    if 'head' not in params:
      raise ValueError(
        f'config.model_stock.anchor.head: {anchor.path} has no classification '
        "head; set it to 'zero_shot', to 'init' (zero) or to a file."
      )
    stored['head'] = params['head']
  return stored


def to_scenic(params: Params, heads: int, patch_size: int) -> Params:
  """Return our image tower as the 'visual' of Scenic's CLIP.

  Args:
    params: 'image' of `clip.load_pretrained`.
    heads: of attention.
    patch_size: in pixels.

  Returns:
    Nested dicts, as `scenic.projects.baselines.clip` has them.
  """
  result = {}
  for path, leaf in weights.flatten(params):
    leaf = np.asarray(leaf)
    name = re.sub(r'^block_(\d+)/', r'transformer/resblocks.\1/', path)
    for ours, theirs in _NAMES.items():
      name = name.replace(ours, theirs)
    if name == 'conv1/kernel':
      leaf = leaf.reshape(patch_size, patch_size, -1, leaf.shape[-1])
    elif re.search(r'attn/(query|key|value)/', name):
      leaf = leaf.reshape(*leaf.shape[:-1], heads, -1)
    elif name.endswith('attn/out/kernel'):
      leaf = leaf.reshape(heads, -1, leaf.shape[-1])
    result[tuple(name.split('/'))] = leaf
  return flax.traverse_util.unflatten_dict(result)


_NAMES = {
  'patch_embedding/kernel': 'conv1/kernel',
  'projection/kernel': 'proj/kernel',
  '/attention/': '/attn/',
  '/mlp/fc/': '/mlp/c_fc/',
  '/mlp/proj/': '/mlp/c_proj/',
}


def _zero_shot_head(
  anchor: options_lib.Anchor, pretrained: clip.Pretrained
) -> Params:
  model, params = pretrained
  tower = model.config.text
  if tower is None:
    raise ValueError(
      "config.model_stock.anchor.head: 'zero_shot' takes a text tower, which "
      'the checkpoint has not.'
    )
  settings: Any = ml_collections.ConfigDict(
    {**anchor.model_dump(), 'weights': anchor.path}
  )
  prompts = clip.read_prompts(anchor.prompts)
  tokens = class_texts.tokenize(
    settings, prompts, tower, pathlib.Path(anchor.path)
  )
  return heads.text_head(model.encode_text, params, tokens)


def read_head(path: PathLike) -> Params:
  """Read a head {'kernel': [D, K], 'bias': [K]} of one's own.

  Args:
    path: a `.npz`, or a `.safetensors`, with these two.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is of another format, or damaged.
  """
  suffix = pathlib.Path(path).suffix
  if suffix == '.npz':
    return _read_npz(path)
  if suffix == '.safetensors':
    tensors = safetensors.read(path).tensors
    return {name: tensor.load() for name, tensor in tensors.items()}
  raise ValueError(
    f'config.model_stock.anchor.head: {path} is neither .npz nor '
    ".safetensors. It takes 'checkpoint', 'init', 'zero_shot' or such a file."
  )


def _read_npz(path: PathLike) -> dict[str, np.ndarray]:
  try:
    with (
      text.existing_file(path).open('rb') as opened,
      np.load(opened, allow_pickle=False) as file,
    ):
      return dict(file)
  except (ValueError, zipfile.BadZipFile, EOFError) as error:
    raise ValueError(f'{path} is no whole .npz of arrays: {error}') from error


def fitted(stored: Params, like: Params, path: PathLike) -> Params:
  """Return stored params with the structure and dtypes of the model's.

  Args:
    stored: nested dicts of arrays.
    like: nested dicts of the arrays that the model takes.
    path: of the file, for the error.

  Raises:
    ValueError: names or shapes differ, or a value is not finite; all such are
      listed.
  """
  arrays, wanted = dict(weights.flatten(stored)), dict(weights.flatten(like))
  problems = compare.differences(wanted, arrays, dtypes=False)
  problems += [
    f'{name}: is not finite'
    for name, array in arrays.items()
    if not np.isfinite(np.asarray(array, np.float32)).all()
  ]
  if problems:
    raise ValueError(
      f'config.model_stock.anchor.path: {path} is not of this model:\n  '
      + '\n  '.join(problems)
      + "\nFor another head set config.model_stock.anchor.head to 'init', "
      "'zero_shot' or a file."
    )
  leaves = [jnp.asarray(arrays[name], x.dtype) for name, x in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
