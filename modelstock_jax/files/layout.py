"""The files of a merged checkpoint, and the place of each tensor in them."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
import re
from typing import Any

from modelstock_jax.files import lora
from modelstock_jax.files import match
from modelstock_jax.files import output
from modelstock_jax.formats import detect
from modelstock_jax.formats import orbax
from modelstock_jax.formats import safetensors
from modelstock_jax.formats import text

# Bytes of one file of a folder.
SHARD_SIZE = 5e9
# Kinds of checkpoints without a config.json.
NO_CONFIG = ('scenic', 'lora')


def plan(
  checkpoints: Sequence[detect.Checkpoint],
  tensors: Mapping[str, match.Matched],
  target: pathlib.Path,
  rank: int | None,
) -> tuple[list[output.Plan], dict[str, bytes]]:
  """Plan the files of the tensors.

  Args:
    checkpoints: the anchor, then the models.
    tensors: what is merged, by name.
    target: the output.
    rank: of adapters, the largest rank of the result.

  Returns:
    The files, and the contents of those that describe them, by name.

  Raises:
    ValueError: a file of Scenic has other tensors.
  """
  anchor, model, *_ = checkpoints
  single = target.suffix == '.safetensors'
  if anchor.kind == 'scenic':
    return [_plan_scenic(model.path, tensors)], {}
  if anchor.kind == 'lora':
    return lora.plan(model, tensors, rank)
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


def companions(
  checkpoints: Sequence[detect.Checkpoint],
  tensors: Mapping[str, match.Matched],
  left_out: Sequence[str],
  dtype: str | None,
  target: pathlib.Path,
) -> dict[str, bytes]:
  """Read the files that a merged folder has next to its tensors.

  Args:
    checkpoints: the anchor, then the models.
    tensors: what is merged, by name.
    left_out: names of tensors that not all checkpoints have.
    dtype: dtype of the result, or None.
    target: the output.

  Returns:
    Contents by name. They are of the anchor, or else of the first model that
    has such; config.json has the rows and the dtype of the result.

  Raises:
    ValueError: config.json is not JSON, or needs a tensor that is left out.
  """
  if target.suffix == '.safetensors' or checkpoints[0].kind in NO_CONFIG:
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

  contents = {
    str(path.relative_to(owner.path)): path.read_bytes()
    for path in owner.companions
  }
  heads = [n for n in left_out if n in owner.tensors and 'lm_head.' in n]
  config = contents.get('config.json', b'')
  if heads and re.search(rb'"tie_word_embeddings"\s*:\s*false', config):
    raise ValueError(
      f'{text.plain(heads[0])}: not in all, and not tied to the embeddings by '
      f'{owner.path}/config.json: the merge would have no head. Take models '
      'that have it, or set tie_word_embeddings there.'
    )
  if 'config.json' in contents and (rows or dtype):
    where = f'{owner.path / "config.json"} is not JSON: '
    with text.explained(where):
      text.parse_json(contents['config.json'])  # within limits
      config = json.loads(contents['config.json'], object_hook=fit)
    contents['config.json'] = to_json(config, 2)
  return contents


def to_json(value: Any, indent: int) -> bytes:
  """Return the contents of a JSON file."""
  return (json.dumps(value, indent=indent) + '\n').encode()


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
    or stored[name].offset < 0
    for name, tensor in tensors.items()
  ):
    raise ValueError(
      'dtype and common are not for checkpoints of Scenic, whose result has '
      "the first model's tensors; nor are arrays of more than 1 GiB. Give "
      'copies named X.msgpack: they become safetensors.'
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
  return {f'{stem}{safetensors.INDEX}': to_json(content, 2)}
