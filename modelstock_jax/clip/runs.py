"""The merged model that a training run left in its workdir."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import json
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np

from modelstock_jax.clip import config as clip_config
from modelstock_jax.clip import weights

# What a workdir holds: the config, and checkpoints by their steps, whose item
# MERGED is the merge, and STATE what training goes on from.
CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
MERGED = 'merged'
STATE = 'state'

# Of a checkpoint: the items it has, and how they are laid out.
LAYOUT = 1


class NewerLayoutError(ValueError):
  """A checkpoint was written by a version that is yet to come."""


def find(path: pathlib.Path) -> pathlib.Path | None:
  """The checkpoint that `path` stands for, a workdir or a checkpoint.

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


def read_config(step: pathlib.Path) -> clip_config.CLIPConfig:
  """The sizes of the network that was trained.

  Args:
    step: what `find` gave.

  Raises:
    FileNotFoundError: there is no config.
    ValueError: it is not one of ours.
  """
  path = step.parents[1] / CONFIG
  try:
    sizes = json.loads(path.read_text('utf-8'))['model']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is not the config of a run: it has no 'model' ({error!r})."
    ) from error
  return clip_config.from_dict(sizes)


def read_meta(step: pathlib.Path) -> dict[str, Any]:
  """What a checkpoint says of itself.

  Args:
    step: the folder of a checkpoint.

  Returns:
    'layout' (1 if it does not say), 'config', 'step' and 'next_batch', the
    position in the data.

  Raises:
    NewerLayoutError: it has a layout that is not known here.
    FileNotFoundError: it says nothing.
    ValueError: it is not JSON.
  """
  text = (step / 'meta' / 'metadata').read_text('utf-8')
  meta = {'layout': 1, **json.loads(text)}
  if meta['layout'] > LAYOUT:
    raise NewerLayoutError(
      f'{step}: a newer version of modelstock_jax has written it, with layout '
      f'{meta["layout"]}; this one reads layouts up to {LAYOUT}. Update '
      'modelstock_jax (pip install --upgrade modelstock_jax).'
    )
  return meta


def read_merged(step: pathlib.Path, shardings: Any = None) -> Any:
  """The merge at a checkpoint.

  Args:
    step: what `find` gave.
    shardings: prefix tree of `jax.sharding.Sharding`, for {'image', 'head'};
      None places all on the first device.

  Returns:
    {'image': tower, 'head': {'kernel', 'bias'}}, float32.

  Raises:
    ValueError: the checkpoint is damaged, or of a newer layout.
  """
  return _read(step, MERGED, shardings)


def read_stack(step: pathlib.Path, shardings: Any = None) -> Any:
  """The models at a checkpoint, before they are merged.

  Args:
    step: what `find` gave.
    shardings: as `read_merged` takes them.

  Returns:
    As `read_merged`, with leaves `[N, ...]`.

  Raises:
    ValueError: the checkpoint is damaged, or of a newer layout.
  """
  return _read(step, STATE, shardings)


def read_variables(step: pathlib.Path, shardings: Any = None) -> Any:
  """Read the variables of the models at a checkpoint.

  Args:
    step: what `find` gave.
    shardings: as `read_merged` takes them.

  Returns:
    Leaves `[N, ...]`; {} where there are none.

  Raises:
    ValueError: the checkpoint is damaged, or of a newer layout.
  """
  return _read(step, STATE, shardings, 'variables')


def merged_tensors(
  step: pathlib.Path,
) -> dict[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]:
  """The leaves of the merge at a checkpoint, to be read one at a time.

  Args:
    step: what `find` gave.

  Returns:
    Shape, dtype, and a function that reads it, by path: 'image/...'.

  Raises:
    ValueError: the checkpoint is damaged, or of a newer layout.
  """
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler()
  path = epath.Path(step / MERGED)
  with _explained(step):
    read_meta(step)
    found = handler.metadata(path).tree['params']

  def reader(name: str, leaf: Any) -> Callable[[], np.ndarray]:
    item = {'params': _only(name.split('/'), 0)}
    how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    args = ocp.args.PyTreeRestore(
      item,
      restore_args=jax.tree.map(lambda _: how, item),
      partial_restore=True,
    )

    def load() -> np.ndarray:
      with _explained(step):
        [array] = jax.tree.leaves(handler.restore(path, args=args))
        return array

    return load

  return {
    name: (tuple(leaf.shape), np.dtype(leaf.dtype), reader(name, leaf))
    for name, leaf in weights.flatten(found)
  }


def _only(keys: list[str], leaf: Any) -> Any:
  """Nested dicts with one leaf."""
  for key in reversed(keys):
    leaf = {key: leaf}
  return leaf


@contextlib.contextmanager
def _explained(step: pathlib.Path) -> Iterator[None]:
  """What Orbax raises of a damaged checkpoint, as a ValueError."""
  try:
    yield
  except NewerLayoutError:
    raise
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    cause = str(error).strip().split('\n')[0][:300]
    raise ValueError(
      f'{step} cannot be read ({type(error).__name__}: {cause}). Resume the '
      'run, which sets a damaged checkpoint aside, or take another step.'
    ) from error


def _read(
  step: pathlib.Path, name: str, shardings: Any, part: str = 'params'
) -> Any:
  """One part of an item of a checkpoint, and nothing else of it."""
  # Slow to import, and most that load a CLIP never need it.
  import orbax.checkpoint as ocp

  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  # The handler of the item alone: a Checkpointer logs a warning for each of
  # the items that are not asked for.
  handler = ocp.PyTreeCheckpointHandler()
  path = epath.Path(step / name)
  with _explained(step):
    read_meta(step)
    found = handler.metadata(path).tree[part]
    if not jax.tree.leaves(found):
      return {}
    like = jax.tree.map(
      lambda sharding, part: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=sharding
        ),
        part,
      ),
      shardings,
      found,
    )
    item = {part: like}  # of a merge without its cosines and ratios
    args = ocp.args.PyTreeRestore(
      item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    )
    return handler.restore(path, args=args)[part]
