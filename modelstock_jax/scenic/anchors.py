"""What models start from: checkpoints of Scenic, of AugReg and of CLIP."""

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
import numpy as np
from scipy import ndimage

from modelstock_jax import clip
from modelstock_jax import merging
from modelstock_jax.clip import weights
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import text
from modelstock_jax.scenic import options as options_lib

Params = Any
PathLike = str | os.PathLike[str]

# Where the heads of Scenic's models are.
HEADS = ('output_projection', 'head')


def load(
  anchor: options_lib.Anchor, params: Params, model_state: Any, pixels: int
) -> tuple[Params, Any]:
  """The weights that a run starts from, in the place of its initialisation.

  Args:
    anchor: `config.model_stock.anchor`.
    params: the initialisation of the model.
    model_state: its other variables, such as {'batch_stats': ...}.
    pixels: sides of the images.

  Returns:
    Params and model_state, structure, shapes and dtypes of the initialisation.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is of another model, and of no known one.
  """
  if not anchor.path:
    logging.warning(
      'config.model_stock.anchor.path is not set: models start from the '
      'initialisation and are measured from it. Model Stock is a method for '
      'fine-tuning: set it to pretrained weights.'
    )
    return params, model_state
  like = flax.core.unfreeze(params)
  kind = _kind(anchor.path)
  if anchor.head == 'zero_shot' and kind in ('augreg', 'scenic'):
    raise ValueError(
      "config.model_stock.anchor.head: 'zero_shot' takes a text tower, which "
      f"{anchor.path} has not. Set 'checkpoint' or 'init'."
    )
  if kind == 'augreg':
    found = from_augreg(anchor.path, like)
  elif kind == 'scenic':
    found, statistics = from_scenic(anchor.path)
    if model_state:
      model_state = fitted(statistics, model_state, anchor.path)
  else:
    if 'visual' not in like:
      raise ValueError(
        f'config.model_stock.anchor.path: {anchor.path} is no Scenic '
        'checkpoint and no AugReg .npz. CLIP is read into a '
        '`CLIPClassificationModel` only.'
      )
    found = _with_clip(anchor, like, pixels)
  name = next((name for name in HEADS if name in like), None)
  if anchor.head == 'init':
    found = {**found, **({name: like[name]} if name else {})}
  elif anchor.head not in ('checkpoint', 'zero_shot') and name:
    found = {**found, name: read_head(anchor.head)}
  found = fitted(found, like, anchor.path)
  # As `initialize_model` has it, and the optimizer's masks.
  frozen = isinstance(params, flax.core.FrozenDict)
  return (flax.core.freeze(found) if frozen else found), model_state


def from_scenic(path: PathLike) -> tuple[Params, Any]:
  """Params and model_state of a Scenic checkpoint.

  Args:
    path: a workdir, whose last checkpoint is taken, or `checkpoint_<step>`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or holds something else.
  """
  file = os.fspath(path)
  if os.path.isdir(file):
    last = checkpoints.latest_checkpoint(file)
    if last is None:
      raise FileNotFoundError(f'{file}: holds no checkpoint_<step>.')
    file = last
  elif not os.path.exists(file):
    raise FileNotFoundError(f'{file}: there is no such checkpoint.')
  try:
    found = checkpoints.restore_checkpoint(file, None)
  except Exception as error:  # msgpack raises many kinds
    raise ValueError(f'{file} is no whole checkpoint: {error!r}') from error
  if not isinstance(found, dict) or not found.get('params'):
    held = sorted(found) if isinstance(found, dict) else type(found).__name__
    raise ValueError(
      f"{file} is no Scenic checkpoint: it takes 'params', it holds {held}."
    )
  if np.ndim(found.get('global_step', 0)) == 1:
    raise ValueError(
      f'{file} holds several models in training. Their merge is the '
      'checkpoint in the folder above.'
    )
  return found['params'], found.get('model_state') or {}


