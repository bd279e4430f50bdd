"""CLIPs and classification heads in the formats of other tools."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import shutil
from typing import Any
from typing import Literal
from typing import get_args

import jax
from jax import numpy as jnp
import numpy as np

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import config_files
from modelstock_jax.clip import layouts
from modelstock_jax.clip import model as clip_model
from modelstock_jax.clip import weights
from modelstock_jax.formats import compare
from modelstock_jax.formats import npy
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import text as text_lib
from modelstock_jax.formats import write

Params = Any
Format = Literal['huggingface', 'open_clip', 'scenic']

# transformers refuses a file that does not name its framework.
_METADATA = {'format': 'pt'}
HEAD = 'classifier.safetensors'
LABELS = 'labels.json'

# Mean and standard deviation of the pixels of CLIP's training images, 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_TOKENIZER = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'vocab.json',
  'merges.txt',
)


def save_pretrained(
  params: Params,
  directory: text_lib.PathLike,
  format: Format = 'huggingface',
  *,
  config: clip_config.CLIPConfig,
  labels: Sequence[str] | None = None,
  card: str | None = None,
  tokenizer: text_lib.PathLike | None = None,
  mean: Sequence[float] = MEAN,
  std: Sequence[float] = STD,
) -> None:
  """Write a CLIP into a new folder, as another tool reads it.

  * 'huggingface': `transformers.CLIPModel.from_pretrained(directory)`, or
    `CLIPVisionModelWithProjection` where `params` have no 'text'.
  * 'open_clip': `open_clip.create_model('local-dir:' + directory)`.
  * 'scenic': `clip.npy`, the `checkpoint_path` of `load_model_vars` in
    Scenic's CLIP project.

  A classification head among the params goes into `classifier.safetensors`
  ('weight' [K, D] and 'bias' [K], as `torch.nn.Linear` has them) with the
  names of its classes in `labels.json`; see `load_head`.

  Args:
    params: {'image', 'text', 'logit_scale'} and perhaps 'head', as from
      `load_pretrained`; without 'text' and 'logit_scale' an image tower.
    directory: the folder to write, which appears when it is complete. It may
      exist if it is empty.
    format: of the files.
    config: the sizes, such as `model.config`.
    labels: K names, in the order of the head's classes.
    card: Markdown for `README.md`.
    tokenizer: folder whose tokenizer files are copied.
    mean: of the pixels, 0..1, for each channel.
    std: standard deviation of the pixels.

  Raises:
    FileExistsError: `directory` is not empty.
    ValueError: params and config do not fit, weights are not finite, the
      labels are not as many as the head's classes, or the format cannot hold
      such a CLIP.
  """
  if format not in get_args(Format):
    raise ValueError(f'format={format!r} must be one of {get_args(Format)}.')
  directory = pathlib.Path(directory)
  write.check_empty(directory)
  params = dict(params)
  head = params.pop('head', None)
  if 'text' not in params:
    config = dataclasses.replace(config, text=None)
  layout = 'huggingface' if format == 'huggingface' else 'openai'
  tensors = _tensors(params, config, layout)
  files = _config_files(format, config, mean, std)
  directory.parent.mkdir(parents=True, exist_ok=True)
  with write.replacing(directory) as folder:
    folder.mkdir()
    if format == 'scenic':
      npy.write(folder / 'clip.npy', tensors)
    else:
      prefix = 'open_clip_' if format == 'open_clip' else ''
      file = folder / f'{prefix}model.safetensors'
      safetensors.write(file, tensors, _METADATA)
    for name, content in files.items():
      _write_json(folder / name, content)
    if head is not None:
      _save_head(folder, head, labels)
    if tokenizer is not None:
      _copy_tokenizer(pathlib.Path(tokenizer), folder)
    if card is not None:
      (folder / 'README.md').write_text(card, encoding='utf-8')


def load_head(
  directory: text_lib.PathLike,
) -> tuple[dict[str, jax.Array], list[str]]:
  """Read the classification head that `save_pretrained` wrote.

  Args:
    directory: the folder.

  Returns:
    {'kernel': float32[D, K], 'bias': float32[K]} and the names of the K
    classes.

  Raises:
    FileNotFoundError: the folder holds no head.
    ValueError: the head is damaged.
  """
  path = pathlib.Path(directory) / HEAD
  stored = safetensors.read(path).tensors
  shapes = {name: tensor.shape for name, tensor in stored.items()}
  classes = shapes.get('bias', ())
  if len(shapes.get('weight', ())) != 2 or shapes['weight'][:1] != classes:
    raise ValueError(
      f"{path} is not a head: it takes 'weight' [K, D] and 'bias' [K], it "
      f'holds {text_lib.shown(shapes)}.'
    )
  with text_lib.explained(f'{directory}: {LABELS} is not JSON: '):
    names = text_lib.read_json(path.with_name(LABELS))
  if not isinstance(names, list) or len(names) != classes[0]:
    raise ValueError(
      f'{directory}: {LABELS} holds {text_lib.shown(names)}, not the names of '
      f'the {classes[0]} classes of the head. Save them together.'
    )
  head = {
    'kernel': jnp.asarray(stored['weight'].load().T),
    'bias': jnp.asarray(stored['bias'].load()),
  }
  return head, names


def _tensors(
  params: Params, config: clip_config.CLIPConfig, layout: layouts.Layout
) -> dict[str, np.ndarray]:
  """Return the tensors of a layout, on the host."""
  like = jax.eval_shape(clip_model.create(config).init, jax.random.key(0))
  leaves, expected = dict(weights.flatten(params)), dict(weights.flatten(like))
  problems = compare.differences(expected, leaves, dtypes=False)
  text_lib.raise_problems(
    f'params are not those of {config}. Give the config they are of.', problems
  )
  tensors = {}
  for entry in layouts.entries(config, layout):
    parts = [np.asarray(leaves[name], np.float32) for name in entry.leaves]
    tensors[entry.name] = layouts.join(entry, parts)
  _check_finite(tensors)
  return tensors


def _check_finite(tensors: dict[str, np.ndarray]) -> None:
  text_lib.raise_problems(
    'weights are not finite, and not saved. Save an earlier step.',
    [name for name, x in tensors.items() if not np.isfinite(x).all()],
  )


def _config_files(
  format: Format,
  config: clip_config.CLIPConfig,
  mean: Sequence[float],
  std: Sequence[float],
) -> dict[str, Any]:
  """Return the content of the JSON files of a format, by name."""
  if format == 'huggingface':
    size = config.vision.image_size
    return {
      'config.json': config_files.to_huggingface(config),
      'preprocessor_config.json': dict(
        image_processor_type='CLIPImageProcessor',
        do_convert_rgb=config.vision.channels == 3,
        do_resize=True,
        size=dict(shortest_edge=size),
        resample=3,  # bicubic, in Pillow
        do_center_crop=True,
        crop_size=dict(height=size, width=size),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
      ),
    }
  if format == 'open_clip':
    content = dict(
      model_cfg=config_files.to_open_clip(config),
      preprocess_cfg=dict(mean=list(mean), std=list(std)),
    )
    return {'open_clip_config.json': content}
  # Scenic states neither sizes nor pixels: they are constants in its reader.
  towers = [tower for tower in (config.vision, config.text) if tower]
  wrong_heads = any(tower.width != 64 * tower.heads for tower in towers)
  if config.activation != 'quick_gelu' or wrong_heads:
    raise ValueError(
      "Scenic's CLIP has heads of 64 features and QuickGELU; it cannot hold "
      f'{config}.'
    )
  return {}


def _save_head(
  folder: pathlib.Path, head: Params, labels: Sequence[str] | None
) -> None:
  weight = np.asarray(head['kernel'], np.float32).T.copy()
  tensors = {'weight': weight, 'bias': np.asarray(head['bias'], np.float32)}
  _check_finite(tensors)
  names = list(labels or ())
  if len(names) != len(weight):
    raise ValueError(
      f"params['head'] has {len(weight)} classes, labels are {len(names)}. "
      "Give labels= in the order of the classes, or leave params['head'] out."
    )
  safetensors.write(folder / HEAD, tensors, _METADATA)
  _write_json(folder / LABELS, names)


def _write_json(path: pathlib.Path, content: Any) -> None:
  text = json.dumps(content, indent=2, sort_keys=isinstance(content, dict))
  path.write_text(text + '\n', encoding='utf-8')


def _copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
  files = [source / name for name in _TOKENIZER if (source / name).is_file()]
  for file in files:
    shutil.copyfile(file, folder / file.name)
  if not files:
    raise FileNotFoundError(
      f'{source} holds none of the files of a tokenizer: {_TOKENIZER}.'
    )
