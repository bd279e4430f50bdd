"""The files of a merged checkpoint, and the place of each tensor in them."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
from typing import Any

from modelstock_jax.files import match
from modelstock_jax.files import output
from modelstock_jax.formats import detect
from modelstock_jax.formats import orbax
from modelstock_jax.formats import safetensors

# Bytes of one file of a folder.
SHARD_SIZE = 5e9


def plan(
  checkpoints: Sequence[detect.Checkpoint],
  tensors: Mapping[str, match.Matched],
  target: pathlib.Path,
) -> tuple[list[output.Plan], dict[str, bytes]]:
  """Plan the files of the output.

  Args:
    checkpoints: the anchor, then the models.
    tensors: what is merged, by name.
    target: the output.

  Returns:
    The files with the tensors, and the contents of files that describe them.
  """
  anchor, model, *_ = checkpoints
  single = target.suffix == '.safetensors'
  if anchor.kind == 'scenic':
    return [_plan_scenic(model.path, tensors)], {}
  if anchor.kind == 'orbax' and not single:
    return _plan_orbax(anchor, tensors)
  shards: list[dict[str, Any]] = [{}]
  filled = 0
  for name, tensor in tensors.items():
    if shards[-1] and filled + tensor.nbytes > SHARD_SIZE and not single:
      shards.append({})
      filled = 0
    shards[-1][name] = tensor.dtype, tensor.shape
    filled += tensor.nbytes
  names = [target.name if single else f'{anchor.stem}.safetensors']
  if (total := len(shards)) > 1:
    names = [
      f'{anchor.stem}-{number:05d}-of-{total:05d}.safetensors'
      for number in range(1, total + 1)
    ]
  plans = [
    output.Plan(name, *safetensors.header(shard, anchor.metadata))
    for name, shard in zip(names, shards, strict=True)
  ]
  return plans, _index(anchor.stem, plans)


def _plan_orbax(
  anchor: detect.Checkpoint, tensors: Mapping[str, match.Matched]
) -> tuple[list[output.Plan], dict[str, bytes]]:
  """Plan a checkpoint of Orbax like the anchor's."""
  arrays = {
    name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
  }
  item = anchor.path / anchor.stem
  files, others = orbax.new_files(anchor.path, item, arrays)
  return [
    output.Plan(file, b'', {name: 0}, tensors[name].nbytes)
    for name, file in files.items()
  ], others


def _plan_scenic(
  path: pathlib.Path, tensors: Mapping[str, match.Matched]
) -> output.Plan:
  """Plan a copy of the first model's file with the tensors in their places."""
  stored = {name: tensor.stored[1] for name, tensor in tensors.items()}
  if any(
    (tensor.dtype, tensor.shape) != (stored[name].dtype, stored[name].shape)
    for name, tensor in tensors.items()
  ):
    raise ValueError(
      'dtype and common are not for checkpoints of Scenic, whose result has '
      "the first model's tensors."
    )
  offsets = {name: tensor.offset for name, tensor in stored.items()}
  return output.Plan(path.name, path, offsets, path.stat().st_size)


def _index(stem: str, plans: Sequence[output.Plan]) -> dict[str, bytes]:
  """Return the index of several files, by its name."""
  if len(plans) == 1:
    return {}
  files = {name: plan.name for plan in plans for name in plan.offsets}
  total = sum(plan.size - min(plan.offsets.values()) for plan in plans)
  content = {'metadata': {'total_size': total}, 'weight_map': files}
  data = (json.dumps(content, indent=2) + '\n').encode()
  return {f'{stem}{safetensors.INDEX}': data}
