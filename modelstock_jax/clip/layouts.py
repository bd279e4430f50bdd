"""Where other tools keep the parameters of a CLIP: names, shapes, transposes.

'ours' has the paths of our leaves for names, in files of this library.
'huggingface' is that of `transformers.CLIPModel`.
'openai' is that of OpenAI's archives, and also of open_clip and of Scenic's
`.npy` files; query, key and value are one tensor in it.
"""

import re
from typing import Literal
from typing import NamedTuple

import jax
import numpy as np

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import model as clip_model
from modelstock_jax.clip import weights

Layout = Literal['ours', 'huggingface', 'openai']


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


def entries(config: clip_config.CLIPConfig, layout: Layout) -> list[Entry]:
  """The tensors of a checkpoint, for a CLIP of these sizes.

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
  held: dict[str, list[str]] = {}
  for path in shapes:
    held.setdefault(tensor_name(path, layout), []).append(path)
  return [
    _entry(name, paths, shapes[paths[0]], config, layout)
    for name, paths in held.items()
  ]


def ignored(name: str) -> bool:
  """Whether a tensor is a constant that some files carry beside the weights."""
  return bool(
    re.search(
      r'(^|\.)(position_ids|attn_mask|input_resolution|context_length'
      r'|vocab_size)$',
      name,
    )
  )


def split(entry: Entry, tensor: np.ndarray) -> list[np.ndarray]:
  """Takes the leaves of `entry` out of its tensor, in their order.

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
  """Makes the tensor of `entry` of its leaves: the inverse of `split`."""
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
  config: clip_config.CLIPConfig,
  layout: Layout,
) -> Entry:
  paths = sorted(paths, key=_qkv_order)
  path = paths[0]
  if layout == 'ours':
    return Entry(name, shape, (path,), 'as_is')
  if path == 'image/patch_embedding/kernel':
    vision = config.vision
    size = vision.patch_size
    stored = (vision.width, vision.channels, size, size)
    return Entry(name, stored, tuple(paths), 'convolution')
  # OpenAI's projections are bare parameters, [in, out] as ours.
  bare = layout == 'openai' and path.endswith('projection/kernel')
  if path.endswith('/kernel') and not bare:
    stored = (shape[1] * len(paths), shape[0])
    return Entry(name, stored, tuple(paths), 'transposed')
  if len(paths) > 1:
    shape = (shape[0] * len(paths),)
  return Entry(name, shape, tuple(paths), 'as_is')


def tensor_name(path: str, layout: Layout) -> str:
  """Return the name of the tensor that holds a leaf of ours."""
  if layout == 'ours':
    return path
  if path in _NAMES:
    return _NAMES[path][layout]
  tower, *module, parameter = path.split('/')
  kind = 'bias' if parameter == 'bias' else 'weight'
  block = re.fullmatch(r'block_(\d+)', module[0])
  if not block:
    norm = _NAMES[f'{tower}/{module[0]}'][layout]
    return f'{norm}.{kind}'
  start = _NAMES[f'{tower}/block'][layout] + block[1]
  inner = _BLOCK['/'.join(module[1:])][layout]
  # in_proj_weight, in_proj_bias: parameters of PyTorch's attention itself.
  return f'{start}.{inner}{"_" if inner.endswith("in_proj") else "."}{kind}'


def _qkv_order(path: str) -> int:
  found = re.search(r'/(query|key|value)/', path)
  return ('query', 'key', 'value').index(found[1]) if found else 0


def _both(huggingface: str, openai: str) -> dict[Layout, str]:
  return {'huggingface': huggingface, 'openai': openai}


_NAMES = {
  'logit_scale': _both('logit_scale', 'logit_scale'),
  'image/patch_embedding/kernel': _both(
    'vision_model.embeddings.patch_embedding.weight', 'visual.conv1.weight'
  ),
  'image/class_embedding': _both(
    'vision_model.embeddings.class_embedding', 'visual.class_embedding'
  ),
  'image/positional_embedding': _both(
    'vision_model.embeddings.position_embedding.weight',
    'visual.positional_embedding',
  ),
  'image/ln_pre': _both('vision_model.pre_layrnorm', 'visual.ln_pre'),
  'image/ln_post': _both('vision_model.post_layernorm', 'visual.ln_post'),
  'image/block': _both(
    'vision_model.encoder.layers.', 'visual.transformer.resblocks.'
  ),
  'image/projection/kernel': _both('visual_projection.weight', 'visual.proj'),
  'text/token_embedding': _both(
    'text_model.embeddings.token_embedding.weight', 'token_embedding.weight'
  ),
  'text/positional_embedding': _both(
    'text_model.embeddings.position_embedding.weight', 'positional_embedding'
  ),
  'text/ln_final': _both('text_model.final_layer_norm', 'ln_final'),
  'text/block': _both('text_model.encoder.layers.', 'transformer.resblocks.'),
  'text/projection/kernel': _both('text_projection.weight', 'text_projection'),
}

_BLOCK = {
  'ln_1': _both('layer_norm1', 'ln_1'),
  'ln_2': _both('layer_norm2', 'ln_2'),
  'attention/query': _both('self_attn.q_proj', 'attn.in_proj'),
  'attention/key': _both('self_attn.k_proj', 'attn.in_proj'),
  'attention/value': _both('self_attn.v_proj', 'attn.in_proj'),
  'attention/out': _both('self_attn.out_proj', 'attn.out_proj'),
  'mlp/fc': _both('mlp.fc1', 'mlp.c_fc'),
  'mlp/proj': _both('mlp.fc2', 'mlp.c_proj'),
}
