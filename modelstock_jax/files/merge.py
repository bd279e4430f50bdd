"""The merge of checkpoints on disk."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import os
import pathlib
from typing import Any
from typing import NamedTuple

from modelstock_jax.files import axes
from modelstock_jax.files import card
from modelstock_jax.files import checks
from modelstock_jax.files import inputs
from modelstock_jax.files import inspection
from modelstock_jax.files import layout
from modelstock_jax.files import match as match_lib
from modelstock_jax.files import methods
from modelstock_jax.files import processes as processes_lib
from modelstock_jax.files import work
from modelstock_jax.formats import runs
from modelstock_jax.formats import text
from modelstock_jax.merging import options as options_lib

REPORT = 'model_stock.json'
# More threads would wait for the disk, and each holds windows of all models.
MOST_THREADS = 8
DEFAULT = options_lib.StockOptions()
STOCK = methods.Method()


class Merge(NamedTuple):
  """The result of `merge`.

  Attributes:
    output: the folder or file that was written; None if nothing was.
    cosine: the raw mean pairwise cosine by tensor; of `unit='filter'` and of
      stacked layers a list. Empty if there is one model, or no anchor.
    ratio: the t that was used, shaped as the cosine; of several alphas a list.
    left_out: tensors that not all had, with `common`.
    cut: tensors that had more rows in some, and the rows taken, with `common`.
    groups: of Model Stock, see `inspection.summarize`.
    verdicts: of Model Stock, see `inspection.judge`.
    settings: the arguments.
    report: the JSON file that has all this, if it was written.
    error: of adapters, what truncation to `rank` loses of each displacement,
      relative to its norm.
  """

  output: pathlib.Path | None
  cosine: dict[str, float | list[float]]
  ratio: dict[str, float | list[float]]
  left_out: list[str]
  cut: dict[str, int]
  groups: dict[str, dict[str, Any]]
  verdicts: dict[str, str]
  settings: dict[str, Any]
  report: pathlib.Path
  error: dict[str, float]

  def json(self) -> bytes:
    """Return the contents of the report."""
    parts = self._asdict()
    tensors = {
      name: {key: parts[key][name] for key in ('cosine', 'ratio') if parts[key]}
      for name in self.ratio
    }
    keys = ('left_out', 'cut', 'error', 'verdicts', 'groups')
    report = self.settings | {key: parts[key] for key in keys}
    return layout.to_json(report | {'tensors': tensors}, 1)


def merge(
  anchor: text.PathLike | None,
  models: Sequence[text.PathLike],
  output: text.PathLike | None,
  *,
  method: methods.Method = STOCK,
  options: options_lib.StockOptions = DEFAULT,
  strength: float = 1.0,
  dtype: str | None = None,
  layers: str | None = None,
  select: str | None = None,
  stacked: Mapping[str, int | None] | None = None,
  common: bool = False,
  rank: int | None = None,
  dense: bool = False,
  threads: int | None = None,
  process_id: int = 0,
  num_processes: int = 1,
  progress: Callable[[int, int], None] | None = None,
  draw: Callable[[Merge], Mapping[str, bytes]] | None = None,
  anchor_of_runs: inputs.AnchorOfRuns | None = None,
) -> Merge:
  """Merge checkpoints on disk, by the angle between their displacements.

  It is `ms.model_stock`, or another `method`, tensor by tensor, so that memory
  does not grow with the models: about 20 MB for each thread. Nothing has the
  name `output` until it is complete; after an interruption the same call starts
  again.

  Args:
    anchor: the pretrained checkpoint that all models started from; for runs,
      their `anchor.weights`, see `anchor_of_runs`. A
      file of
      safetensors or PyTorch, a Hugging Face folder (of one file or several), a
      run of this library, a checkpoint of Scenic, or one of Orbax by any
      trainer: an item, a step, or a folder of steps, whose latest counts. Also
      a `.msgpack` of Flax or a `.npz` of NumPy. None for a soup: config and
      tokenizer are then the first model's. The base of LoRA adapters may be
      named only, unless it is needed.
    models: N checkpoints that were fine-tuned from it: at least two for Model
      Stock, one for WiSE-FT. A checkpoint whose tensors all have one more
      leading axis than the anchor's holds as many models: the replicas of
      DiLoCo. LoRA adapters of peft become an adapter, whose rank is the sum of
      theirs. `BASE+ADAPTER` is a checkpoint with an adapter added. What is not
      on disk may be an id of the Hugging Face hub, `@revision` after it.
    output: what to write, as safetensors; None measures and writes nothing. A
      file if it ends with '.safetensors', else a folder with the anchor's
      config and tokenizer, and a model card. Of PyTorch's files, the tensors of
      the state dict are written. Checkpoints of Scenic become a folder with a
      checkpoint of Scenic, which is the first model's with other parameters;
      its model_state is the mean. Checkpoints of Orbax become one of the same
      form, which their trainer restores. Of several alphas, the folder has a
      folder 'alpha_A' for each.
    method: Model Stock, or another method with its settings.
    options: `unit`, `average` and `clip`, as of trees. A layer is a tensor
      here; `clip='mergekit'` is what mergekit does.
    strength: multiplies every ratio.
    dtype: dtype of the merged tensors: 'float32', 'bfloat16', 'float16' or
      'float64'. None: the one that all checkpoints have.
    layers: a regular expression: tensors whose names it matches with the same
      groups share a cosine, as in `r'(.*)[.][qkv]_proj[.](.*)'`. None: every
      tensor by itself; of runs of a CLIP query, key and value share one, as
      when they are merged in training.
    select: a regular expression: only tensors whose names it matches are
      merged, and written. None: all; of a checkpoint of Orbax the sub-tree
      'params' or 'model_params', if it has one.
    stacked: the axis on which a scan stacks layers, by a regular expression of
      names: `{'decoder/layers/.*': 1}`. Each index of the axis then has its own
      cosine. None as the axis: these are not stacked. Tensors below a key
      'layers' that share the length of the first or second axis are recognised.
    common: leave out tensors that not all checkpoints have, and take the first
      rows where their numbers differ, as of embeddings of grown vocabularies.
    rank: of merged adapters, the largest rank, truncated by singular values.
    dense: merge adapters into full weights; takes the base as the anchor.
    threads: number of threads; None: one for each core, up to 8.
    process_id: index of this process, from 0, if several share the tensors.
    num_processes: number of processes that are called with the same arguments,
      on any hosts that see the same files. Process 0 returns the result when
      the output is complete, the others then return that of their share.
    progress: is called with the bytes that are merged, and all there are.
    draw: is called with the result before it has its name; returns contents of
      further files by name, which lie where `model_stock.json` does.
    anchor_of_runs: makes the anchor of runs again, of the pretrained weights
      and the folders of their checkpoints, where the anchor has no head:
      `training.anchor.of_runs`, which needs jax.

  Returns:
    Where the result is, and cosine and ratio of each tensor; the same stands in
    `model_stock.json` in the folder, or `NAME.model_stock.json` beside a file.

  Raises:
    FileNotFoundError: a checkpoint, or a file of it, is not there.
    FileExistsError: `output` is there.
    ValueError: checkpoints that do not fit together, each difference named;
      a checkpoint that is damaged; wrong options.
    OSError: the disk has no room, or fails.
    TimeoutError: another process has died.

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
  settings: dict[str, Any] = dataclasses.asdict(options) | {
    'method': dataclasses.asdict(method),
    'strength': strength,
    'dtype': dtype,
    'layers': layers,
    'select': select,
    'stacked': {**(stacked or {})},
    'rank': rank,
  }
  checks.check_arguments(anchor, models, output, threads, options, settings)
  target = None
  if output is not None:
    target = pathlib.Path(output).expanduser().absolute()
  checkpoints = inputs.read(anchor, models, select, dense)
  anchored, first = anchor is not None, checkpoints[0]
  checks.check_checkpoints(checkpoints, target, anchored, method, rank)
  checkpoints = [first] * (not anchored) + checkpoints
  checkpoints, of_runs = inputs.alike(checkpoints, anchor_of_runs)
  if of_runs and layers is None and method == STOCK and options.unit == 'layer':
    settings['layers'] = layers = runs.LAYERS
  tensors, left_out = match_lib.match(checkpoints, dtype, common)
  if method.name in ('model_stock', 'lines'):
    tensors, settings['stacked'] = axes.assign(
      tensors, options.unit, stacked or {}
    )
  groups = match_lib.groups(tensors, layers)
  settings['anchor'] = str(anchor) if anchored else None
  settings['models'] = [str(checkpoint.path) for checkpoint in checkpoints[1:]]
  plans, companions, folders = [], {}, method.outputs()
  if target is not None:
    plans, companions = layout.plan(checkpoints, tensors, target, rank)
    companions |= layout.companions(
      checkpoints, tensors, left_out, dtype, target
    )
    plans = [x.inside(folder) for folder in folders for x in plans]
  shared = settings | {'models': [str(model) for model in models]}
  with processes_lib.open_output(
    target, plans, process_id, num_processes, shared
  ) as (out, processes):
    merger = work.Work(
      tensors=tensors,
      paths=[checkpoint.path for checkpoint in checkpoints],
      out=out,
      options=options,
      strength=strength,
      method=method,
      scales=method.scales(tensors),
      rank=rank,
    )
    threads = threads or min(MOST_THREADS, os.cpu_count() or 1)
    measured = processes.run(merger, groups, threads, progress)
    if anchored and process_id == 0:
      checks.check_moved(measured, checkpoints[1:])
    result = _result(target, settings, tensors, left_out, measured)
    if out is not None and process_id == 0:
      described = _describe(result, folders, companions, first.stem)
      out.publish({**described, **(draw(result) if draw else {})})
  return result


