"""Models as commands read them: a CLIP, and the files next to its weights."""

import dataclasses
import pathlib
from typing import Any
from typing import NamedTuple

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import loading
from modelstock_jax.clip import saving
from modelstock_jax.formats import runs
from modelstock_jax.formats import text as text_lib
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import class_texts
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys


class Model(NamedTuple):
  """A CLIP and what belongs to it.

  Attributes:
    config: its sizes.
    params: 'image' and, as far as there are, 'head', 'text' and 'logit_scale'.
    mean: of the pixels, 0..1, for each channel.
    std: standard deviation of the pixels.
    labels: names of the head's classes in order; None if they are not known.
    tokenizer: folder of the files of the tokenizer; None if there is none.
    step: folder of the checkpoint if a run trained it.
    run: config of that run.
  """

  config: clip.CLIPConfig
  params: dict[str, Any]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  labels: list[str] | None = None
  tokenizer: pathlib.Path | None = None
  step: pathlib.Path | None = None
  run: config_lib.Config | None = None

  @property
  def num_classes(self) -> int | None:
    """Classes of the head; None without one."""
    head = self.params.get('head')
    return None if head is None else len(head['bias'])


def read(
  path: str, *, image_size: int | None = None, allow_pickle: bool = False
) -> Model:
  """Read a model: the merge of a run, or a CLIP that another tool wrote.

  Args:
    path: as `clip.load_pretrained` takes it. Of a folder its head, labels,
      tokenizer and preprocessing are read as well.
    image_size: see `clip.load_pretrained`.
    allow_pickle: likewise.

  Returns:
    The model; that of a run without the text tower, see `with_text_tower`.

  Raises:
    FileNotFoundError: there is no such file, nor a hub to ask.
    ValueError: a file is damaged, or does not belong to the others.
  """
  local = loading.local_path(path)
  step = runs.find(local) if local.is_dir() else None
  model, params = clip.load_pretrained(
    step or local, image_size=image_size, allow_pickle=allow_pickle
  )
  if step:
    run = config_lib.from_json(step.parents[1] / runs.CONFIG)
    pixels, labels = (run.data.mean, run.data.std), _class_names(run.data)
    return Model(model.config, params, *pixels, labels, step=step, run=run)
  # The other files in the folder of a lone file need not belong to it.
  folder, labels = None, None
  if local.is_dir():
    folder = local
  elif local.name == 'clip.npy':  # as save_pretrained names it
    folder = local.parent
  if folder and (folder / saving.HEAD).is_file():
    params['head'], labels = clip.load_head(folder)
    features = len(params['head']['kernel'])
    if features != model.config.embed_dim:
      raise ValueError(
        f'{folder / saving.HEAD} takes {features} features, the tower gives '
        f'{model.config.embed_dim}. Remove the file that does not belong to '
        f'{path}.'
      )
  mean, std = _pixels(local, folder, model.config.vision.channels)
  tokenizer = class_texts.tokenizer_folder(folder) if folder else None
  return Model(model.config, params, mean, std, labels, tokenizer)


def with_text_tower(model: Model, *, allow_pickle: bool = False) -> Model:
  """Add the text tower of the anchor, and its tokenizer, to that of a run.

  Args:
    model: any; one that no run trained is returned as it is.
    allow_pickle: trust the file of the anchor, if it is a pickle, whatever the
      config of the run states.

  Raises:
    FileNotFoundError: the anchor is not there.
    ValueError: it is of another network, or has no text tower.
  """
  if model.run is None:
    return model
  settings = model.run.anchor
  advice = (
    '\nThe text tower of a run is that of these weights: put them back, or '
    'convert the image tower alone with --vision-only.'
  )
  with text_lib.explained('', advice, class_texts.ERRORS):
    anchor = anchor_lib.read(
      settings.weights,
      model.run.model.network(),
      text_tower=True,
      allow_pickle=allow_pickle,
    )
  tower = {name: anchor.params[name] for name in ('text', 'logit_scale')}
  tokenizer = settings.tokenizer or anchor_lib.weights_path(settings.weights)
  return model._replace(
    config=dataclasses.replace(model.config, text=anchor.model.config.text),
    params=model.params | tower,
    tokenizer=class_texts.tokenizer_folder(pathlib.Path(tokenizer)),
  )


def without_text_tower(model: Model) -> Model:
  """Return the image tower of a model, and its head."""
  return model._replace(
    config=dataclasses.replace(model.config, text=None),
    params={k: x for k, x in model.params.items() if k in ('image', 'head')},
    tokenizer=None,
  )


def _class_names(settings: config_keys.Data) -> list[str] | None:
  """Return the names of the classes of a data set, if it is at hand."""
  try:
    return list(data.class_names(settings.dataset, data_dir=settings.data_dir))
  except FileNotFoundError:
    return None


def _pixels(
  path: pathlib.Path, folder: pathlib.Path | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Return mean and std of the pixels: the stated ones, or else OpenAI's."""
  with text_lib.explained(
    f'{path}: the mean and std of pixels that it states cannot be read: ',
    kinds=(ValueError, TypeError, AttributeError),
  ):
    stated = _stated_pixels(path, folder)
    mean = tuple(map(float, stated.get('mean') or saving.MEAN))
    std = tuple(map(float, stated.get('std') or saving.STD))
  if not len(mean) == len(std) == channels:
    raise ValueError(
      f'{path}: mean {mean} and std {std} of pixels are not those of images '
      f'with {channels} channels. State them in preprocessor_config.json '
      '(image_mean, image_std) next to the weights.'
    )
  return mean, std


def _stated_pixels(
  path: pathlib.Path, folder: pathlib.Path | None
) -> dict[str, Any]:
  """Return 'mean' and 'std' as far as a checkpoint states them."""
  if folder and (folder / 'preprocessor_config.json').is_file():
    stated = text_lib.read_json(folder / 'preprocessor_config.json')
    return {name: stated.get(f'image_{name}') for name in ('mean', 'std')}
  if folder and (folder / 'open_clip_config.json').is_file():
    stated = text_lib.read_json(folder / 'open_clip_config.json')
    return stated.get('preprocess_cfg') or {}
  if path.suffix == '.safetensors':  # as training.pretrain writes it
    return text_lib.parse_json(clip.read_metadata(path).get('pixels', '{}'))
  return {}
