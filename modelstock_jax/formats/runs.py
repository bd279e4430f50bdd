"""Workdirs of training runs, whose checkpoints Orbax wrote."""

from collections.abc import Iterator
import contextlib
import functools
import json
import logging
import pathlib
import sys
from typing import Any

from modelstock_jax.formats import hashes
from modelstock_jax.formats import orbax
from modelstock_jax.formats import tensors as tensors_lib
from modelstock_jax.formats import text

# A workdir holds the config, and checkpoints by their steps, whose item MERGED
# is the merge, and STATE what training resumes from.
CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
MERGED = 'merged'
# As `clip.clip_layers`: query, key and value share a cosine, nothing else does.
LAYERS = r'(.*/)(?:query|key|value)(/(?:kernel|bias))|(.*)'
STATE = 'state'

# Version of the items of a checkpoint and their structure.
LAYOUT = 1


class NewerLayoutError(ValueError):
  """A checkpoint was written by a version that is yet to come."""


@functools.cache
def silence_orbax() -> None:
  """Keep Orbax and TensorStore from printing pages about what they raise.

  For good, as threads of theirs outlive the first error.
  """
  logging.getLogger('absl').addFilter(
    lambda record: (
      record.levelno < logging.WARNING or 'orbax' not in record.pathname
    )
  )
  logging.getLogger('asyncio').addFilter(
    lambda record: 'OCDBT' not in record.getMessage()
  )
  hook = sys.unraisablehook

  def filtered(unraisable: Any) -> None:
    message = str(unraisable.exc_value)
    if message != 'Event loop is closed' and 'TensorStore' not in message:
      hook(unraisable)

  sys.unraisablehook = filtered


def find(path: pathlib.Path) -> pathlib.Path | None:
  """Find the checkpoint that `path` stands for, a workdir or a checkpoint.

  Returns:
    The folder of one step, of a workdir that of the latest; None if `path` is
    neither.

  Raises:
    FileNotFoundError: the workdir has no checkpoint yet.
  """
  if path.parent.name == CHECKPOINTS and (path / MERGED).is_dir():
    return path.absolute()
  checkpoints = path / CHECKPOINTS
  if not (path / CONFIG).is_file() or not checkpoints.is_dir():
    return None
  import orbax.checkpoint as ocp

  steps = ocp.utils.checkpoint_steps(checkpoints)
  if not steps:
    raise FileNotFoundError(
      f'{checkpoints} holds no checkpoint yet. Train until the first merge.'
    )
  return (checkpoints / str(max(steps))).absolute()


def metadata(step: pathlib.Path) -> dict[str, str]:
  """Return what a file of merged runs states, for `clip.load_pretrained`.

  Args:
    step: the folder of a checkpoint, see `find`.

  Returns:
    Sizes and pixels of a CLIP as JSON; {} of a run that defines its task.

  Raises:
    FileNotFoundError, ValueError: as `read_model`.
  """
  model = {**read_model(step), 'text': None}
  config = text.read_json(step.parents[1] / CONFIG)
  if any(name.endswith('.get_task') for name in config.get('hooks', ())):
    return {}
  pixels = {name: config.get('data', {}).get(name) for name in ('mean', 'std')}
  return {'model': json.dumps(model), 'pixels': json.dumps(pixels)}


def read_model(step: pathlib.Path) -> dict[str, Any]:
  """Read the sizes of the network that was trained, as the config has them.

  Args:
    step: the folder of a checkpoint, see `find`.

  Raises:
    FileNotFoundError: there is no config.
    ValueError: it is not one of ours.
  """
  path = step.parents[1] / CONFIG
  with text.explained(
    f"{path} is not the config of a run: it has no 'model': ",
    kinds=(ValueError, KeyError, TypeError),
  ):
    return dict(text.read_json(path)['model'])