def from_augreg(path: PathLike, like: Params) -> Params:
  """Params of Scenic's ViT from an AugReg `.npz`.

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
  try:
    with (
      text.existing_file(path).open('rb') as opened,
      np.load(opened, allow_pickle=False) as file,
    ):
      flat = {tuple(name.split('/')): file[name] for name in file.files}
  except (ValueError, zipfile.BadZipFile, EOFError) as error:
    raise ValueError(f'{path} is no whole .npz of arrays: {error}') from error
  # These files have Flax's names of before Linen: MlpBlock_3 is MlpBlock_0.
  found = checkpoints.convert_pre_linen(flax.traverse_util.unflatten_dict(flat))
  if 'Transformer' not in found or 'embedding' not in found:
    raise ValueError(
      f"{path} is no AugReg ViT: it takes 'Transformer' and 'embedding', it "
      f'holds {sorted(found)}.'
    )
  if 'head' in found:
    found['output_projection'] = found.pop('head')
  if 'pre_logits' not in like:
    found.pop('pre_logits', None)
  try:
    place = found['Transformer']['posembed_input']
    wanted = like['Transformer']['posembed_input']['pos_embedding'].shape
  except (KeyError, TypeError):
    return found  # which `fitted` will say is another model
  classes = ('cls' in found, 'cls' in like)
  place['pos_embedding'] = _resize(place['pos_embedding'], wanted, *classes)
  if not classes[1]:
    found.pop('cls', None)
  return found


def from_clip(params: Params, heads: int, patch_size: int) -> Params:
  """Our image tower as the 'visual' of Scenic's CLIP.

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
      width = leaf.shape[-1]
      leaf = leaf.reshape(patch_size, patch_size, -1, width)
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


def read_head(path: PathLike) -> Params:
  """A head {'kernel': [D, K], 'bias': [K]} of one's own.

  Args:
    path: a `.npz`, or a `.safetensors`, with these two.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it holds something else.
  """
  path = text.existing_file(path)
  if path.suffix == '.npz':
    with np.load(path, allow_pickle=False) as file:
      held = {name: file[name] for name in file.files}
  elif path.suffix == '.safetensors':
    tensors = safetensors.read(path).tensors
    held = {name: tensor.load() for name, tensor in tensors.items()}
  else:
    raise ValueError(
      f'config.model_stock.anchor.head: {path} is neither .npz nor '
      ".safetensors. It takes 'checkpoint', 'init', 'zero_shot' or such a file."
    )
  if held.keys() != {'kernel', 'bias'}:
    raise ValueError(
      f"{path} is no head: it takes 'kernel' and 'bias', it holds "
      f'{sorted(held)}.'
    )
  return held


def zero_shot_head(
  pretrained: clip.Pretrained, prompts: PathLike, tokenizer: PathLike | None
) -> Params:
  """The head that classifies by CLIP's text tower.

  Args:
    pretrained: a CLIP of both towers.
    prompts: JSON with 'names' of K classes and 'templates'.
    tokenizer: folder of its tokenizer; None is OpenAI's.

  Returns:
    {'kernel': float32[D, K], 'bias': float32[K]}.

  Raises:
    ValueError: there is no text tower, or the tokenizer is another's.
  """
  model, params = pretrained
  if model.config.text is None:
    raise ValueError(
      "config.model_stock.anchor.head: 'zero_shot' takes a text tower, which "
      'the checkpoint has not.'
    )
  said = clip.read_prompts(prompts)
  length = model.config.text.context_length
  tokenize = clip.load_tokenizer(tokenizer, context_length=length)
  size = model.config.text.vocab_size
  if tokenize.end >= size:
    raise ValueError(
      f'config.model_stock.anchor.tokenizer: has {tokenize.end + 1} ids, the '
      f"text tower takes {size}: give the folder of the checkpoint's own."
    )
  tokens = tokenize(clip.captions(said))
  embed = jax.jit(model.encode_text)
  # Zero-shot logits differ by less than accelerators' fast products hold.
  with jax.default_matmul_precision('highest'):
    parts = [
      embed(params, jnp.asarray(tokens[i : i + _TEXTS]))
      for i in range(0, len(tokens), _TEXTS)
    ]
  embeddings = jnp.concatenate(parts)
  shape = (len(said.names), len(said.templates), embeddings.shape[-1])
  return clip.zero_shot_head(embeddings.reshape(shape))


_TEXTS = 256  # embedded at a time


