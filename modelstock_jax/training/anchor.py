"""The anchor of a run: a pretrained image tower, and a head for its classes."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import heads
from modelstock_jax.clip import probe
from modelstock_jax.clip import prompts as prompts_lib
from modelstock_jax.data import labels as labels_lib
from modelstock_jax.formats import runs
from modelstock_jax.training import class_texts
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import features as features_lib
from modelstock_jax.training import sharding

Params = Any

SHIPPED = pathlib.Path(str(clip.__file__)).parent / 'pretrained'

# A head from fewer texts, or images, is made in seconds and kept in no file.
CHEAP = 1000
# Texts on one device at a time: their activations take a few hundred MB.
CHUNK = 256

_log = logging.getLogger(__name__)


def network_config(config: config_lib.ConfigDict) -> clip.CLIPConfig:
  """The sizes of both towers that `config.model` asks for.

  >>> network_config(config_lib.defaults()) == clip.SIZES['ViT-B/32']
  True
  """
  return clip_config.from_dict(config.model.to_dict())


def weights_path(config: config_lib.ConfigDict) -> pathlib.Path:
  """The pretrained weights: a file or folder, or an id of the hub as a path.

  Raises:
    FileNotFoundError: `anchor.weights` is not set.
  """
  weights = config.anchor.weights
  if not weights:
    raise FileNotFoundError(f"anchor.weights: '' is no file. {_advice()}")
  path = pathlib.Path(weights).expanduser()
  shipped = SHIPPED / f'{weights}.safetensors'
  return shipped if shipped.is_file() and not path.exists() else path


def load(
  config: config_lib.ConfigDict, placement: sharding.Placement | None = None
) -> Params:
  """Reads the pretrained CLIP and makes the classifier all models start from.

  The head of `anchor.head='zero_shot'` is 100 times the mean normalised text
  embedding of the class in every template, that of 'linear_probe' a logistic
  regression on the embeddings of `data.train`, its regularisation chosen on
  `data.validation`. One that takes long to make is kept beside the weights, or
  in $XDG_CACHE_HOME/modelstock_jax where there is no place beside them.

  Args:
    config: of the run; `model`, `anchor` and `data` matter.
    placement: where the work is done; None for all devices.

  Returns:
    {'image': tower, 'head': {'kernel': [D, K], 'bias': [K]}}, float32,
    replicated over the mesh.

  Raises:
    FileNotFoundError: weights, prompts, tokenizer or data set are missing.
    ValueError: the weights are of another network, or damaged; prompts do not
      fit the data set, or the tokenizer the weights.
  """
  if placement is None:
    placement = sharding.place(
      stock=1,
      num_models=config.merge.num_models,
      batch_size=len(jax.devices()),
    )
  weights = weights_path(config)
  classes = _classes(config)
  if config.anchor.head == 'zero_shot':
    prompts = class_texts.read_prompts(
      config, classes
    )  # whose mistakes show at once
    pretrained = read(config, placement.replicated)
    head = _zero_shot(config, prompts, pretrained, weights, placement)
  else:
    pretrained = read(config, placement.replicated)
    head = _linear_probe(config, len(classes), pretrained, weights, placement)
  return {
    'image': pretrained.params['image'],
    'head': jax.device_put(head, placement.replicated),
  }


def class_tokens(config: config_lib.ConfigDict) -> np.ndarray:
  """Every class in every template, int32[K, T, L].

  Raises:
    FileNotFoundError: weights, prompts, tokenizer or data set are missing.
    ValueError: prompts do not fit the data set, or the tokenizer the weights.
  """
  prompts = class_texts.read_prompts(config, _classes(config))
  text = network_config(config).text
  assert text is not None  # as every config has it
  return class_texts.tokenize(config, prompts, text, weights_path(config))


def _classes(config: config_lib.ConfigDict) -> Sequence[str]:
  return data.class_names(
    config.data.dataset, data_dir=config.data.data_dir or None
  )


def read_with_text(
  config: config_lib.ConfigDict, placement: sharding.Placement
) -> clip.Pretrained:
  """Read the CLIP of `anchor.weights`, replicated over the mesh.

  Raises:
    FileNotFoundError: as `read`.
    ValueError: likewise; or it has no text tower.
  """
  pretrained = read(config, placement.replicated)
  if pretrained.model.config.text is None:
    raise ValueError(
      f'anchor.weights: {config.anchor.weights!r} has no text tower, which '
      'this way of training takes. Give the weights of both towers.'
    )
  return pretrained


def zero_shot_head(
  model: clip.CLIP,
  params: Params,
  tokens: np.ndarray,
  placement: sharding.Placement,
) -> Params:
  """The head that classifies by the nearest description of a class.

  The texts are embedded a few hundred at a time on each device, which bounds
  the memory; only their embeddings, float32[K * T, D], are kept.

  Args:
    model: the functions of the CLIP.
    params: of the CLIP, replicated over the mesh; 'text' matters.
    tokens: int32[K, T, L]: K classes in T templates, of L tokens each.
    placement: the texts, if they are many, are spread over all its devices.

  Returns:
    {'kernel': float32[D, K], 'bias': float32[K]}, the bias zero.
  """
  number = tokens.shape[0] * tokens.shape[1]
  # A cheap head is kept in no file: its bits must not depend on the mesh.
  spread = number >= CHEAP
  devices = placement.mesh.size if spread else 1
  return heads.text_head(
    model.encode_text,
    params,
    tokens,
    batch_size=min(CHUNK * devices, number + -number % devices),
    examples=placement.examples if spread else placement.replicated,
    replicated=placement.replicated,
  )


def read(
  config: config_lib.ConfigDict,
  shardings: Any = None,
  *,
  allow_pickle: bool | None = None,
) -> clip.Pretrained:
  """Reads the CLIP of `anchor.weights`.

  Args:
    config: of the run; `model` and `anchor` matter.
    shardings: see `clip.load_pretrained`.
    allow_pickle: in place of `anchor.allow_pickle`.

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: they are damaged, or of another network than `model`: all that
      differs is listed.
  """
  wanted = network_config(config)
  if allow_pickle is None:
    allow_pickle = config.anchor.allow_pickle
  with class_texts.about_setting(
    f'anchor.weights: {config.anchor.weights!r}', _advice()
  ):
    pretrained = clip.load_pretrained(
      weights_path(config),
      shardings=shardings,
      image_size=wanted.vision.image_size,
      allow_pickle=allow_pickle,
    )
  found = pretrained.model.config
  ours, theirs = _sizes(wanted), _sizes(found)
  different = [
    f'{key}: config {ours[key]!r}, weights {value!r}'
    for key, value in theirs.items()
    if value != ours[key]
  ]
  if different:
    raise ValueError(
      f'anchor.weights: {config.anchor.weights!r} is of another network than '
      'the config. Set these keys to what the weights have, or take other '
      'weights.\n  ' + '\n  '.join(different)
    )
  return pretrained


def _sizes(network: clip.CLIPConfig) -> dict[str, int | str]:
  """A network by the keys of a config."""
  sizes: dict[str, int | str] = {
    'model.embed_dim': network.embed_dim,
    'model.activation': network.activation,
  }
  for name, tower in (('image', network.vision), ('text', network.text)):
    if tower:
      for key, size in dataclasses.asdict(tower).items():
        sizes[f'model.{name}.{key}'] = size
  return sizes


def _zero_shot(
  config: config_lib.ConfigDict,
  prompts: prompts_lib.Prompts,
  pretrained: clip.Pretrained,
  weights: pathlib.Path,
  placement: sharding.Placement,
) -> Params:
  model, params = pretrained
  if model.config.text is None:
    raise ValueError(
      f'anchor.weights: {config.anchor.weights!r} has no text tower, which '
      "anchor.head='zero_shot' takes. Set anchor.head='linear_probe', which "
      'takes none, or give the weights of both towers.'
    )
  tokens = class_texts.tokenize(config, prompts, model.config.text, weights)
  make = functools.partial(zero_shot_head, model, params, tokens, placement)
  number = len(prompts.names) * len(prompts.templates)
  if number < CHEAP:
    return make()
  key = features_lib.digest(
    {'text': params['text'], 'tokens': tokens}, model.config
  )
  about = {
    'weights': config.anchor.weights,
    'prompts': config.anchor.prompts,
    'dataset': config.data.dataset,
    'templates': str(len(prompts.templates)),
  }
  shape = (model.config.embed_dim, len(prompts.names))
  _log.info('Zero-shot head of %d classes from %d texts.', shape[1], number)
  path = _cache(weights) / f'zero_shot_head-{key[:16]}.safetensors'
  return _kept(path, shape, about, make)


def _linear_probe(
  config: config_lib.ConfigDict,
  num_classes: int,
  pretrained: clip.Pretrained,
  weights: pathlib.Path,
  placement: sharding.Placement,
) -> Params:
  model, params = pretrained
  dataset, data_dir = config.data.dataset, config.data.data_dir or None
  preprocess = functools.partial(
    data.normalize, mean=config.data.mean, std=config.data.std
  )
  splits = (config.data.train, config.data.validation)
  sources = [data.open_source(dataset, s, data_dir=data_dir) for s in splits]
  cheap = sum(map(len, sources)) < CHEAP
  tower = '' if cheap else features_lib.digest(params['image'], model.config)
  settings = (tower, config.data.mean, config.data.std)
  keys = [features_lib.digest({}, *settings, s.name, len(s)) for s in sources]

  def embed(split: str) -> features_lib.Features:
    return features_lib.image_features(
      model.encode_image,
      preprocess,
      {'image': params['image']},
      placement,
      data.Benchmark('features', dataset, split),
      image_size=model.config.vision.image_size,
      batch_size=config.evaluate.batch_size,
      data_dir=data_dir,
    )

  def features(split: str, key: str) -> features_lib.Features:
    compute = functools.partial(embed, split)
    if cheap:
      return compute()
    path = _cache(weights) / f'features-{key[:16]}.npz'
    return features_lib.cached_features(path, key, compute)

  def make() -> Params:
    found = probe.linear_probe(
      *(features(s, key) for s, key in zip(splits, keys, strict=True)),
      num_classes=num_classes,
      sharding=placement.examples,
    )
    _log.info(
      'Linear probe: %.4f of %s are right with l2=%.3g, the best of %d.',
      *(found.accuracy, splits[1], found.l2, len(found.tried)),
    )
    return found.head

  if cheap:
    return make()
  key = features_lib.digest({}, keys, probe.STRENGTHS)
  about = {
    'weights': config.anchor.weights,
    'dataset': dataset,
    'train': splits[0],
    'validation': splits[1],
  }
  shape = (model.config.embed_dim, num_classes)
  path = _cache(weights) / f'linear_probe_head-{key[:16]}.safetensors'
  return _kept(path, shape, about, make)


def _cache(weights: pathlib.Path) -> pathlib.Path:
  """A folder for what is made of the weights: theirs, or the user's cache."""
  folder = weights if weights.is_dir() else weights.parent
  # A run's workdir is the run's; the hub's cache is the hub's.
  ours = weights.exists() and not (weights.is_dir() and runs.find(weights))
  if ours and os.access(folder, os.W_OK):
    return folder
  folder = labels_lib.user_cache()
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def _kept(
  path: pathlib.Path,
  shape: tuple[int, int],
  about: Mapping[str, str],
  make: Callable[[], Params],
) -> Params:
  """The head [D, K] in a file, made and written if it is not there, whole."""
  like = {
    'kernel': jax.ShapeDtypeStruct(shape, jnp.float32),
    'bias': jax.ShapeDtypeStruct(shape[1:], jnp.float32),
  }
  head = None
  try:
    head = clip.load_safetensors(path, like)
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as error:
    _log.warning('%s cannot be read and is made again: %s', path, error)
  if sharding.all_processes_agree(head is not None):
    _log.info('The head is that in %s.', path)
    return head
  head = make()
  if jax.process_index() == 0:
    try:
      clip.save_safetensors(head, path, about)
    except OSError as error:
      _log.warning('The head could not be kept in %s: %s', path, error)
  return head


def _advice() -> str:
  ours = sorted(file.stem for file in SHIPPED.glob('*.safetensors'))
  return (
    'It takes a checkpoint that clip.load_pretrained reads, or one of those '
    f'that ship: {ours}.'
  )
