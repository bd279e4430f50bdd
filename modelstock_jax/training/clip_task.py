"""Classification with a CLIP image tower and a head, as a `Task`.

The default task of a config, unless its file defines `get_task`,
`get_optimizer`, `get_source` or `get_finish`.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import numpy as jnp

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import flops
from modelstock_jax.clip import loading
from modelstock_jax.formats import hub
from modelstock_jax.formats import runs
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import auto
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import hosts
from modelstock_jax.training import losses
from modelstock_jax.training import optimizer as optimizer_lib
from modelstock_jax.training import setup as setup_lib
from modelstock_jax.training import task as task_lib

IMAGENET_CLASSES = 1000


def prepare(
  config: config_lib.Config,
  *,
  get_task: Callable[..., task_lib.Task] | None = None,
  get_optimizer: Callable[..., task_lib.Optimizer] | None = None,
  get_source: Callable[..., setup_lib.Sources] | None = None,
  get_finish: Callable[..., Any] | None = None,
) -> setup_lib.Setup:
  """Compile and load everything that the run of a config file needs.

  Args:
    config: of the run.
    get_task: config -> `Task`; None is `task`.
    get_optimizer: config -> `Optimizer`; None is `optimizer`.
    get_source: config -> `setup.Sources`; None is `sources`.
    get_finish: config, setup -> `Setup.finish`; None does nothing.

  Returns:
    A `Setup`.

  Raises:
    FileNotFoundError: weights or data are missing.
    ValueError: config, weights and data do not go together.
  """
  config = auto.resolve(config)
  if get_source:  # first, to report missing data at once
    opened = get_source(config)
  else:
    size = config.model.network().vision.image_size
    opened = sources(config.data, config.augment, size)
  setup = setup_lib.prepare(
    config,
    (get_task or task)(config),
    (get_optimizer or optimizer)(config),
    opened,
  )
  if config.anchor.weights:
    digest = hosts.run_on_process_0(
      lambda: anchor_lib.digest_files(config.anchor)
    )
    setup = setup._replace(inputs={**setup.inputs, 'anchor': digest})
  if get_finish:
    setup = setup._replace(finish=get_finish(config, setup))
  return setup


def missing_sizes(
  model: config_keys.Model, anchor: config_keys.Anchor
) -> list[str]:
  """Return flags that set the sizes that a config leaves to `anchor.weights`.

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: they cannot be read.
  """
  values = changes_lib.flatten({'model': model.to_dict()})
  missing = [key for key, size in values.items() if size is None]
  if not missing:
    return []
  network = loading.read_config(
    anchor_lib.weights_path(anchor.weights),
    allow_pickle=anchor.allow_pickle,
    activation=model.activation,
  )
  sizes = anchor_lib.sizes_by_key(network)
  return [f'--config.{key}={sizes[key]}' for key in missing if key in sizes]


def missing_pixels(
  source: config_keys.Data, anchor: config_keys.Anchor, channels: int
) -> list[str]:
  """Return flags that set the mean and std that `anchor.weights` states.

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: what they state cannot be read.
  """
  stated = {'mean': source.mean, 'std': source.std}
  if None not in stated.values():
    return []
  path = hub.local_path(anchor_lib.weights_path(anchor.weights))
  if path.is_dir() and (step := runs.find(path)):
    pixels = config_lib.from_json(step.parents[1] / runs.CONFIG).data.pixels
  else:
    pixels = loading.read_pixels(path, channels)
  return [
    f'--config.data.{key}={value}'
    for (key, old), value in zip(stated.items(), pixels, strict=True)
    if old is None
  ]


def sources(
  source: config_keys.Data, augment: config_keys.Augment, image_size: int
) -> setup_lib.Sources:
  """Open the training and validation images of a config.

  Args:
    source: names of the data set and its splits.
    augment: of the training images.
    image_size: side of an image, pixels.

  Raises:
    FileNotFoundError: they are not in `data.data_dir`.
    ValueError: there is no such split.
  """
  name, split = source.dataset, source.validation
  train, validation = (
    data.open_source(name, part, data_dir=source.data_dir)
    for part in (source.train, split)
  )
  transform = augment.transform(image_size, train.channels)
  benchmark = data.Benchmark('validation', name, split)
  return setup_lib.Sources(
    train,
    validation,
    data.image_reader(transform),
    data.benchmark_reader(benchmark, validation, image_size),
  )


def optimizer(config: config_lib.Config) -> task_lib.Optimizer:
  """Return the AdamW of a config."""
  adamw = optimizer_lib.adamw(
    weight_decay=config.train.weight_decay, clip_norm=config.train.clip_norm
  )
  return optimizer_lib.from_optax(adamw)


def task(
  config: config_lib.Config, num_classes: int | None = None
) -> task_lib.Task:
  """Return the classification of images of a config.

  Args:
    config: of the run; `model`, `anchor`, `data` and `train` matter.
    num_classes: K; None is that of the training data, which may be missing if
      it is ImageNet.

  Returns:
    A `Task` with params {'image': tower, 'head': {'kernel', 'bias'}}.

  Raises:
    ValueError: the number of classes is not known.
  """
  # It may be 'auto' in a task that only evaluates.
  sizes, train = config.model.network(), config.train.settle(remat='none')
  num_classes = num_classes or count_classes(config.data)
  model = clip.classifier(
    sizes, num_classes, config.model.dtype, remat=train.remat
  )

  def load(placement):
    return anchor_lib.load(config, placement), {}, ()

  return classification(
    model,
    config.data.normalizer(),
    sizes.vision,
    mixup=train.mixup,
    label_smoothing=train.label_smoothing,
  )._replace(
    load=load,
    flops=flops.train(sizes, num_classes),
  )


def classification(
  model: clip.Model,
  preprocess: Callable[[jax.Array], jax.Array],
  sizes: clip.VisionConfig,
  *,
  mixup: float = 0.0,
  label_smoothing: float = 0.0,
) -> task_lib.Task:
  """Return the classification of images by a network, by cross-entropy.

  Args:
    model: the network.
    preprocess: uint8 images -> what the network takes.
    sizes: of the images.
    mixup: see `draw`.
    label_smoothing: see `mixed_cross_entropy`.

  Returns:
    A `Task` that starts at random params.
  """

  def predict(deployed, variables, batch):
    del variables
    return model.apply(deployed, preprocess(batch['image']))

  def loss(params, variables, batch, key, anchor, consts):
    del key, anchor, consts
    logits = model.apply(params, images(preprocess, batch))
    value = mixed_cross_entropy(label_smoothing, logits, batch)
    metrics = {'accuracy': losses.accuracy(logits, batch['label'])}
    return value, (metrics, variables)

  def score(deployed, variables, batch):
    logits = predict(deployed, variables, batch)
    right = jnp.argmax(logits, -1) == batch['label']
    loss = losses.cross_entropies(logits, batch['label'])
    return {'accuracy': right.astype(jnp.float32), 'loss': loss}

  pixels = (sizes.image_size, sizes.image_size, sizes.channels)
  return task_lib.Task(
    init=lambda key: (model.init(key), {}),
    loss=task_lib.MeanOfExamples(loss),
    score=score,
    example={
      'image': jax.ShapeDtypeStruct(pixels, jnp.uint8),
      'label': jax.ShapeDtypeStruct((), jnp.int32),
    },
    draw=functools.partial(draw, mixup),
    predict=predict,
    layers=clip.clip_layers,
  )


def count_classes(source: config_keys.Data) -> int:
  """Return the number of classes of the training data.

  Raises:
    ValueError: the data set is not prepared, and is not ImageNet.
  """
  dataset = source.dataset
  try:
    return len(data.class_names(dataset, data_dir=source.data_dir))
  except FileNotFoundError as error:
    if dataset == 'imagenet2012':
      return IMAGENET_CLASSES
    raise ValueError(
      f'data.dataset: {dataset!r} is not prepared, so its number of classes is '
      f'not known. Give it with --num_classes=K. ({error})'
    ) from error


def draw(
  mixup: float,
  batch: task_lib.Batch,
  key: jax.Array,
  consts: Any,
  hyper: dict[str, jax.Array],
) -> task_lib.Batch:
  """Draw a partner for each example, and the share that it is mixed with.

  Args:
    mixup: alpha of Beta(alpha, alpha); 0 is off.
    batch: 'image' and 'label' of one model.
    key: of this step.
    consts: not used.
    hyper: may hold 'mixup' and 'label_smoothing' float32[] of this model.

  Returns:
    The batch, with 'partner' {'image', 'label'} and 'ratio' float32[] if
    mixup is on, and 'smoothing' float32[] if `hyper` holds it.
  """
  del consts
  if 'label_smoothing' in hyper:
    batch = {**batch, 'smoothing': hyper['label_smoothing']}
  alpha = hyper.get('mixup', mixup)
  if not isinstance(alpha, jax.Array) and not alpha:
    return batch
  key_ratio, key_partner = jax.random.split(key)
  ratio = _beta(key_ratio, alpha)
  partner = jax.random.permutation(key_partner, batch['label'].shape[0])
  mixed = {name: batch[name][partner] for name in ('image', 'label')}
  return {**batch, 'partner': mixed, 'ratio': ratio}


def _beta(key: jax.Array, alpha: float | jax.Array) -> jax.Array:
  """Draw from Beta(alpha, alpha); 1, which mixes nothing, if alpha is 0."""
  some = jnp.where(alpha > 0, alpha, 1)
  return jnp.where(alpha > 0, jax.random.beta(key, some, some), 1)


def images(
  preprocess: Callable[[jax.Array], jax.Array], batch: task_lib.Batch
) -> jax.Array:
  """Return the normalised images of a batch, mixed as `draw` has drawn."""
  image = preprocess(batch['image'])
  if 'partner' not in batch:
    return image
  ratio = batch['ratio'].astype(image.dtype)
  partner = preprocess(batch['partner']['image'])
  return ratio * image + (1 - ratio) * partner


def mixed_cross_entropy(
  label_smoothing: float, logits: jax.Array, batch: task_lib.Batch
) -> jax.Array:
  """Return the cross-entropy of a batch, mixed as `draw` has drawn.

  Args:
    label_smoothing: share of the target that all classes divide.
    logits: float32[B, K].
    batch: as `draw` returns it.

  Returns:
    float32[], nats.
  """
  smoothing = batch.get('smoothing', label_smoothing)
  loss = losses.cross_entropy(logits, batch['label'], smoothing)
  if 'partner' not in batch:
    return loss
  ratio = batch['ratio'].astype(logits.dtype)
  label = batch['partner']['label']
  other = losses.cross_entropy(logits, label, smoothing)
  return ratio * loss + (1 - ratio) * other