def inspect(
  anchor: text.PathLike, models: Sequence[text.PathLike], **options: Any
) -> Merge:
  """Measure what `merge` would do, and write nothing.

  Args:
    anchor: see `merge`.
    models: see `merge`.
    **options: further arguments of `merge`.

  Returns:
    Cosines and ratios; `groups` and `verdicts` tell whether the models merge.

  Raises:
    ValueError: see `merge`.

  >>> import pathlib, tempfile
  >>> import numpy as np, safetensors.numpy
  >>> folder = pathlib.Path(tempfile.mkdtemp())
  >>> for name, w in [('a', [9, 9]), ('b', [9, 8]), ('c', [8, 9])]:
  ...   tensors = {'w': np.array(w, np.float32)}
  ...   safetensors.numpy.save_file(tensors, folder / f'{name}.safetensors')
  >>> a, b, c = sorted(folder.glob('*.safetensors'))
  >>> list(inspect(a, [b, c]).verdicts)
  ['base']
  """
  return merge(anchor, models, None, **options)


def _describe(
  result: Merge,
  folders: Mapping[str, float],
  companions: dict[str, bytes],
  stem: str,
) -> dict[str, bytes]:
  """Return the contents of all files next to the tensors."""
  contents = {result.report.name: result.json()}
  for folder, alpha in folders.items():
    parts = companions | card.card(
      result.settings, result.verdicts, alpha, companions, stem
    )
    contents |= {f'{folder}{name}': data for name, data in parts.items()}
  return contents


def _result(
  target: pathlib.Path | None,
  settings: dict[str, Any],
  tensors: Mapping[str, match_lib.Matched],
  left_out: list[str],
  measured: Sequence[work.Measured],
) -> Merge:
  by_name = {name: layer for layer in measured for name in layer.names}
  merged = {name: by_name[name] for name in tensors if name in by_name}
  stock = measured if settings['method']['name'] == 'model_stock' else []
  pairs = settings['anchor'] is not None and len(settings['models']) > 1
  report = (target or pathlib.Path()) / REPORT
  if target is not None and target.suffix == '.safetensors':
    report = target.with_suffix(f'.{REPORT}')
  return Merge(
    output=target,
    cosine={name: x.cosine.tolist() for name, x in merged.items() if pairs},
    ratio={name: x.ratio.tolist() for name, x in merged.items()},
    left_out=left_out,
    cut={
      name: tensor.shape[0]
      for name, tensor in tensors.items()
      if any(stored.shape != tensor.shape for stored in tensor.stored)
    },
    groups=inspection.summarize(stock),
    verdicts=inspection.judge(stock),
    settings=settings,
    report=report,
    error={
      name: x.errors[name] for name, x in merged.items() if name in x.errors
    },
  )
