"""The anchor of a run: pretrained image tower, zero-shot head."""

import functools
import pathlib
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.training import config as config_lib

Params = Any

SHIPPED = pathlib.Path(str(clip.__file__)).parent / 'pretrained'


def network_config(config: config_lib.ConfigDict) -> clip.CLIPConfig:
  """The sizes of both towers that `config.model` asks for."""
  sizes = config.model
  return clip.CLIPConfig(
    embed_dim=sizes.embed_dim,
    vision=clip.VisionConfig(**sizes.image.to_dict()),
    text=clip.TextConfig(**sizes.text.to_dict()),
  )


def weights_path(config: config_lib.ConfigDict) -> pathlib.Path:
  """The file of the pretrained weights; a bare name ships with the package.

  Raises:
    FileNotFoundError: naming `anchor.weights`, where there is no such file.
  """
  weights = config.anchor.weights
  path = pathlib.Path(weights).expanduser()
  for candidate in (path, SHIPPED / f'{weights}.safetensors'):
    if weights and candidate.is_file():
      return candidate
  ours = sorted(file.stem for file in SHIPPED.glob('*.safetensors'))
  raise FileNotFoundError(
    f'anchor.weights: {weights!r} is neither a file nor one of {ours}. '
    'Give the path of a .safetensors file.'
  )


def load(config: config_lib.ConfigDict) -> Params:
  """Reads the pretrained CLIP and makes the classifier all models start from.

  Args:
    config: of the run; `anchor.weights` and `data.dataset` matter.

  Returns:
    {'image': tower, 'head': {'kernel', 'bias'}}, float32: the zero-shot
    classifier, whose head is 100 times the mean normalised text embedding of
    the class in every template.

  Raises:
    FileNotFoundError: if weights or data set are missing.
    ValueError: if the weights are of another network.
  """
  model = clip.create(network_config(config))
  like = jax.eval_shape(model.init, jax.random.key(0))
  params = clip.load_safetensors(weights_path(config), like)
  names = data.class_names(
    config.data.dataset, data_dir=config.data.data_dir or None
  )
  return zero_shot(model, params, [data.describe(name) for name in names])


def zero_shot(model: clip.CLIP, params: Params, names: list[str]) -> Params:
  """The zero-shot classifier of a CLIP for K named classes.

  Args:
    model: the functions of the CLIP.
    params: both towers.
    names: K names, put into every caption template.

  Returns:
    {'image': params['image'], 'head': {'kernel' [D, K], 'bias' [K]}}.
  """
  tokens = data.zero_shot_tokens(names)
  head = _head(model, params, tokens)
  return {'image': params['image'], 'head': head}


@functools.partial(jax.jit, static_argnums=0)
def _head(model: clip.CLIP, params: Params, tokens: jax.Array) -> Params:
  classes, templates, length = tokens.shape
  texts = jnp.reshape(tokens, (classes * templates, length))
  embeddings = model.encode_text(params, texts)
  return clip.zero_shot_head(
    jnp.reshape(embeddings, (classes, templates, embeddings.shape[-1]))
  )
