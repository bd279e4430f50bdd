"""The merge of checkpoints on disk."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import json
import os
import pathlib
import re
from typing import Any
from typing import NamedTuple

import numpy as np

from modelstock_jax.files import angles
from modelstock_jax.files import blocks
from modelstock_jax.files import output as output_lib
from modelstock_jax.formats import detect
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.merging import options as options_lib

PathLike = str | os.PathLike[str]
Checkpoint = detect.Checkpoint

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
REPORT = 'model_stock.json'
# More threads would wait for the disk, and each holds windows of all models.
MOST_THREADS = 8
_MOST_PROBLEMS = 20


class Merge(NamedTuple):
  """What `merge` has done.

  Attributes:
    output: the folder or file that was written.
    cosine: the raw mean pairwise cosine by tensor; of `unit='filter'` a list.
    ratio: the t that was used, shaped as the cosine.
    left_out: tensors that not all had, with `common`.
    cut: tensors that had more rows in some, and the rows taken, with `common`.
  """

  output: pathlib.Path
  cosine: dict[str, float | list[float]]
  ratio: dict[str, float | list[float]]
  left_out: list[str]
  cut: dict[str, int]


class _Tensor(NamedTuple):
  """A tensor of all checkpoints, and how much of it is merged."""

  name: str
  anchor: tensors_lib.Tensor
  models: list[tensors_lib.Tensor]
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64))

  def cached(self) -> '_Tensor':
    return self._replace(
      anchor=self.anchor.cached(),
      models=[model.cached() for model in self.models],
    )


def merge(
  anchor: PathLike,
  models: Sequence[PathLike],
  output: PathLike,
  *,
  unit: options_lib.Unit = 'layer',
  average: options_lib.Average = 'cosine',
  clip: bool = True,
  strength: float = 1.0,
  dtype: str | None = None,
  layers: str | None = None,
  common: bool = False,
  shard_size: float = 5e9,
  threads: int | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Merge:
  """Merges checkpoints on disk by the angle between their displacements.

  What `ms.model_stock` does to trees, tensor by tensor, so that memory does
  not grow with the models: about 20 MB for each thread. Interrupted, the same
  call goes on where it was; until all is there, nothing has the name `output`.

  Args:
    anchor: the pretrained checkpoint that all models started from: a
      safetensors file, a Hugging Face folder (of one file or several), a run of
      this library, or a checkpoint of Scenic.
    models: N >= 2 checkpoints that were fine-tuned from it.
    output: what to write: a file if it ends with '.safetensors', else a folder
      with the anchor's config and tokenizer. Checkpoints of Scenic become a
      folder with a checkpoint of Scenic, which is the first model's with other
      parameters; its model_state is the mean.
    unit: what shares a cosine: a 'layer', here a tensor; a 'filter', a slice
      along the output axis; the whole 'model'.
    average: for N > 2, the mean of the pairwise 'cosine's, or of the 'angle's.
    clip: cosines are clipped to [0, 1]; False for parity with mergekit.
    strength: multiplies every ratio.
    dtype: of the merged tensors: 'float32', 'bfloat16', 'float16' or
      'float64'. None: the one that all checkpoints have.
    layers: a regular expression: tensors whose names it matches with the same
      groups share a cosine, as in `r'(.*)[.][qkv]_proj[.](.*)'`.
    common: leave out tensors that not all checkpoints have, and take the first
      rows where their numbers differ, as of embeddings of grown vocabularies.
    shard_size: bytes of one file of a folder.
    threads: that work at the same time; None: one for each core, up to 8.
    progress: is called with the bytes that are merged, and all there are.

  Returns:
    Where the result is, and cosine and ratio of each tensor; the same stands in
    `model_stock.json` in the folder, or `NAME.model_stock.json` beside a file.

  Raises:
    FileNotFoundError: a checkpoint, or a file of it, is not there.
    FileExistsError: `output` is there.
    ValueError: checkpoints that do not fit together, each difference named;
      a checkpoint that is damaged or a pickle; wrong options.
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
  _check_options(
    models, unit, average, clip, strength, dtype, layers, shard_size, threads
  )
  stock = options_lib.StockOptions(unit, average, clip)
  target = pathlib.Path(output).expanduser().absolute()
  output_lib.check_free(target)
  first, *others = [detect.read(path) for path in (anchor, *models)]
  _check_paths(first, others, target)
  tensors, left_out = _match(first, others, dtype, common)
  groups = _groups(list(tensors), unit, layers)
  chosen = None if dtype is None else tensors_lib.DTYPES[dtype]
  plans = _plans(first, others, tensors, chosen, target, shard_size)
  options = {
    **dataclasses.asdict(stock),
    'strength': strength,
    'dtype': dtype,
    'layers': layers,
  }
  identity = {
    'anchor': _signature(first),
    'models': [_signature(model) for model in others],
    'options': options,
    'files': [[plan.name, plan.size] for plan in plans],
    'left_out': left_out,
  }
  cut = {
    name: tensor.shape[0]
    for name, tensor in tensors.items()
    if any(c.tensors[name].shape != tensor.shape for c in (first, *others))
  }
  owner = next((c for c in (first, *others) if c.companions), first)
  beside = {}
  if target.suffix != '.safetensors' and first.kind != 'scenic':
    beside = _beside(owner, tensors, dtype)
  # As it will be read back.
  identity = json.loads(json.dumps(identity))
  with output_lib.open_output(target, plans, identity) as out:
    _Work(
      tensors=tensors,
      averaged=first.averaged,
      paths=[c.path for c in (first, *others)],
      out=out,
      dtype=chosen,
      formula=_Formula(len(others), stock, strength),
      progress=progress,
    ).run(groups, threads or min(MOST_THREADS, os.cpu_count() or 1))
    cosine, ratio = _collect(out.records, tensors)
    _check_moved(out.records, others)
    report = {
      'anchor': str(anchor),
      'models': [str(model) for model in models],
      **options,
      'left_out': left_out,
      'cut': cut,
      'tensors': {
        name: {'cosine': cosine[name], 'ratio': ratio[name]} for name in cosine
      },
    }
    name = REPORT
    if target.suffix == '.safetensors':
      name = f'{target.stem}.{REPORT}'
    beside[name] = (json.dumps(report, indent=1) + '\n').encode()
    if len(plans) > 1:
      index = f'{first.stem}{safetensors.INDEX}'
      beside[index] = _index(plans).encode()
    out.sync()
    output_lib.publish(target, beside)
  return Merge(target, cosine, ratio, left_out, cut)


