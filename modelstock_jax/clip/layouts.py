"""Names, shapes and transposes of the parameters of a CLIP in other tools.

'ours' has the paths of our leaves for names, in files of this library.
'huggingface' is that of `transformers.CLIPModel`.
'openai' is that of OpenAI's archives, and also of open_clip and of Scenic's
`.npy` files; query, key and value are one tensor in it.
"""

import pathlib
import re
import tomllib
from typing import Literal
from typing import NamedTuple

import jax
import numpy as np

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import model as clip_model
from modelstock_jax.clip import weights

Layout = Literal['ours', 'huggingface', 'openai']

FORMATS = tomllib.loads(
  pathlib.Path(__file__).with_name('formats.toml').read_text('utf-8')
)

# Constants that some files have next to the weights.
CONSTANTS = (
  *('position_ids', 'attn_mask'),
  *('input_resolution', 'context_length', 'vocab_size'),
)


class Entry(NamedTuple):
  """A tensor of a checkpoint, and the leaves that it holds.

  Attributes:
    name: of the tensor.
    shape: of the tensor.
    leaves: paths of our leaves: one, or those of query, key and value, which
      lie one after another along the first axis.
    form: 'transposed' holds a [in, out] kernel as [out, in]; 'convolution'
      holds that of the patches as [out, channels, y, x].
  """

  name: str
  shape: tuple[int, ...]
  leaves: tuple[str, ...]
  form: Literal['as_is', 'transposed', 'convolution']


def entries(
  config: clip_config.CLIPConfig,
  layout: Layout,
  num_classes: int | None = None,
) -> list[Entry]:
  """Return the tensors of a checkpoint, for a CLIP of these sizes.

  Args:
    config: the sizes.
    layout: names and shapes of the tensors.
    num_classes: outputs of the classification head; None without one.

  >>> from modelstock_jax import clip
  >>> tensors = entries(clip.SIZES['ViT-B/32'], 'openai')
  >>> tensors[0].name, tensors[0].shape, len(tensors)
  ('visual.transformer.resblocks.0.attn.in_proj_bias', (2304,), 302)
  >>> len(entries(clip.SIZES['ViT-B/32'], 'huggingface'))
  398
  """
  model = clip_model.create(config)
  like = jax.eval_shape(model.init, jax.random.key(0))
  shapes = {path: leaf.shape for path, leaf in weights.flatten(like)}
  if num_classes is not None:
    shapes['head/kernel'] = (config.embed_dim, num_classes)
    shapes['head/bias'] = (num_classes,)
  paths_of: dict[str, list[str]] = {}
  for path in shapes:
    paths_of.setdefault(tensor_name(path, layout), []).append(path)
  return [
    _entry(name, paths, shapes[paths[0]], config.vision, layout)
    for name, paths in paths_of.items()
  ]


def split(entry: Entry, tensor: np.ndarray) -> list[np.ndarray]:
  """Return the leaves of `entry` in its tensor, in their order.

  >>> kernel = Entry('fc.weight', (3, 2), ('fc/kernel',), 'transposed')
  >>> [leaf] = split(kernel, np.zeros((3, 2)))
  >>> leaf.shape
  (2, 3)
  """
  if entry.form == 'convolution':
    return [tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])]
  parts = np.split(tensor, len(entry.leaves)) if tensor.ndim else [tensor]
  return [part.T if entry.form == 'transposed' else part for part in parts]


def join(entry: Entry, leaves: list[np.ndarray]) -> np.ndarray:
  """Return the tensor of `entry` with these leaves, the inverse of `split`."""
  if entry.form == 'convolution':
    width, channels, y, x = entry.shape
    kernel = leaves[0].reshape(y, x, channels, width)
    leaves = [kernel.transpose(3, 2, 0, 1)]
  if entry.form == 'transposed':
    leaves = [leaf.T for leaf in leaves]
  tensor = np.concatenate(leaves) if len(leaves) > 1 else leaves[0]
  # Files hold an array's memory, and that of transposes is transposed.
  return np.asarray(tensor, order='C')


def _entry(
  name: str,
  paths: list[str],
  shape: tuple[int, ...],
  vision: clip_config.VisionConfig,
  layout: Layout,
) -> Entry:
  # The tree has key, query and value in this order; tensors, query first.
  leaves = tuple(sorted(paths, key=lambda path: '/query/' not in path))
  # OpenAI's projections are bare parameters, [in, out] as ours.
  bare = layout == 'openai' and leaves[0].endswith('projection/kernel')
  if layout == 'ours' or bare or not leaves[0].endswith('/kernel'):
    form = 'as_is'
  elif leaves[0] == 'image/patch_embedding/kernel':
    patch = (vision.patch_size, vision.patch_size)
    shape, form = (vision.width, vision.channels, *patch), 'convolution'
  else:
    shape, form = shape[::-1], 'transposed'
  if len(leaves) > 1:
    shape = (shape[0] * len(leaves), *shape[1:])
  return Entry(name, shape, leaves, form)


def tensor_name(path: str, layout: Layout | Literal['scenic']) -> str:
  """Return the name of the tensor that holds a leaf of ours.

  >>> tensor_name('image/block_0/attention/out/kernel', 'scenic')
  'visual/transformer/resblocks.0/attn/out/kernel'
  """
  rules = [] if layout == 'ours' else FORMATS[layout]['tensors']
  for pattern, replacement in rules:
    path = re.sub(pattern, replacement, path)
  return path