def fitted(found: Params, like: Params, path: PathLike) -> Params:
  """Found params, if they are those of the model; one error if not.

  Args:
    found: nested dicts of arrays.
    like: nested dicts of the arrays that the model takes.
    path: where they were found, for the error.

  Returns:
    The structure and dtypes of `like`.

  Raises:
    ValueError: names or shapes differ; all such are listed.
  """
  held, wanted = dict(_flat(found)), dict(_flat(like))
  problems = [f'{name}: missing' for name in wanted.keys() - held.keys()]
  problems += [f'{name}: unknown' for name in held.keys() - wanted.keys()]
  for name in wanted.keys() & held.keys():
    shapes = np.shape(held[name]), np.shape(wanted[name])
    if shapes[0] != shapes[1]:
      problems.append(f'{name}: has shape {shapes[0]}, the model {shapes[1]}')
    elif not np.isfinite(np.asarray(held[name], np.float32)).all():
      problems.append(f'{name}: is not finite')
  if problems:
    advice = ''
    if any(problem.startswith(HEADS) for problem in problems):
      advice = (
        "\nFor another head set config.model_stock.anchor.head to 'init', "
        "'zero_shot' or a file."
      )
    raise ValueError(
      f'config.model_stock.anchor.path: {path} is not of this model:\n'
      + '\n'.join(f'  {problem}' for problem in sorted(problems))
      + advice
    )
  leaves = {
    tuple(name.split('/')): jnp.asarray(held[name], wanted[name].dtype)
    for name in wanted
  }
  return flax.traverse_util.unflatten_dict(leaves)


def _kind(path: str) -> str:
  if path.endswith('.npz'):
    return 'augreg'
  local = pathlib.Path(path)
  name = local.name
  if re.fullmatch(r'checkpoint_\d+', name):
    return 'scenic'
  return 'scenic' if any(local.glob('checkpoint_*')) else 'clip'


def _with_clip(anchor: options_lib.Anchor, like: Params, pixels: int) -> Params:
  """The image tower of a CLIP, and the head if its text tower makes it."""
  pretrained = clip.load_pretrained(
    anchor.path, image_size=pixels, allow_pickle=anchor.allow_pickle
  )
  vision = pretrained.model.config.vision
  activation = pretrained.model.config.activation
  if activation != 'quick_gelu':
    raise ValueError(
      f'config.model_stock.anchor.path: {anchor.path} uses {activation}, '
      "Scenic's CLIP has quick_gelu only."
    )
  found = {
    'visual': from_clip(
      pretrained.params['image'], vision.heads, vision.patch_size
    )
  }
  if anchor.head == 'checkpoint':
    if 'head' not in pretrained.params:
      raise ValueError(
        f'config.model_stock.anchor.head: {anchor.path} has no classification '
        "head; set it to 'zero_shot', to 'init' (zero) or to a file."
      )
    found['head'] = pretrained.params['head']
  elif anchor.head == 'zero_shot':
    tokenizer = anchor.tokenizer or None
    found['head'] = zero_shot_head(pretrained, anchor.prompts, tokenizer)
  else:
    found['head'] = like['head']  # replaced where a file is named
  return found


def _resize(
  embedding: np.ndarray,
  wanted: tuple[int, ...],
  class_token: bool,
  takes_class_token: bool,
) -> np.ndarray:
  """Positional embeddings [1, tokens, D] for another grid of patches."""
  token = embedding[:, :1] if class_token else embedding[:, :0]
  grid = embedding[:, 1:] if class_token else embedding
  if takes_class_token and not class_token:
    return embedding  # which `fitted` will say does not fit
  if not takes_class_token:
    token = token[:, :0]
  old = round(grid.shape[1] ** 0.5)
  new = round((wanted[1] - token.shape[1]) ** 0.5)
  if old != new:
    width = grid.shape[-1]
    # As Scenic and AugReg's own code do it: corners stay corners.
    grid = ndimage.zoom(
      grid.reshape(old, old, width), (new / old, new / old, 1), order=1
    ).reshape(1, -1, width)
  return np.concatenate([token, grid], axis=1)


def _flat(tree: Any) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_flatten_with_path(flax.core.unfreeze(tree))[0]
  return [(merging.path_name(path), leaf) for path, leaf in leaves]