def _check_options(
  models, unit, average, clip, strength, dtype, layers, shard_size, threads
) -> None:
  problems = []
  try:
    options_lib.StockOptions(unit, average, clip)
  except ValueError as error:
    problems += str(error).replace(': must', ' must').split('\n')
  if (dtype or 'float32') not in DTYPES:
    problems.append(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}.')
  if isinstance(models, str | os.PathLike) or len(models) < 2:
    problems.append(
      f'models: {models!r}; a merge takes the anchor and at least two models.'
    )
  if not np.isfinite(strength):
    problems.append(f'strength must be a finite number, got {strength}.')
  if not shard_size > 0:
    problems.append(f'shard_size must be positive, got {shard_size}.')
  if threads is not None and threads < 1:
    problems.append(f'threads must be at least 1, got {threads}.')
  if layers is not None:
    if unit != 'layer':
      problems.append(f"layers is for unit 'layer', not {unit!r}.")
    try:
      re.compile(layers)
    except re.error as error:
      problems.append(f'layers: {layers!r} is no regular expression: {error}.')
  if problems:
    raise ValueError('\n  '.join(problems))


def _check_paths(
  anchor: Checkpoint, models: Sequence[Checkpoint], target: pathlib.Path
) -> None:
  resolved = [c.path.resolve() for c in (anchor, *models)]
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
  if anchor.kind == 'scenic' and target.suffix == '.safetensors':
    raise ValueError(
      f'{target}: checkpoints of Scenic are merged into one of Scenic. Give '
      '--output a folder.'
    )
  if anchor.kind == 'run' and target.suffix != '.safetensors':
    raise ValueError(
      f'{target}: runs of this library are merged into one file. Let --output '
      'end with .safetensors.'
    )


