"""The block `config.model_stock` of a Scenic config."""

from typing import Literal

import ml_collections
import pydantic

from modelstock_jax.merging import options as merge_options
from modelstock_jax.training import config_keys
from modelstock_jax.training import validation

# Of Scenic's other trainers; left unsaid, these would be ignored.
_UNSUPPORTED = {
  'init_from': 'set config.model_stock.anchor',
  'accum_steps': 'use a smaller config.batch_size',
  'num_grad_accum_steps': 'use a smaller config.batch_size',
  'optax': 'set config.optimizer and config.optimizer_configs',
  'schedule': 'set config.lr_configs',
  'fewshot': 'evaluate the merged checkpoint with it',
}


class Anchor(config_keys.Section):
  """The block `config.model_stock.anchor`: what all models start from.

  Attributes:
    path: a Scenic checkpoint or workdir, an AugReg `.npz`, or what
      `modelstock_jax.clip.load_pretrained` reads. '' is the initialisation.
    head: the classification head: that of the 'checkpoint', that of the
      'init'ialisation, one made by CLIP's text tower ('zero_shot'), or a
      `.npz` file with 'kernel' [D, K] and 'bias' [K].
    prompts: JSON file with 'names' of classes and 'templates', for
      'zero_shot'.
    tokenizer: folder of CLIP's tokenizer, for 'zero_shot'; '' is that of the
      checkpoint, or OpenAI's vocabulary.
    allow_pickle: trust a `.npy` of Scenic's CLIP: a pickle, which can run any
      code.
  """

  path: str = ''
  head: str = 'checkpoint'
  prompts: str = ''
  tokenizer: str = ''
  allow_pickle: bool = False

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'Anchor':
    key = 'model_stock.anchor'
    if self.head != 'checkpoint' and not self.path:
      raise ValueError(f'{key}.path: must be set for head={self.head!r}')
    if self.head == 'zero_shot' and not self.prompts:
      raise ValueError(
        f"{key}.prompts: must name a JSON file with 'names' and 'templates'"
      )
    return self


class Options(config_keys.Section):
  """The block `config.model_stock`.

  Attributes:
    num_models: models trained side by side, each on `config.batch_size`
      examples a step; 2 or more.
    merge_every: when they are merged and continue from the merge: 'epoch',
      'end' (once), or a number of epochs.
    opt_state: what a merge does to the optimizers: 'keep' each model's
      moments, 'average' them, or 'reset'. The schedule continues.
    layers: leaves that share a cosine: each 'leaf' its own; or query, key and
      value together ('qkv'), which are one tensor in the paper's PyTorch
      models.
    unit: see `modelstock_jax.model_stock`, as the next three.
    average: 'cosine' or 'angle'.
    clip: clip the cosine to [0, 1].
    strength: multiplies every ratio.
    mesh_stock: devices along the models: 1, and all devices advance all
      models; or `num_models`, and each model has devices of its own.
    replay_data: when a run is resumed, skip the batches that it was trained on,
      to end where it would have without the interruption. False
      starts the data again, as Scenic's trainers do.
    anchor: see `Anchor`.
  """

  num_models: int = pydantic.Field(2, ge=2, le=1000)
  merge_every: config_keys.Every = 'epoch'
  opt_state: merge_options.OptState = 'reset'
  layers: Literal['leaf', 'qkv'] = 'leaf'
  unit: Literal['layer', 'model'] = 'layer'
  average: merge_options.Average = 'cosine'
  clip: bool = True
  strength: config_keys.Strength = 1.0
  mesh_stock: config_keys.Positive = 1
  replay_data: bool = True
  anchor: Anchor = Anchor()

  @property
  def stock(self) -> merge_options.StockOptions:
    """Options of the merge."""
    return merge_options.StockOptions(self.unit, self.average, self.clip)


def defaults() -> ml_collections.ConfigDict:
  """Return the block with all its keys, which `Options` explains.

  >>> config = defaults()
  >>> config.num_models, config.merge_every
  (2, 'epoch')
  """
  return ml_collections.ConfigDict(Options().model_dump())


def read(config: ml_collections.ConfigDict) -> Options:
  """Return the options of a Scenic config, after checking it.

  Args:
    config: of the run.

  Raises:
    ValueError: 'model_stock' has unknown keys or values, or the config has
      keys of other trainers of Scenic; lists all of them.

  >>> config = {'num_training_epochs': 1, 'model_stock': {'merge_every': 2}}
  >>> read(ml_collections.ConfigDict(config)).merge_every
  2
  """
  problems = [
    f'config.{key}: is not supported here; {remedy}.'
    for key, remedy in _UNSUPPORTED.items()
    if config.get(key)
  ]
  epochs = config.get('num_training_epochs')
  steps = config.get('num_training_steps')
  if bool(epochs) == bool(steps):
    problems.append(
      'config: set one of num_training_epochs and num_training_steps, got '
      f'{epochs!r} and {steps!r}.'
    )
  if problems:
    raise ValueError('\n'.join(problems))
  block = config.get('model_stock', {})
  return validation.parse(Options, block, 'model_stock.')


def merge_interval(
  options: Options, steps_per_epoch: int | None, total_steps: int
) -> int:
  """Return the steps between merges; `total_steps` for one at the end.

  Raises:
    ValueError: merging by epochs where the length of an epoch is not known.
  """
  if options.merge_every == 'end':
    return total_steps
  if not steps_per_epoch:
    raise ValueError(
      f'config.model_stock.merge_every is {options.merge_every!r}, in epochs, '
      "but the dataset's meta_data has no 'num_train_examples' (or fewer than "
      "a batch): set it there, or merge_every='end'."
    )
  epochs = 1 if options.merge_every == 'epoch' else int(options.merge_every)
  return steps_per_epoch * epochs
