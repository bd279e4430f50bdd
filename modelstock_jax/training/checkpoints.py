"""Checkpoints on disk: the one module that knows Orbax.

A checkpoint holds the items `state`, all that training needs to go on;
`merged`, what the models would be merged to at that step; `anchor`, where the
anchor moves; and `meta`, JSON with the config, the step and the position in
the data, which is the step: a run's batches follow from it. It appears under
its step number when it is whole, not before, so a run that dies while saving
still has the one before.
"""

import itertools
import json
import logging
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from modelstock_jax import merging
from modelstock_jax.training import state as state_lib

_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
  """What a run goes on from."""

  state: state_lib.StockState
  merged: merging.Merged
  anchor: Any | None  # params, where merge.anchor is 'last_merge'

  @property
  def items(self) -> dict[str, Any]:
    """The items that are there, by name."""
    return {k: v for k, v in self._asdict().items() if v is not None}


class Checkpoints:
  """The checkpoints of one run: the latest two and the best one are kept."""

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    config: dict[str, Any] | None = None,
  ):
    """Opens a folder of checkpoints, creating it if need be.

    Args:
      directory: of this run alone.
      config: of the run, as JSON values; kept in every checkpoint.
    """
    self._config = config or {}
    self._directory = pathlib.Path(directory).absolute()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    self._drop_broken_metrics()
    best = checkpoint_managers.BestN(
      get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
    )
    keep = checkpoint_managers.AnyPreservationPolicy(
      [checkpoint_managers.LatestN(2), best]
    )
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=_accuracy,  # without it metrics are not written to disk
        enable_async_checkpointing=True,
      ),
    )

  def _drop_broken_metrics(self) -> None:
    """Orbax reads the metrics of all checkpoints to open any of them."""
    for path in self._directory.glob('*/metrics/metrics'):
      try:
        json.loads(path.read_text(encoding='utf-8'))
      except ValueError as error:
        path.unlink()
        _log.warning('%s: removed, it cannot be read: %s', path, error)

  def save(
    self, step: int, checkpoint: Checkpoint, *, accuracy: float | None = None
  ) -> None:
    """Starts to save; training may go on and donate the state.

    Args:
      step: optimizer steps taken.
      checkpoint: what to save.
      accuracy: of the merged model on the validation split, 0..1; decides
        which checkpoint is the best. None if it was not measured.
    """
    self._manager.check_for_errors()
    items: dict[str, Any] = {
      name: ocp.args.StandardSave(tree)
      for name, tree in _with_raw_key(checkpoint).items.items()
    }
    meta = {'step': step, 'next_batch': step, 'config': self._config}
    items['meta'] = ocp.args.JsonSave(meta)
    metrics = {} if accuracy is None else {'accuracy': accuracy}
    self._manager.save(
      step, args=ocp.args.Composite(**items), metrics=metrics, force=True
    )

  def wait(self) -> None:
    """Returns when the last save is on disk, or raises what it failed with."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def steps(self) -> list[int]:
    """The steps of all checkpoints on disk, ascending."""
    return sorted(self._manager.all_steps())

  def restore(self, like: Checkpoint) -> Checkpoint | None:
    """The latest checkpoint that can be read, placed as `like` is.

    A damaged one (a disk that filled up, a copy that broke off) is reported,
    moved to the folder `damaged` and passed over for the one before.

    Args:
      like: a checkpoint of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      OSError: if there are checkpoints, and all of them are damaged.
    """
    found = self.steps()
    for step in reversed(found):
      try:
        return self._read(step, like)
      except (OSError, ValueError, KeyError) as error:
        moved = self._set_aside(step)
        _log.warning(
          'Checkpoint %d cannot be read and is passed over, now in %s: %s: %s',
          step,
          moved,
          type(error).__name__,
          str(error).strip().split('\n')[0][:300],
        )
    if found:
      raise OSError(
        f'{self._directory}: none of the checkpoints {found} can be read; '
        'they were moved to its folder `damaged`. Start in another workdir, '
        'or run the same command again to begin from the anchor.'
      )
    return None

  def _read(self, step: int, like: Checkpoint) -> Checkpoint:
    items = {
      name: ocp.args.StandardRestore(tree)
      for name, tree in _with_raw_key(like).items.items()
    }
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    found = like._replace(**{name: restored[name] for name in items})
    wrap = jax.jit(
      jax.random.wrap_key_data, out_shardings=like.state.key.sharding
    )
    return found._replace(state=found.state._replace(key=wrap(found.state.key)))

  def _set_aside(self, step: int) -> pathlib.Path:
    target = self._directory.parent / 'damaged' / str(step)
    for number in itertools.count(1):
      if not target.exists():
        break
      target = target.with_name(f'{step}.{number}')
    target.parent.mkdir(exist_ok=True)
    self._manager.close()
    (self._directory / str(step)).rename(target)
    self._manager = self._open()
    return target

  def close(self) -> None:
    """Finishes what is being saved and lets go of the folder."""
    self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _with_raw_key(checkpoint: Checkpoint) -> Checkpoint:
  """With the bits of the keys for the keys: not every Orbax knows key types."""
  key = checkpoint.state.key
  if isinstance(key, jax.ShapeDtypeStruct):
    raw = abstract(jax.eval_shape(jax.random.key_data, key), key.sharding)
  else:
    raw = jax.random.key_data(key)
  return checkpoint._replace(state=checkpoint.state._replace(key=raw))


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes of a tree with their shardings, a prefix of it, for `restore`."""

  def shape(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(
    lambda sharding, part: jax.tree.map(lambda x: shape(x, sharding), part),
    shardings,
    tree,
  )


def _accuracy(metrics: dict[str, float]) -> float:
  """What decides the best; one that was not measured is the best of none."""
  return metrics.get('accuracy', -1.0)
