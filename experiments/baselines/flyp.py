"""FLYP as a `Task`: both towers, on images and captions of their classes.

Commands: `modelstock train --config=experiments/baselines/flyp.py
--workdir=...` on handwritten digits; on ImageNet with CLIP ViT-B/16 `modelstock
train --config=experiments/baselines/flyp.py:clip_vit_b16 --workdir=...
--config.data.data_dir=...`. Then `modelstock evaluate --workdir=...`, with the
same `--config`.

The loss is CLIP's of pairs, each image with its class in a template drawn at
random; the head is the zero-shot one of the fine-tuned text tower (Goyal et
al. Finetune like you pretrain. CVPR 2023, arXiv:2212.00638). On ImageNet the
recipe is theirs: AdamW 1e-5, weight decay 0.1, batch 512, 10 epochs, 500
warm-up steps, cosine, crops of 0.9 to 1; gradients are not clipped. On digits
everything else is that of `configs/digits.py`, its two models and their merge,
of both towers, included: FLYP itself is one of them,
`--config.merge.num_models=1`. The learning rate is the demo's; none was tried
beside it.

Expected on ImageNet are the paper's numbers: top-1 accuracy in per cent on
ImageNet (IN), on four shifts, and their mean.

  method          IN     shifts     V2      R      A    Sketch
  FLYP           82.6     60.5     73.0   71.4   48.1    49.6

Source: Jang, Yun, Han, arXiv:2403.19522, as in the slides of the ECCV 2024
talk; it does not publish how these rows were made. ImageNet: not yet run.
"""

import operator

import jax
from jax import numpy as jnp
import numpy as np
import recipes

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax.clip import heads
from modelstock_jax.data import captions as captions_lib
from modelstock_jax.training import anchor as anchor_lib
from modelstock_jax.training import class_texts
from modelstock_jax.training import clip_task
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import losses
from modelstock_jax.training import sharding
from modelstock_jax.training import task as task_lib

# Of CLIP's prompts for ImageNet.
TEMPLATES = 80


def get_config(name: str = 'digits') -> config_lib.ConfigDict:
  """Return the config of one run, on the data of a recipe."""
  config = recipes.get_config(name)
  if name == 'clip_vit_b16':
    config.train.learning_rate = 1e-5
    config.train.clip_norm = 0.0
  return config


def get_task(config: config_lib.ConfigDict) -> task_lib.Task:
  """Return the task of pairs of images and captions.

  The params are {'image', 'text', 'logit_scale'}; what is evaluated is the
  image tower with the zero-shot head of the fine-tuned text tower.

  Args:
    config: of the run; the captions are `anchor.prompts` with the class.

  Raises:
    ValueError: the config asks for what pairs of captions do not have.
  """
  _check(config)
  sizes, dtype = config.model.network(), config.model.dtype
  both = clip.create(sizes, dtype, remat=config.train.remat)
  num_classes = clip_task.count_classes(config.data)
  preprocess = config.data.normalizer()
  model = clip.classifier(sizes, num_classes, dtype)

  def draw(batch, key, consts, hyper):
    del hyper
    return {**batch, 'texts': captions(key, consts, batch['label'])}

  def loss(params, variables, batch, key, anchor, consts):
    del key, anchor, consts
    image = preprocess(batch['image'])
    logits = pair_logits(
      both.encode_image(params, image),
      both.encode_text(params, batch['texts']),
      params['logit_scale'],
    )
    pairs = jnp.arange(logits.shape[0])
    metrics = {'accuracy': losses.accuracy(logits, pairs)}
    return contrastive(logits), (metrics, variables)

  plain = clip.create(sizes, dtype)

  def deploy(params, consts):
    if isinstance(consts, jax.core.Tracer):  # for its shape alone
      kernel = jnp.zeros((sizes.embed_dim, num_classes))
      head = {'kernel': kernel, 'bias': jnp.zeros(num_classes)}
      return {'image': params['image'], 'head': head}
    placement = sharding.Placement(consts.sharding.mesh)
    tokens = np.asarray(consts)
    head = anchor_lib.zero_shot_head(plain, params, tokens, placement)
    head = jax.device_put(head, placement.replicated)
    return {'image': params['image'], 'head': head}

  def load(placement):
    tokens = class_tokens(config)
    return read(config, placement).params, {}, tokens

  length = _text_sizes(config).context_length
  shape = (num_classes, num_templates(config), length)
  return clip_task.classification(model, preprocess, sizes.vision)._replace(
    init=lambda key: (both.init(key), {}),
    loss=loss,
    draw=draw,
    deploy=deploy,
    consts=jax.ShapeDtypeStruct(shape, jnp.int32),
    load=load,
  )


