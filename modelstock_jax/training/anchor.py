"""The anchor of a run: a pretrained image tower, and a head for its classes."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import logging
import pathlib
import re
from typing import Any

import jax
import numpy as np

from modelstock_jax import clip
from modelstock_jax import data
from modelstock_jax import merging
from modelstock_jax.clip import heads
from modelstock_jax.clip import probe
from modelstock_jax.data import cache
from modelstock_jax.formats import hashes
from modelstock_jax.formats import hub
from modelstock_jax.formats import runs
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text as text_lib
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import class_texts
from modelstock_jax.training import config as config_lib
from modelstock_jax.training import config_keys
from modelstock_jax.training import evaluation
from modelstock_jax.training import hosts
from modelstock_jax.training import sharding

Params = Any

SHIPPED = pathlib.Path(str(clip.__file__)).parent / 'pretrained'

# Texts or images of a head that is made in seconds, and not cached, are fewer.
CHEAP = 1000
# Texts on one device at a time: their activations take a few hundred MB.
CHUNK = 256
_SHOWN = 20  # labels of which the names are logged

# Files of a folder that decide an anchor, without the heads cached there.
_INPUTS = re.compile(
  r'(?!.*_head-[0-9a-f]{16}\.).*\.(safetensors|pt|pth|bin|ckpt|npy)'
  r'|tokenizer\.json|vocab\.json|merges\.txt'
)

_log = logging.getLogger(__name__)


def weights_path(weights: str) -> pathlib.Path:
  """Return the path of pretrained weights.

  Args:
    weights: `config.anchor.weights`: a file or folder, the name of weights
      that ship, or an id of the hub.

  Raises:
    FileNotFoundError: it is empty.
  """
  if not weights:
    raise FileNotFoundError(f"anchor.weights: '' is no file. {_advice()}")
  path = pathlib.Path(weights).expanduser()
  shipped = SHIPPED / f'{weights}.safetensors'
  return shipped if shipped.is_file() and not path.exists() else path


def load(config: config_lib.Config, placement: sharding.Placement) -> Params:
  """Read the pretrained CLIP and make the classifier all models start from.

  The head of `anchor.head='zero_shot'` is 100 times the mean normalised text
  embedding of the class in every template, that of 'linear_probe' a logistic
  regression on the embeddings of `data.train`, its regularisation chosen on
  `data.validation`. A head of many texts or images is written to a file beside
  the weights, or to $XDG_CACHE_HOME/modelstock_jax if that is not possible.

  Args:
    config: of a run. A linear probe takes `evaluate.batch_size` images a step.
    placement: devices that make the head.

  Returns:
    {'image': tower, 'head': {'kernel': [D, K], 'bias': [K]}}, float32,
    replicated over the mesh.

  Raises:
    FileNotFoundError: weights, prompts, tokenizer or data set are missing.
    ValueError: the weights are of another network, or damaged; prompts do not
      fit the data set, or the tokenizer the weights.
  """
  anchor, source = config.anchor, config.data
  prompts = None
  classes = data.class_names(source.dataset, data_dir=source.data_dir)
  if anchor.head == 'zero_shot':  # mistakes in prompts show at once
    prompts = class_texts.read_prompts(anchor.prompts, classes)
  names = prompts.names if prompts else classes
  labels = [f'{label} is {name}' for label, name in enumerate(names)]
  shown = map(text_lib.plain, text_lib.first(labels, _SHOWN))
  _log.info('Labels: %s.', ', '.join(shown))
  pretrained = read(
    anchor.weights,
    config.model.network(),
    shardings=placement.replicated,
    text_tower=prompts is not None,
    allow_pickle=anchor.allow_pickle,
  )
  clip_model, params = pretrained
  inputs: tuple[Any, ...]
  if prompts:
    text: Any = clip_model.config.text  # which `read` has required
    weights = weights_path(anchor.weights)
    tokens = class_texts.tokenize(anchor, prompts, text, weights)
    make = functools.partial(
      zero_shot_head, clip_model, params, tokens, placement
    )
    cost = tokens.shape[0] * tokens.shape[1]
    inputs = {'text': params['text'], 'tokens': tokens}, clip_model.config
  else:
    make, cost, inputs = _linear_probe(
      config, len(classes), pretrained, placement
    )
  if cost < CHEAP:
    head = make()
  else:
    file = f'{anchor.head}_head-{digest(*inputs)[:16]}.npy'
    places = cache.places(_folder(weights_path(anchor.weights)), file)
    shape = (clip_model.config.embed_dim + 1, len(classes))
    head = _cached(make, places, shape)
  return {
    'image': params['image'],
    'head': jax.device_put(head, placement.replicated),
  }


def zero_shot_head(
  model: clip.CLIP,
  params: Params,
  tokens: np.ndarray,
  placement: sharding.Placement,
) -> Params:
  """Make the head that classifies by the nearest description of a class.

  Each device embeds a few hundred texts at a time, which bounds the memory.

  Args:
    model: the functions of the CLIP.
    params: of the CLIP, replicated over the mesh; 'text' matters.
    tokens: int32[K, T, L]: K classes in T templates, of L tokens each.
    placement: the texts, if they are many, are spread over all its devices.

  Returns:
    {'kernel': float32[D, K], 'bias': float32[K]}, the bias zero.
  """
  number = tokens.shape[0] * tokens.shape[1]
  # A cheap head is not cached: its bits must not depend on the mesh.
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


def of_runs(
  weights: pathlib.Path, steps: Sequence[pathlib.Path]
) -> dict[str, tensors_lib.Tensor]:
  """Make the anchor of runs again, from what they record.

  Args:
    weights: the pretrained weights.
    steps: folders of checkpoints of runs, see `runs.find`.

  Returns:
    The tower and the head by their paths, such as 'head/kernel'.

  Raises:
    FileNotFoundError: what the head is made of is not there.
    ValueError: a run started from other weights, prompts or data.
  """
  config = config_lib.from_json(steps[0].parents[1] / runs.CONFIG)
  settings = config.anchor.model_copy(update={'weights': str(weights)})
  records = [runs.read_meta(step)['config'] for step in steps]

  expected = settings.head, config.data.dataset, digest_files(settings)
  for step, record in zip(steps, records, strict=True):
    head, source = record['anchor']['head'], record['data']
    digest = record.get('inputs', {}).get('anchor')
    probed = head == 'linear_probe' and source != records[0]['data']
    if (head, source['dataset'], digest) != expected or probed:
      raise ValueError(
        f'{step} did not start from {weights} with the head of {steps[0]}: '
        'other weights, prompts, tokenizer or data. Give its own anchor.'
      )
  config = config.model_copy(update={'anchor': settings})
  params = load(config, sharding.place())
  return {
    merging.path_name(path): tensors_lib.in_memory(np.asarray(leaf))
    for path, leaf in jax.tree.leaves_with_path(params)
  }


def read(
  weights: str,
  network: clip.CLIPConfig,
  *,
  shardings: Any = None,
  text_tower: bool = False,
  allow_pickle: bool = False,
) -> clip.Pretrained:
  """Read a CLIP, checking that it is of a given network.

  Args:
    weights: `config.anchor.weights`.
    network: the sizes that the config states.
    shardings: see `clip.load_pretrained`.
    text_tower: True to require the text tower as well.
    allow_pickle: see `clip.load_pretrained`.

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: they are damaged, have no text tower, or are of another
      network: all that differs is listed.
  """
  with text_lib.explained(
    f'anchor.weights: {weights!r}: ', f' {_advice()}', class_texts.ERRORS
  ):
    pretrained = clip.load_pretrained(
      weights_path(weights),
      shardings=shardings,
      allow_pickle=allow_pickle,
      activation=network.activation,
    )
  wanted, sizes = sizes_by_key(network), sizes_by_key(pretrained.model.config)
  text_lib.raise_problems(
    f'anchor.weights: {weights!r} is of another network than the config. Set '
    'these keys to the values of the weights, or use other weights.',
    [
      f'{key}: config {wanted[key]!r}, weights {value!r}'
      for key, value in sizes.items()
      if value != wanted.get(key, value)
    ],
  )
  if text_tower and pretrained.model.config.text is None:
    raise ValueError(
      f'anchor.weights: {weights!r} has no text tower. Set '
      "anchor.head='linear_probe', which requires none, or give the weights of "
      'both towers.'
    )
  return pretrained


def sizes_by_key(network: clip.CLIPConfig) -> dict[str, int | str]:
  """Return the sizes of a network by the keys of a config."""
  sizes = dataclasses.asdict(network)
  towers = {'image': sizes.pop('vision'), 'text': sizes.pop('text')}
  by_key = changes_lib.flatten({'model': {**sizes, **towers}})
  return {key: size for key, size in by_key.items() if size is not None}


def _linear_probe(
  config: config_lib.Config,
  num_classes: int,
  pretrained: clip.Pretrained,
  placement: sharding.Placement,
) -> tuple[Callable[[], Params], int, tuple[Any, ...]]:
  """Return what makes a head, of how many images, and what it depends on."""
  model, params = pretrained
  splits = config.data
  preprocess = splits.normalizer()
  benchmarks = [
    data.Benchmark('features', splits.dataset, split)
    for split in (splits.train, splits.validation)
  ]
  sources = [
    data.open_benchmark(benchmark, splits.data_dir) for benchmark in benchmarks
  ]

  def embed(benchmark: data.Benchmark, source: data.Source) -> Any:
    size = model.config.vision.image_size
    return evaluation.image_features(
      model.encode_image,
      preprocess,
      {'image': params['image']},
      placement,
      source,
      data.benchmark_reader(benchmark, source, size),
      batch_size=config.evaluate.batch_size,
    )

  def make() -> Params:
    best = probe.linear_probe(
      *map(embed, benchmarks, sources),
      num_classes=num_classes,
      sharding=placement.examples,
    )
    _log.info(
      'Linear probe: validation accuracy on %s is %.4f with l2=%.3g, the best '
      'of %d.',
      *(splits.validation, best.accuracy, best.l2, len(best.tried)),
    )
    return best.head

  examples = tuple((source.name, len(source)) for source in sources)
  settings = (model.config, *splits.pixels, examples, probe.STRENGTHS)
  return make, sum(map(len, sources)), (params['image'], *settings)


def _cached(
  make: Callable[[], Params], places: list[Any], shape: tuple[int, int]
) -> Params:
  """Read kernel and bias, in one array, or make and keep them."""
  array = cache.load(places, shape)
  # Where one of them has no file, all processes make the head together.
  if all(hosts.gather('' if array is None else 'read')):
    assert array is not None
    return {'kernel': array[:-1], 'bias': array[-1]}
  head = make()
  if jax.process_index() == 0:
    cache.save(places, np.concatenate([head['kernel'], head['bias'][None]]))
  return head


def digest(arrays: Any, *settings: object) -> str:
  """Return the SHA-256 of arrays and of the `repr` of settings.

  >>> digest({'w': np.zeros(2)}, 'train') == digest({'w': np.zeros(2)}, 'test')
  False
  """
  result = hashlib.sha256(repr(settings).encode())
  for path, leaf in jax.tree.leaves_with_path(arrays):
    array = np.asarray(leaf, order='C')
    name = f'{merging.path_name(path)} {array.dtype.name} {array.shape}'
    result.update(name.encode())
    result.update(array.tobytes())
  return result.hexdigest()


def digest_files(anchor: config_keys.Anchor) -> str:
  """Return the SHA-256 of the files that an anchor is made of.

  They are the weights, and what its head is made from: prompts and tokenizer.
  """
  weights = hub.local_path(weights_path(anchor.weights))
  step = runs.find(weights) if weights.is_dir() else None
  inside = (step / runs.MERGED).rglob('*') if step else weights.glob('*')
  files = [x for x in sorted(inside) if step or _INPUTS.fullmatch(x.name)]
  files += map(pathlib.Path, (weights, anchor.prompts, anchor.tokenizer))
  files = [path.expanduser() for path in files]
  return digest((), *(hashes.digest(x) for x in files if x.is_file()))


def _folder(weights: pathlib.Path) -> pathlib.Path | None:
  """Return the folder of weights; None for a run, or the cache of the hub."""
  if weights.is_dir():
    return None if runs.find(weights) else weights
  return weights.parent if weights.exists() else None


def _advice() -> str:
  ours = sorted(file.stem for file in SHIPPED.glob('*.safetensors'))
  return (
    'Give a checkpoint that clip.load_pretrained reads, or the name of one '
    f'that ships: {ours}.'
  )