def _match(
  anchor: Checkpoint,
  models: Sequence[Checkpoint],
  dtype: str | None,
  common: bool,
) -> tuple[dict[str, _Tensor], list[str]]:
  """What all checkpoints have, and what not all of them have."""
  tensors, left_out, problems = {}, [], []
  everything = (anchor, *models)
  names = dict.fromkeys(name for c in everything for name in c.tensors)
  shorter = odd = False
  for name in names:
    having = [c for c in everything if name in c.tensors]
    found = [c.tensors[name] for c in having]
    if len(having) < len(everything):
      left_out.append(name)
      if not common:
        lacking = [str(c.path) for c in everything if c not in having]
        problems.append(f'{name}: not in {", ".join(lacking)}')
        shorter = True
      continue
    shape = found[0].shape
    if any(tensor.shape != shape for tensor in found):
      rows = all(
        tensor.shape and tensor.shape[1:] == shape[1:] for tensor in found
      )
      if rows and common:
        shape = (min(tensor.shape[0] for tensor in found), *shape[1:])
      else:
        shorter |= rows
        what = 'rows differ' if rows else 'shapes differ'
        problems.append(f'{name}: {what}: {_each(everything, name)}')
        continue
    if len({tensor.dtype for tensor in found}) > 1 and (
      dtype is None or not all(tensor.floating for tensor in found)
    ):
      odd = True
      problems.append(f'{name}: dtypes differ: {_each(everything, name)}')
    elif found[0].dtype.name.startswith('float8'):
      problems.append(
        f'{name}: is {found[0].dtype}. Quantised weights are not merged: take '
        'the checkpoint before it was quantised.'
      )
    tensors[name] = _Tensor(name, found[0], found[1:], shape)
  if not tensors and not problems:
    problems.append('they have no tensor in common')
  if problems:
    more = len(problems) - _MOST_PROBLEMS
    if more > 0:
      problems[_MOST_PROBLEMS:] = [f'... and {more} more']
    remedies = ''
    if shorter:
      remedies += (
        ' --common merges what all of them have, the first rows of tensors '
        'that have more in some, and leaves the rest out.'
      )
    if odd and dtype is None:
      remedies += ' --dtype says which dtype the result is to have.'
    paths = ', '.join(str(model.path) for model in models)
    raise ValueError(
      f'{paths} do not fit the anchor {anchor.path}.{remedies}\n  '
      + '\n  '.join(problems)
    )
  return tensors, left_out


def _each(checkpoints: Iterable[Checkpoint], name: str) -> str:
  return ', '.join(f'{c.path} {c.tensors[name]}' for c in checkpoints)


def _groups(
  names: Sequence[str], unit: str, layers: str | None
) -> list[tuple[str, list[str]]]:
  """The layers: each its name, and the tensors that share its cosine."""
  if unit == 'model':
    return [('model', list(names))]
  groups: dict[Any, list[str]] = {}
  matched = False
  for name in names:
    found = re.fullmatch(layers, name) if layers is not None else None
    matched |= found is not None
    groups.setdefault(name if found is None else found.groups(), []).append(
      name
    )
  if layers is not None and not matched:
    raise ValueError(
      f'layers: {layers!r} matches none of the {len(names)} names, such as '
      f'{names[0]!r}. It must match a name as a whole.'
    )
  return [(members[0], members) for members in groups.values()]


def _plans(
  anchor: Checkpoint,
  models: Sequence[Checkpoint],
  tensors: Mapping[str, _Tensor],
  dtype: np.dtype | None,
  target: pathlib.Path,
  shard_size: float,
) -> list[output_lib.Plan]:
  """The files of the output, and where in them the tensors lie."""
  if anchor.kind == 'scenic':
    file = models[0].path
    if dtype is not None or any(
      t.shape != t.models[0].shape for t in tensors.values()
    ):
      raise ValueError(
        'dtype and common are not for checkpoints of Scenic, whose result has '
        "the first model's tensors."
      )
    offsets = {name: t.models[0].offset for name, t in tensors.items()}
    return [output_lib.Plan(file.name, file, file.stat().st_size, offsets)]
  kinds = {
    name: (
      dtype if dtype is not None and t.anchor.floating else t.anchor.dtype,
      t.shape,
    )
    for name, t in tensors.items()
  }
  one = target.suffix == '.safetensors'
  shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
  filled = 0
  for name, (kind, _) in kinds.items():
    size = tensors[name].size * kind.itemsize
    if shards[-1] and filled + size > shard_size and not one:
      shards.append({})
      filled = 0
    shards[-1][name] = kinds[name]
    filled += size
  plans = []
  for number, shard in enumerate(shards, 1):
    begin, offsets, size = safetensors.header(shard, anchor.metadata)
    name = f'{anchor.stem}.safetensors'
    if one:
      name = target.name
    elif len(shards) > 1:
      name = f'{anchor.stem}-{number:05d}-of-{len(shards):05d}.safetensors'
    plans.append(output_lib.Plan(name, begin, size, offsets))
  return plans


