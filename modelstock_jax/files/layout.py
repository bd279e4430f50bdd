"""The files of a merged checkpoint, and the place of each tensor in them."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
from typing import Any

from modelstock_jax.files import match
from modelstock_jax.files import output
from modelstock_jax.formats import detect
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import tensors as tensors_lib

# Bytes of one file of a folder.
SHARD_SIZE = 5e9


def plan(
  checkpoints: Sequence[detect.Checkpoint],
  tensors: Mapping[str, match.Matched],
  dtype: str | None,
  target: pathlib.Path,
) -> list[output.Plan]:
  """Plan the files of the output, and where in them the tensors lie."""
  anchor, model, *_ = checkpoints
  if anchor.kind == 'scenic':
    # The first model's file, with other tensors in their places.
    stored = {name: tensor.stored[1] for name, tensor in tensors.items()}
    if dtype is not None or any(
      tensor.shape != stored[name].shape for name, tensor in tensors.items()
    ):
      raise ValueError(
        'dtype and common are not for checkpoints of Scenic, whose result has '
        "the first model's tensors."
      )
    offsets = {name: tensor.offset for name, tensor in stored.items()}
    file = model.path
    return [output.Plan(file.name, file, file.stat().st_size, offsets)]
  single = target.suffix == '.safetensors'
  shards: list[dict[str, Any]] = [{}]
  filled = 0
  for name, tensor in tensors.items():
    kind = tensor.anchor.dtype
    if dtype is not None and tensor.anchor.floating:
      kind = tensors_lib.DTYPES[dtype]
    size = tensor.size * kind.itemsize
    if shards[-1] and filled + size > SHARD_SIZE and not single:
      shards.append({})
      filled = 0
    shards[-1][name] = kind, tensor.shape
    filled += size
  plans = []
  for number, shard in enumerate(shards, 1):
    begin, offsets, size = safetensors.header(shard, anchor.metadata)
    name = f'{anchor.stem}.safetensors'
    if single:
      name = target.name
    elif len(shards) > 1:
      name = f'{anchor.stem}-{number:05d}-of-{len(shards):05d}.safetensors'
    plans.append(output.Plan(name, begin, size, offsets))
  return plans


def index(stem: str, plans: Sequence[output.Plan]) -> dict[str, bytes]:
  """Return the index of several files, by its name."""
  if len(plans) == 1:
    return {}
  files = {name: plan.name for plan in plans for name in plan.offsets}
  total = sum(
    plan.size - len(plan.begin)
    for plan in plans
    if isinstance(plan.begin, bytes)
  )
  content = {'metadata': {'total_size': total}, 'weight_map': files}
  return {
    f'{stem}{safetensors.INDEX}': (
      json.dumps(content, indent=2) + '\n'
    ).encode()
  }
