"""The merge of checkpoints on disk."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any
from typing import NamedTuple

from modelstock_jax.files import layout
from modelstock_jax.files import match as match_lib
from modelstock_jax.files import output as output_lib
from modelstock_jax.files import work
from modelstock_jax.formats import detect
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text
from modelstock_jax.formats import torch
from modelstock_jax.merging import options as options_lib

REPORT = 'model_stock.json'
# More threads would wait for the disk, and each holds windows of all models.
MOST_THREADS = 8
MAX_STRENGTH = 1000
DEFAULT = options_lib.StockOptions()


class Merge(NamedTuple):
  """The result of `merge`.

  Attributes:
    output: the folder or file that was written.
    cosine: the raw mean pairwise cosine by tensor; of `unit='filter'` a list.
    ratio: the t that was used, shaped as the cosine.
    left_out: tensors that not all had, with `common`.
    cut: tensors that had more rows in some, and the rows taken, with `common`.
    report: the JSON file that has all this.
  """

  output: pathlib.Path
  cosine: dict[str, float | list[float]]
  ratio: dict[str, float | list[float]]
  left_out: list[str]
  cut: dict[str, int]
  report: pathlib.Path


def merge(
  anchor: text.PathLike,
  models: Sequence[text.PathLike],
  output: text.PathLike,
  *,
  options: options_lib.StockOptions = DEFAULT,
  strength: float = 1.0,
  dtype: str | None = None,
  layers: str | None = None,
  select: str | None = None,
  common: bool = False,
  threads: int | None = None,
  progress: Callable[[int, int], None] | None = None,
  draw: Callable[[Merge], Mapping[str, bytes]] | None = None,
) -> Merge:
  """Merge checkpoints on disk by the angle between their displacements.

  It is `ms.model_stock` tensor by tensor, so that memory does not grow with the
  models: about 20 MB for each thread. Nothing has the name `output` until it is
  complete; after an interruption the same call starts again.

  Args:
    anchor: the pretrained checkpoint that all models started from: a file of
      safetensors or PyTorch, a Hugging Face folder (of one file or several), a
      run of this library, a checkpoint of Scenic, or one of Orbax by any
      trainer: an item, a step, or a folder of steps, whose latest counts.
    models: N >= 2 checkpoints that were fine-tuned from it.
    output: what to write, as safetensors: a file if it ends with
      '.safetensors', else a folder with the anchor's config and tokenizer. Of
      PyTorch's files, the tensors of the state dict are written. Checkpoints of
      Scenic become a folder with a checkpoint of Scenic, which is the first
      model's with other parameters; its model_state is the mean. Checkpoints
      of Orbax become one of the same form, which their trainer restores.
    options: `unit`, `average` and `clip`, as of trees. A layer is a tensor
      here; `clip=False` is what mergekit does.
    strength: multiplies every ratio.
    dtype: dtype of the merged tensors: 'float32', 'bfloat16', 'float16' or
      'float64'. None: the one that all checkpoints have.
    layers: a regular expression: tensors whose names it matches with the same
      groups share a cosine, as in `r'(.*)[.][qkv]_proj[.](.*)'`.
    select: a regular expression: only tensors whose names it matches are
      merged, and written. None: all; of a checkpoint of Orbax the sub-tree
      'params' or 'model_params', if it has one.
    common: leave out tensors that not all checkpoints have, and take the first
      rows where their numbers differ, as of embeddings of grown vocabularies.
    threads: number of threads; None: one for each core, up to 8.
    progress: is called with the bytes that are merged, and all there are.
    draw: is called with the result before it has its name; returns contents of
      further files by name, which lie where `model_stock.json` does.

  Returns:
    Where the result is, and cosine and ratio of each tensor; the same stands in
    `model_stock.json` in the folder, or `NAME.model_stock.json` beside a file.

  Raises:
    FileNotFoundError: a checkpoint, or a file of it, is not there.
    FileExistsError: `output` is there.
    ValueError: checkpoints that do not fit together, each difference named;
      a checkpoint that is damaged; wrong options.
    OSError: the disk has no room, or fails.

  Source: Jang, Yun, Han. Model Stock. ECCV 2024, arXiv:2403.19522, equation 3.

  >>> import pathlib, tempfile
  >>> import numpy as np, safetensors.numpy
  >>> folder = pathlib.Path(tempfile.mkdtemp())
  >>> for name, w in [('a', [1, 1]), ('b', [3, 1]), ('c', [3, 3])]:
  ...   tensors = {'w': np.array(w, np.float32)}
  ...   safetensors.numpy.save_file(tensors, folder / f'{name}.safetensors')
  >>> a, b, c = sorted(folder.glob('*.safetensors'))
  >>> merged = merge(a, [b, c], folder / 'merged.safetensors')
  >>> round(merged.cosine['w'], 4), round(merged.ratio['w'], 4)
  (0.7071, 0.8284)
  """
  settings = dataclasses.asdict(options) | {
    'strength': strength,
    'dtype': dtype,
    'layers': layers,
    'select': select,
  }
  _check(models, threads=threads, **settings)
  target = pathlib.Path(output).expanduser().absolute()
  checkpoints = [detect.read(path, select) for path in (anchor, *models)]
  _check_paths(checkpoints, target)
  tensors, left_out = match_lib.match(checkpoints, dtype, common)
  groups = match_lib.groups(list(tensors), layers)
  plans, companions = layout.plan(checkpoints, tensors, target)
  companions |= _companions(checkpoints, tensors, dtype, target)
  with output_lib.open_output(target, plans) as out:
    measured = work.Work(
      tensors=tensors,
      paths=[checkpoint.path for checkpoint in checkpoints],
      out=out,
      options=options,
      strength=strength,
    ).run(groups, threads or min(MOST_THREADS, os.cpu_count() or 1), progress)
    _check_moved(measured, checkpoints[1:])
    by_name = {name: group for group in measured for name in group.names}
    merged = [name for name in tensors if name in by_name]
    single = target.suffix == '.safetensors'
    result = Merge(
      output=target,
      cosine={name: by_name[name].cosine.tolist() for name in merged},
      ratio={name: by_name[name].ratio.tolist() for name in merged},
      left_out=left_out,
      cut={
        name: tensor.shape[0]
        for name, tensor in tensors.items()
        if any(stored.shape != tensor.shape for stored in tensor.stored)
      },
      report=target.with_suffix(f'.{REPORT}') if single else target / REPORT,
    )
    report = {
      'anchor': str(anchor),
      'models': [str(model) for model in models],
      **settings,
      'left_out': left_out,
      'cut': result.cut,
      'tensors': {
        name: {'cosine': result.cosine[name], 'ratio': result.ratio[name]}
        for name in merged
      },
    }
    companions[result.report.name] = _json(report, 1)
    out.publish({**companions, **(draw(result) if draw else {})})
  return result


def _check(
  models, *, strength, dtype, layers, select, threads, unit, **_
) -> None:
  problems = []
  if (dtype or 'float32') not in tensors_lib.FLOATING:
    names = ', '.join(tensors_lib.FLOATING)
    problems.append(f'dtype must be one of {names}, got {text.shown(dtype)}.')
  if isinstance(models, str | os.PathLike) or len(models) < 2:
    problems.append(
      f'models: {text.shown(models)}; a merge takes the anchor and at least '
      'two models.'
    )
  if not abs(strength) <= MAX_STRENGTH:  # nor NaN
    problems.append(
      f'strength must be at most {MAX_STRENGTH}, got {text.shown(strength)}.'
    )
  if threads is not None and threads < 1:
    problems.append(f'threads must be at least 1, got {threads}.')
  if layers is not None and unit != 'layer':
    problems.append(f"layers is for unit 'layer', not {unit!r}.")
  for key, pattern in (('layers', layers), ('select', select)):
    try:
      re.compile(pattern or '')
    except (re.error, RecursionError, OverflowError) as error:
      problems.append(
        f'{key}: {text.shown(pattern)} is no regular expression: {error}.'
      )
  if problems:
    raise ValueError('\n  '.join(problems))


def _check_paths(
  checkpoints: Sequence[detect.Checkpoint], target: pathlib.Path
) -> None:
  output_lib.check_free(target)
  if target.suffix in torch.SUFFIXES:
    raise ValueError(
      f'{target}: a merge is written as safetensors. Let --output end with '
      '.safetensors, or give a new folder.'
    )
  anchor, *models = checkpoints
  resolved = [checkpoint.path.resolve() for checkpoint in checkpoints]
  for number, path in enumerate(resolved):
    if path in resolved[:number]:
      same = 'the anchor' if path == resolved[0] else 'given twice'
      raise ValueError(
        f'{path} is {same}. A merge takes the pretrained checkpoint as the '
        'anchor, and models that were fine-tuned from it, each once.'
      )
  for model in models:
    if (anchor.kind == 'scenic') != (model.kind == 'scenic'):
      raise ValueError(
        f'{anchor.path} is of kind {anchor.kind!r}, {model.path} of kind '
        f'{model.kind!r}: their tensors have other names. Convert one of them.'
      )
  single = target.suffix == '.safetensors'
  if anchor.kind == ('scenic' if single else 'run'):
    remedy = 'name a folder' if single else 'end with .safetensors'
    raise ValueError(
      f'{target}: checkpoints of kind {anchor.kind!r} are not merged into such '
      f'an output. Let --output {remedy}.'
    )


def _companions(
  checkpoints: Sequence[detect.Checkpoint],
  tensors: Mapping[str, match_lib.Matched],
  dtype: str | None,
  target: pathlib.Path,
) -> dict[str, bytes]:
  """Read what lies beside a checkpoint, its config.json fitted to the merge."""
  if target.suffix == '.safetensors' or checkpoints[0].kind == 'scenic':
    return {}
  owner = next((c for c in checkpoints if c.companions), checkpoints[0])
  rows = {
    owner.tensors[name].shape[0]: tensor.shape[0]
    for name, tensor in tensors.items()
    if tensor.shape != owner.tensors[name].shape
  }

  def fit(section: dict[str, Any]) -> dict[str, Any]:
    for key in ('vocab_size', 'max_position_embeddings'):
      if isinstance(section.get(key), int):
        section[key] = rows.get(section[key], section[key])
    for key in ('torch_dtype', 'dtype'):
      if dtype is not None and isinstance(section.get(key), str):
        section[key] = dtype
    return section

  companions = {path.name: path.read_bytes() for path in owner.companions}
  if 'config.json' in companions and (rows or dtype):
    where = f'{owner.path / "config.json"} is not JSON: '
    with text.explained(where):
      text.parse_json(companions['config.json'])  # within limits
      config = json.loads(companions['config.json'], object_hook=fit)
    companions['config.json'] = _json(config, 2)
  return companions


def _json(value: Any, indent: int) -> bytes:
  return (json.dumps(value, indent=indent) + '\n').encode()


def _check_moved(
  measured: Sequence[work.Measured], models: Sequence[detect.Checkpoint]
) -> None:
  for number, model in enumerate(models):
    if measured and not any(group.moved[number] for group in measured):
      raise ValueError(
        f'{model.path} is equal to the anchor in every tensor: it was not '
        'fine-tuned, or is the pretrained checkpoint itself.'
      )