def _index(plans: Sequence[output_lib.Plan]) -> str:
  total = sum(
    p.size - len(p.begin) for p in plans if isinstance(p.begin, bytes)
  )
  files = {name: plan.name for plan in plans for name in plan.offsets}
  index = {'metadata': {'total_size': total}, 'weight_map': files}
  return json.dumps(index, indent=2) + '\n'


def _signature(checkpoint: Checkpoint) -> list[Any]:
  """Tells whether a checkpoint is still the one that it was."""
  path = checkpoint.path
  files = [path] if path.is_file() else sorted(path.glob('*'))
  return [
    str(path.resolve()),
    [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
  ]


class _Formula(NamedTuple):
  """From inner products to cosine and ratio."""

  num_models: int
  stock: options_lib.StockOptions
  strength: float

  def __call__(self, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosine = angles.mean_cosine(gram, self.stock.average)
    ratio = angles.ratio(
      cosine, self.num_models, clip=self.stock.clip, strength=self.strength
    )
    return cosine, ratio


class _Work(NamedTuple):
  """What every thread needs to know."""

  tensors: Mapping[str, _Tensor]
  averaged: frozenset[str]
  paths: Sequence[pathlib.Path]
  out: output_lib.Output
  dtype: np.dtype | None
  formula: _Formula
  progress: Callable[[int, int], None] | None

  def run(self, groups: list[tuple[str, list[str]]], threads: int) -> None:
    """Merges all groups that are not done yet."""
    over = {record['group'] for record in self.out.records}
    together = self.formula.stock.unit == 'model'
    if together:  # but each of its tensors is written by itself
      groups = [(name, [name]) for name in groups[0][1]]
    total = sum(map(_bytes, self.tensors.values()))
    finished = 0

    def tell(names: Iterable[str]) -> int:
      more = sum(_bytes(self.tensors[name]) for name in names)
      if self.progress is not None:
        self.progress(finished + more, total)
      return finished + more

    for group, names in groups:
      if group in over:
        finished = tell(names)
    with futures.ThreadPoolExecutor(threads) as pool:
      shared = None
      if together:
        merged = [name for name in self.tensors if self._is_merged(name)]
        tasks = [(self._gram, (self.tensors[name],)) for name in merged]
        grams = _finish(pool, tasks)
        shared = np.sum(list(grams), axis=0)
      todo = [(group, names) for group, names in groups if group not in over]
      # The largest first: nobody has to wait for one at the end.
      todo.sort(key=lambda item: -sum(self.tensors[n].size for n in item[1]))
      tasks = [(self._layer, (g, names, shared)) for g, names in todo]
      for names in _finish(pool, tasks):
        finished = tell(names)

  def _is_merged(self, name: str) -> bool:
    return self.tensors[name].anchor.floating and name not in self.averaged

  def _rows(self, tensor: _Tensor) -> blocks.Rows | None:
    if self.formula.stock.unit != 'filter':
      return None
    return blocks.rows_of(tensor.anchor, tensor.size)

  def _gram(self, tensor: _Tensor) -> np.ndarray:
    tensor = tensor.cached()
    rows = self._rows(tensor)
    gram = blocks.gram(tensor.anchor, tensor.models, tensor.size, rows)
    if not np.isfinite(gram).all():
      self._explain(tensor)
    return gram

  def _explain(self, tensor: _Tensor) -> None:
    counts = {
      str(path): blocks.count_broken(stored, tensor.size)
      for path, stored in zip(
        self.paths, (tensor.anchor, *tensor.models), strict=True
      )
    }
    broken = [f'{count} in {path}' for path, count in counts.items() if count]
    what = ', '.join(broken) or 'none, but they are too far apart to be squared'
    raise ValueError(
      f'{tensor.name}: values that are not finite: {what}. Take a checkpoint '
      'from before training diverged.'
    )

  def _layer(
    self, group: str, names: list[str], shared: np.ndarray | None
  ) -> list[str]:
    """Merges the tensors that share a cosine; their names."""
    held = {name: self.tensors[name].cached() for name in names}
    merged = [name for name in names if self._is_merged(name)]
    record: dict[str, Any] = {'group': group, 'tensors': merged}
    one = ratio = np.ones(())
    if merged:
      gram = shared
      if gram is None:
        gram = np.sum([self._gram(held[name]) for name in merged], axis=0)
      cosine, ratio = self.formula(gram)
      squares = np.diagonal(gram, axis1=-2, axis2=-1)
      record |= {
        'cosine': cosine.tolist(),
        'ratio': ratio.tolist(),
        'moved': (squares.reshape(-1, squares.shape[-1]) > 0)
        .any(axis=0)
        .tolist(),
      }
    for name in names:
      self._write(held[name], ratio if name in merged else one)
    self.out.done(record)
    return names

  def _write(self, tensor: _Tensor, ratio: np.ndarray) -> None:
    def write(start: int, elements: np.ndarray) -> None:
      self.out.write(tensor.name, start, elements)

    if not tensor.anchor.floating:
      if not blocks.equal((tensor.anchor, *tensor.models), tensor.size):
        raise ValueError(
          f'{tensor.name}: {tensor.anchor.dtype} values differ, and only '
          'floating-point weights are merged. Counters: save the models '
          'without them. Quantised weights: take the checkpoints before they '
          'were quantised.'
        )
      blocks.copy(tensor.anchor, tensor.size, write)
      return
    dtype = self.dtype or tensor.anchor.dtype
    narrow = dtype == np.float16  # all others reach 3e38

    def write_finite(start: int, elements: np.ndarray) -> None:
      if narrow and not np.all(np.isfinite(elements)):
        raise ValueError(
          f'{tensor.name}: has values above 65504, which float16 does not '
          'hold. Give --dtype bfloat16 or float32.'
        )
      write(start, elements)

    blocks.blend(
      tensor.anchor,
      tensor.models,
      tensor.size,
      ratio,
      dtype,
      write_finite,
      self._rows(tensor) if np.ndim(ratio) else None,
    )


def _finish(pool: futures.Executor, tasks: Sequence[Any]) -> Iterator[Any]:
  """Results of (function, arguments) as they come; an error ends all."""
  waiting = [pool.submit(function, *args) for function, args in tasks]
  try:
    for future in futures.as_completed(waiting):
      yield future.result()
  except BaseException:
    pool.shutdown(cancel_futures=True)
    raise


def _bytes(tensor: _Tensor) -> int:
  return tensor.size * tensor.anchor.dtype.itemsize


def _collect(records, tensors):
  """Cosine and ratio of every merged tensor, in the order of the files."""
  cosine, ratio = {}, {}
  for record in records:
    for name in record['tensors']:
      cosine[name], ratio[name] = record['cosine'], record['ratio']
  order = [name for name in tensors if name in cosine]
  return {n: cosine[n] for n in order}, {n: ratio[n] for n in order}


def _check_moved(
  records: Sequence[Mapping[str, Any]], models: Sequence[Checkpoint]
) -> None:
  moved = [record['moved'] for record in records if record['tensors']]
  for number, model in enumerate(models):
    if moved and not any(line[number] for line in moved):
      raise ValueError(
        f'{model.path} is equal to the anchor in every tensor: it was not '
        'fine-tuned, or is the pretrained checkpoint itself.'
      )


def _beside(
  owner: Checkpoint, tensors: Mapping[str, _Tensor], dtype: str | None
) -> dict[str, bytes]:
  """What lies beside a checkpoint, its config.json fitted to the merge."""
  rows = {
    owner.tensors[name].shape[0]: tensor.shape[0]
    for name, tensor in tensors.items()
    if tensor.shape != owner.tensors[name].shape
  }

  def fitted(value: Any) -> Any:
    if not isinstance(value, dict):
      return value
    value = {key: fitted(part) for key, part in value.items()}
    for key in ('vocab_size', 'max_position_embeddings'):
      if value.get(key) in rows:
        value[key] = rows[value[key]]
    for key in ('torch_dtype', 'dtype'):
      if dtype is not None and isinstance(value.get(key), str):
        value[key] = dtype
    return value

  found = {path.name: path.read_bytes() for path in owner.companions}
  if 'config.json' in found and (rows or dtype):
    try:
      config = json.loads(found['config.json'])
    except ValueError as error:
      where = owner.path / 'config.json'
      raise ValueError(f'{where} is not JSON: {error}') from error
    text = json.dumps(fitted(config), indent=2) + '\n'
    found['config.json'] = text.encode()
  return found
