"""Models as commands read them: a CLIP, and the files next to its weights."""

from collections.abc import Callable
import dataclasses
import logging
import pathlib
from typing import Any
from typing import NamedTuple

import jax

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import loading
from modelstock_jax.clip import saving
from modelstock_jax.data import sources
from modelstock_jax.formats import hub
from modelstock_jax.formats import runs
from modelstock_jax.formats import text as text_lib
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import class_texts
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import metrics
from modelstock_jax.training import state as state_lib

_log = logging.getLogger(__name__)


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
  path: str,
  *,
  image_size: int | None = None,
  allow_pickle: bool = False,
  activation: clip_config.Activation | None = None,
) -> Model:
  """Read a model: the merge of a run, or a CLIP that another tool wrote.

  Args:
    path: as `clip.load_pretrained` takes it. Of a folder its head, labels,
      tokenizer and preprocessing are read as well. A head of 1000 classes in
      the file of the weights is of ImageNet.
    image_size: see `clip.load_pretrained`.
    allow_pickle: likewise.
    activation: likewise.

  Returns:
    The model; that of a run without the text tower, see `with_text_tower`.

  Raises:
    FileNotFoundError: there is no such file, nor a hub to ask.
    ValueError: a file is damaged, or does not belong to the others.
  """
  local = hub.local_path(path)
  step = runs.find(local) if local.is_dir() else None
  model, params = clip.load_pretrained(
    step or local,
    image_size=image_size,
    allow_pickle=allow_pickle,
    activation=activation,
  )
  if step:
    run = config_lib.from_json(step.parents[1] / runs.CONFIG)
    pixels, labels = run.data.pixels, _class_names(run.data)
    return Model(model.config, params, *pixels, labels, step=step, run=run)
  folder, labels = loading.folder_of(local), None
  wnids = list(sources.imagenet_wnids())
  if 'head' in params and len(params['head']['bias']) == len(wnids):
    labels = wnids
  if folder and (folder / saving.HEAD).is_file():
    params['head'], labels = clip.load_head(folder)
    features = len(params['head']['kernel'])
    if features != model.config.embed_dim:
      raise ValueError(
        f'{folder / saving.HEAD} takes {features} features, the tower gives '
        f'{model.config.embed_dim}. Remove the file that does not belong to '
        f'{path}.'
      )
  pixels = loading.read_pixels(local, model.config.vision.channels)
  tokenizer = class_texts.tokenizer_folder(folder) if folder else None
  return Model(model.config, params, *pixels, labels, tokenizer)


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


def of_run(
  step: pathlib.Path,
  merge: config_keys.Merge,
  anchor: tuple[Any, Any],
  read: Callable[..., Any],
) -> dict[str, tuple[Any, Any]]:
  """Read the models of a checkpoint, and average them: params and variables.

  Where models have continued from a merge before, '_restarted' is in the name.
  Where they have just been put back on this one, there is nothing to compare.
  """

  def like_anchor(tree):  # as it is read, dicts have the place of any node
    leaves = {
      merging.path_name(path): leaf
      for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return jax.tree.map_with_path(
      lambda path, _: leaves[merging.path_name(path)], anchor
    )

  variables = read(runs.STATE, part='variables')
  merged = like_anchor((read(runs.MERGED), state_lib.average(variables)))
  models = {'zero_shot': anchor}
  lines = metrics.read(step.parents[1])
  restarts = [line['step'] for line in lines if line.get('restarts')]
  if int(step.name) in restarts:
    _log.warning(
      'Step %s of the run is not its last: its models have started again from '
      'this merge, and are not evaluated.',
      step.name,
    )
  elif merge.num_models > 1:
    suffix = '_restarted' if min(restarts, default=1e9) < int(step.name) else ''
    stack = like_anchor((read(runs.STATE), variables))
    for i in range(merge.num_models):
      name = f'fine_tuned_{i + 1}' if i else 'fine_tuned'
      models[name + suffix] = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
    soup = merging.uniform_soup(stack, stacked=True)
    models[f'uniform_soup{suffix}'] = soup
    first = models[f'fine_tuned{suffix}']
    models[f'wise_ft_0.5{suffix}'] = merging.wise_ft(anchor, first)
  return {**models, method_of(merge): merged}


def method_of(merge: config_keys.Merge) -> str:
  """Return the name of a run's merge in its rows; of one model, the model's.

  >>> method_of(config_keys.Merge())
  'model_stock_epoch_reset'
  """
  return 'fine_tuned' if merge.num_models == 1 else f'model_stock_{merge.mode}'
