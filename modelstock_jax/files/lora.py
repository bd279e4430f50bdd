"""Model Stock of LoRA adapters, by their factors alone.

The displacements are d_i = s_i B_i A_i, and the inner products

  <d_i, d_j> = s_i s_j sum((B_i^T B_j) * (A_i A_j^T))

The merge t mean(d_i) is an adapter of scale 1 and rank sum r_i:

  B = [t s_1 B_1 / N, ..., t s_N B_N / N], A = [A_1; ...; A_N]
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import os
import pathlib

import numpy as np

from modelstock_jax.files import match
from modelstock_jax.files import output
from modelstock_jax.formats import detect
from modelstock_jax.formats import lora
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import text


def read(
  anchor: text.PathLike,
  models: Sequence[text.PathLike],
  select: str | None,
  dense: bool,
) -> list[detect.Checkpoint]:
  """Find the tensors of an anchor and models, which may be adapters.

  Args:
    anchor: the pretrained checkpoint. If all models are adapters, its weights
      need not be there unless they are needed.
    models: checkpoints, adapters, or `ANCHOR+ADAPTER`.
    select: names of the tensors, see `detect.read`.
    dense: take adapters for full weights.

  Returns:
    The anchor, and the models. If all are adapters and not `dense`, they are
    of kind 'lora', and the anchor's displacements are 0.

  Raises:
    FileNotFoundError: a file, or the base where it is needed, is missing.
    ValueError: adapters of another base, or that do not fit it.
  """
  paths = [str(model) for model in models]
  names = [
    path if os.path.exists(path) else path.removeprefix(f'{anchor}+')
    for path in paths
  ]
  checkpoints = [detect.read(name, select, replicas=True) for name in names]
  adapters = [each for each in checkpoints if each.kind == 'lora']
  if not adapters and names == paths:
    return [detect.read(anchor, select), *checkpoints]
  _check_base(str(anchor), adapters)
  if dense or names != paths or len(adapters) < len(paths):
    base = detect.read(anchor)
    models_with_base = [
      each
      if each.kind != 'lora' and name == path
      else detect.add(base, each, name)
      for each, name, path in zip(checkpoints, names, paths, strict=True)
    ]
    return [detect.selected(each, select) for each in (base, *models_with_base)]
  tensors = {k: v for each in adapters for k, v in each.tensors.items()}
  saved = {name: v for name, v in tensors.items() if not v.factors}
  base = adapters[0]._replace(path=pathlib.Path(anchor), tensors={})
  if saved:
    with text.explained(
      f'{text.listed(saved)} of the adapters are stored whole '
      '(modules_to_save): their displacements take the base as the anchor. ',
      kinds=FileNotFoundError,
    ):
      base = detect.read(anchor)
  places = lora.places(base.tensors, saved)
  for name, tensor in tensors.items():
    if tensor.factors:
      tensors[name] = tensor._replace(window=lambda i, j: np.zeros(j - i))
    else:
      stored = base.tensors[places[name]]
      tensors[name] = stored._replace(dtype=tensor.dtype)
  return [base._replace(kind='lora', tensors=tensors), *adapters]


def _check_base(anchor: str, adapters: Sequence[detect.Checkpoint]) -> None:
  first = adapters[0].metadata
  problems = []
  if any(each.metadata != first for each in adapters):
    problems = [f'{each.path} has {each.metadata}' for each in adapters]
  base = first['base_model_name_or_path']
  if base and not os.path.exists(anchor) and base != anchor.split('@')[0]:
    problems.append(f'the anchor is {text.shown(anchor)}, not {base!r}')
  if (pathlib.Path(anchor) / lora.CONFIG).is_file():
    problems.append(f'the anchor {anchor} is an adapter itself')
  text.raise_problems(
    'Adapters of several bases are not merged. If it is one base under several '
    f'names, write one of them into each {lora.CONFIG}.',
    problems,
  )


def gram(tensor: match.Matched) -> np.ndarray:
  """Compute inner products of displacements from their factors.

  Args:
    tensor: N displacements.

  Returns:
    float64[N, N], or float64[rows, N, N] if the rows are an axis of filters.
  """
  pairs = _arrays(tensor)
  products = [
    [np.sum(left @ (right @ turned.T) * other, 1) for other, turned in pairs]
    for left, right in pairs
  ]
  rows = np.moveaxis(np.array(products), -1, 0)
  return rows.sum(axis=0) if tensor.axis is None else rows


def _arrays(tensor: match.Matched) -> list[tuple[np.ndarray, np.ndarray]]:
  """Return float64 `[rows, r_i]` and `[r_i, columns]` of each displacement."""
  return [
    (
      step.factors.scale * left[: tensor.shape[0]].astype(np.float64),
      right.astype(np.float64),
    )
    for step in tensor.stored[1:]
    for left, right in [step.factors.arrays()]
  ]


def blend(
  tensor: match.Matched, ratio: np.ndarray, rank: int | None
) -> tuple[dict[str, np.ndarray], float]:
  """Merge displacements into one, t mean(d_i).

  Args:
    tensor: the displacements.
    ratio: float64[] t, or float64[rows].
    rank: its largest rank, truncated by singular values; None: the sum.

  Returns:
    A and B as they are stored, by name; what truncation loses, relative to the
    norm of the displacement.
  """
  pairs = _arrays(tensor)
  left = np.concatenate([left for left, _ in pairs], axis=1)
  left *= np.reshape(ratio, (-1, 1)) / len(pairs)
  right = np.concatenate([right for _, right in pairs])
  (most, shapes), error = _shapes(tensor, rank), 0.0
  if most < len(right):
    (q, r), (p, s) = np.linalg.qr(left), np.linalg.qr(right.T)
    u, values, v = np.linalg.svd(r @ s.T, full_matrices=False)
    error = np.linalg.norm(values[most:]) / (np.linalg.norm(values) or 1)
    root = np.sqrt(values[:most])
    left, right = q @ (u[:, :most] * root), (p @ (v[:most].T * root)).T
  if tensor.anchor.factors.transposed:
    left, right = right.T, left.T
  named = zip(shapes, (right, left), strict=True)
  return dict(named), float(error)


def _shapes(
  tensor: match.Matched, rank: int | None
) -> tuple[int, dict[str, tuple[int, ...]]]:
  """Return the rank of the merge, and the shapes of A and B by their names."""
  factors, (rows, *columns) = tensor.anchor.factors, tensor.shape
  most = sum(step.factors.a.shape[0] for step in tensor.stored[1:])
  if rank is not None and rank < most:
    most = min(rank, rows, math.prod(columns))
  if factors.transposed:
    rows, columns = *columns, [rows]
  kind, end = ('embedding_', '') if factors.embedding else ('', '.weight')
  start = f'{tensor.name.removesuffix(".weight")}.lora_{kind}'
  b = (rows, most, *factors.b.shape[2:])
  return most, {f'{start}A{end}': (most, *columns), f'{start}B{end}': b}


def plan(
  adapter: detect.Checkpoint,
  tensors: Mapping[str, match.Matched],
  rank: int | None,
) -> tuple[list[output.Plan], dict[str, bytes]]:
  """Plan the files of the merged adapter, whose scale is 1.

  Args:
    adapter: the first one, of whose config the rest stays.
    tensors: what is merged, by name.
    rank: see `blend`.

  Returns:
    The file of the tensors, and the config by its name.
  """
  entries, ranks = {}, {}
  for name, tensor in tensors.items():
    shapes = {name: tensor.shape}
    if tensor.anchor.factors:
      ranks[name.removesuffix('.weight')], shapes = _shapes(tensor, rank)
    for key, shape in shapes.items():
      entries[lora.PREFIX + key] = tensor.dtype, shape
  begin, offsets, size = safetensors.header(entries, {'format': 'pt'})
  offsets = {n.removeprefix(lora.PREFIX): at for n, at in offsets.items()}
  most = max(ranks.values(), default=1)
  # The first pattern that ends the name of a module counts for it.
  pattern = dict(sorted(ranks.items(), key=lambda item: -len(item[0])))
  pattern = pattern if len({*ranks.values()}) > 1 else {}
  config = text.read_json(adapter.companions[0])
  config |= {'r': most, 'lora_alpha': most, 'use_rslora': False}
  config |= {'rank_pattern': pattern, 'alpha_pattern': pattern}
  config |= {'init_lora_weights': True, 'inference_mode': True}
  data = (json.dumps(config, indent=2) + '\n').encode()
  return [output.Plan(lora.WEIGHTS, begin, offsets, size)], {lora.CONFIG: data}