def read_meta(step: pathlib.Path) -> dict[str, Any]:
  """Read what a checkpoint states about itself.

  Args:
    step: the folder of a checkpoint.

  Returns:
    'layout' (1 if it is not stated), 'config', 'step' and 'next_batch', the
    position in the data.

  Raises:
    NewerLayoutError: this version does not know its layout.
    FileNotFoundError: it states nothing.
    ValueError: it is not JSON.
  """
  silence_orbax()  # all that read a checkpoint come here first
  meta = {'layout': 1, **text.read_json(step / 'meta' / 'metadata')}
  if meta['layout'] > LAYOUT:
    raise NewerLayoutError(
      f'{step}: a newer version of modelstock_jax has written it, with layout '
      f'{text.shown(meta["layout"])}; this one reads layouts up to {LAYOUT}. '
      'Update modelstock_jax (pip install --upgrade modelstock_jax).'
    )
  return meta


def read(
  step: pathlib.Path,
  item: str = MERGED,
  shardings: Any = None,
  part: str = 'params',
) -> Any:
  """Read one part of an item of a checkpoint onto devices, and nothing else.

  Args:
    step: the folder of a checkpoint, see `find`.
    item: MERGED for the merge; STATE for the models before they are merged,
      with leaves `[N, ...]`.
    shardings: prefix tree of `jax.sharding.Sharding`, for {'image', 'head'};
      None places all on the first device.
    part: 'params', or of the STATE 'variables'.

  Returns:
    {'image': tower, 'head': {'kernel', 'bias'}}, float32 `jax.Array`s; {} where
    there are no variables.

  Raises:
    ValueError: the checkpoint is damaged, or of a newer layout.
  """
  from etils import epath
  import jax
  import orbax.checkpoint as ocp

  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  # The handler of the item alone: a Checkpointer logs a warning for each of
  # the items that are not asked for.
  handler, path = ocp.PyTreeCheckpointHandler(), epath.Path(step / item)
  with _explained(step, item):
    hashes.verify(step, ('meta/', f'{item}/_'))  # arrays only if needed
    read_meta(step)
    tree = handler.metadata(path).tree[part]
    if not jax.tree.leaves(tree):
      return {}
    _verify(step, item)
    shardings = jax.tree.broadcast(shardings, tree)
    args = ocp.checkpoint_utils.construct_restore_args(tree, shardings)
    request = ocp.args.PyTreeRestore(
      {part: tree}, restore_args={part: args}, partial_restore=True
    )
    return handler.restore(path, args=request)[part]


def tensors(step: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  """Find the leaves of the merge at a checkpoint, and read none.

  Args:
    step: the folder of a checkpoint, see `find`.

  Returns:
    The leaves by path: 'image/...'.

  Raises:
    ValueError: the checkpoint is damaged, or of a newer layout.
  """
  with _explained(step):
    read_meta(step)
    _verify(step, MERGED)
    arrays = orbax.read(step / MERGED, 'params/.*')
  return {name.removeprefix('params/'): array for name, array in arrays.items()}


@contextlib.contextmanager
def _explained(step: pathlib.Path, item: str = MERGED) -> Iterator[None]:
  """Raise what Orbax raises about a damaged checkpoint as a ValueError."""
  try:
    yield
  except NewerLayoutError:
    raise
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    problem = f'{step} cannot be read ({text.line(error)})'
    advice = 'take another step'
    try:
      _verify(step, item)
    except hashes.DamagedFileError as damaged:
      newest = _newest_undamaged(step.parent, item)
      problem = str(damaged)
      advice = f'take the newest that is not damaged: {newest or "none"}'
    raise ValueError(
      f'{problem}. Resume the run, which sets a damaged checkpoint aside, or '
      f'{advice}.'
    ) from error


def _verify(step: pathlib.Path, item: str) -> None:
  """Raise DamagedFileError if a file of an item, or of meta, is damaged."""
  hashes.verify(step, ('meta/', f'{item}/'))


def _newest_undamaged(folder: pathlib.Path, item: str) -> pathlib.Path | None:
  """Find the latest checkpoint in a folder whose item is not damaged."""
  steps = [path for path in folder.iterdir() if path.name.isdecimal()]
  for step in sorted(steps, key=lambda path: int(path.name), reverse=True):
    with contextlib.suppress(OSError, ValueError):
      _verify(step, item)
      read_meta(step)
      return step
  return None