def num_templates(config: config_lib.ConfigDict) -> int:
  """Return the number of templates; a file of prompts has as many as CLIP."""
  characters = config.anchor.prompts == 'characters'
  return len(captions_lib.TEMPLATES) if characters else TEMPLATES


def class_tokens(config: config_lib.ConfigDict) -> np.ndarray:
  """Tokenize every class in every template of a config, int32[K, T, L].

  Raises:
    FileNotFoundError: weights, prompts, tokenizer or data set are missing.
    ValueError: prompts do not fit the data set, or the tokenizer the weights.
  """
  anchor = config.anchor
  text = _text_sizes(config)
  names = data.class_names(config.data.dataset, data_dir=config.data.data_dir)
  prompts = class_texts.read_prompts(anchor.prompts, names)
  weights = anchor_lib.weights_path(anchor.weights)
  return class_texts.tokenize(anchor, prompts, text, weights)


def read(
  config: config_lib.ConfigDict, placement: sharding.Placement
) -> clip.Pretrained:
  """Read both towers of the CLIP of a config, replicated over the mesh."""
  return anchor_lib.read(
    config.anchor.weights,
    config.model.network(),
    shardings=placement.replicated,
    text_tower=True,
    allow_pickle=config.anchor.allow_pickle,
  )


def _text_sizes(config: config_lib.Config) -> clip.TextConfig:
  """Return the sizes of the text tower; ValueError if there is none."""
  text = config.model.network().text
  if text is None:
    raise ValueError(
      f'anchor.weights: {config.anchor.weights!r} has no text tower, which '
      'this way of training takes. Give the weights of both towers.'
    )
  return text


def _check(config: config_lib.ConfigDict) -> None:
  wanted = {
    'train.label_smoothing': 0.0,
    'train.mixup': 0.0,
    'anchor.head': 'zero_shot',
    # The captions of a batch are each other's alternatives.
    'train.accumulate': 1,
  }
  problems = [
    f'{key}: must be {value!r} in FLYP, which trains on pairs with captions, '
    f'got {operator.attrgetter(key)(config)!r}.'
    for key, value in wanted.items()
    if operator.attrgetter(key)(config) != value
  ]
  if problems:
    raise ValueError('\n'.join(problems))


def pair_logits(
  images: jax.Array, texts: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """Return exp(log_scale) * cosine of every image with every text.

  Args:
    images: float32[B, D] embeddings, of any length.
    texts: float32[B, D] embeddings, of any length.
    log_scale: float32[].

  Returns:
    float32[B, B], a row for each image.

  >>> print(pair_logits(2 * jnp.eye(2), jnp.eye(2), jnp.log(10.0)).round())
  [[10.  0.]
   [ 0. 10.]]
  """
  return jnp.exp(log_scale) * jnp.matmul(
    heads.normalize(images),
    heads.normalize(texts).T,
    precision=jax.lax.Precision.HIGHEST,
  )


def contrastive(logits: jax.Array) -> jax.Array:
  """Return CLIP's loss of pairs, as FLYP fine-tunes with it.

  Each image has one caption, its own; captions of other images count as wrong
  even where their class is the same, as the source has it.

  Args:
    logits: float32[B, B], of `pair_logits`.

  Returns:
    float32[], nats: the mean over both directions of the cross-entropy.

  >>> round(float(contrastive(jnp.zeros((4, 4)))), 4)
  1.3863
  """
  pairs = jnp.arange(logits.shape[0])
  by_image = losses.cross_entropy(logits, pairs)
  return (by_image + losses.cross_entropy(logits.T, pairs)) / 2


def captions(key: jax.Array, tokens: jax.Array, label: jax.Array) -> jax.Array:
  """Describe each example by its class in a template drawn at random.

  Args:
    key: decides the templates.
    tokens: int32[K, T, L], every class in every template.
    label: int32[B].

  Returns:
    int32[B, L].

  >>> tokens = jnp.arange(6).reshape(3, 1, 2)
  >>> captions(jax.random.key(0), tokens, jnp.array([2, 0])).tolist()
  [[4, 5], [0, 1]]
  """
  template = jax.random.randint(key, label.shape, 0, tokens.shape[1])
  return tokens[label, template]
