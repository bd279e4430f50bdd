"""Checkpoints on disk: the one module that knows Orbax.

A checkpoint holds the items `state`, all that training needs to go on;
`merged`, what the models would be merged to at that step; `anchor`, where the
anchor moves; and `meta`, JSON with the layout, the config, the step and the
position in the data, which is the step: a run's batches follow from it. It
appears under its step number when it is whole, not before, so a run that dies
while saving still has the one before. What it holds does not depend on the
devices, nor on how the arrays were spread over them.

All processes of a run call the same methods in the same order; what concerns
the folder and not the arrays, process 0 does for all.
"""

from collections.abc import Iterator
import contextlib
import itertools
import json
import logging
import pathlib
import shutil
import time
from typing import Any
from typing import NamedTuple

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from modelstock_jax import merging
from modelstock_jax.formats import runs
from modelstock_jax.training import changes as changes_lib
from modelstock_jax.training import damage
from modelstock_jax.training import hosts
from modelstock_jax.training import state as state_lib

_log = logging.getLogger(__name__)

# For all processes to write their parts.
_SAVE_SECONDS = 1200
# Arrays that several devices hold are saved in as many slices, in parallel, if
# a slice has so many bytes: to cut one of any shape is compiled on each device.
_MIN_SLICE = 2**20


class Checkpoint(NamedTuple):
  """What a run goes on from."""

  state: state_lib.State
  merged: merging.Merged | None  # None where nothing is merged: a grid
  anchor: Any | None  # params, where merge.anchor is 'last_merge'

  @property
  def raw_items(self) -> dict[str, Any]:
    """The items that are there, by name; keys as bits, for any Orbax."""
    items = self._replace(state=state_lib.with_raw_key(self.state))._asdict()
    return {name: tree for name, tree in items.items() if tree is not None}


class Reader:
  """The checkpoints of a run that may be going on: changes nothing."""

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    config: dict[str, Any] | None = None,
  ):
    """Looks at a folder of checkpoints.

    Args:
      directory: of one run.
      config: of the run, as JSON values; None takes those of any.
    """
    self._config = config or {}
    self._directory = pathlib.Path(directory).absolute()
    runs.silence_orbax()

  def steps(self) -> list[int]:
    """The steps of all checkpoints on disk, ascending."""
    if not self._directory.is_dir():
      return []
    return sorted(ocp.utils.checkpoint_steps(self._directory))

  def restore(self, like: Checkpoint) -> Checkpoint | None:
    """The latest checkpoint that can be read, placed as `like` is.

    A damaged one (a copy that broke off, a folder half deleted) is reported
    and passed over for the one before.

    Args:
      like: a checkpoint of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if the latest one is not this run's, naming every key of its
        config or leaf that differs; or of a layout from the future.
      OSError: if there are checkpoints, and all of them are damaged; or if
        one cannot be read for another reason, which tells nothing of it.
    """
    found = hosts.run_on_process_0(self.steps)
    for step in reversed(found):
      try:
        return _read(self._directory / str(step), like, self._config)
      except damage.DamagedError as error:
        _log.warning(
          'Checkpoint %d cannot be read and is passed over%s: %s',
          step,
          self._passed_over(step),
          error,
        )
    if found:
      raise OSError(self._all_damaged(found))
    return None

  def _passed_over(self, step: int) -> str:
    """Deals with a damaged checkpoint; what to say of it."""
    return ''

  def _all_damaged(self, steps: list[int]) -> str:
    return (
      f'{self._directory}: none of the checkpoints {steps} can be read. Resume '
      'the run, which sets them aside, or take another workdir.'
    )


class Checkpoints(Reader):
  """The checkpoints of one run: the latest two and the best one are kept.

  As they are the run's own, `restore` moves those that are damaged to the
  folder `damaged` beside this one.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    config: dict[str, Any] | None = None,
  ):
    """Opens a folder of checkpoints, creating it if need be.

    Removes what a save that did not end has left. So the folder is for one
    run at a time; to look at checkpoints while it goes on there is `Reader`.

    Args:
      directory: of this run alone.
      config: of the run, as JSON values; kept in every checkpoint.
    """
    super().__init__(directory, config=config)
    self._saving = (0, 0)  # the step, and its bytes
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    hosts.run_on_process_0(self._tidy)
    best = checkpoint_managers.BestN(
      get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
    )
    keep = checkpoint_managers.AnyPreservationPolicy(
      [checkpoint_managers.LatestN(2), best]
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in Checkpoint._fields:
      registry.add(name, ocp.args.PyTreeSave, _handler())
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=_accuracy,  # without it metrics are not written to disk
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
      ),
      handler_registry=registry,
    )

  def _tidy(self) -> None:
    """Removes what was half written, and metrics that cannot be read.

    Orbax reads the metrics of all checkpoints to open any of them.
    """
    for path in self._directory.glob('*.orbax-checkpoint-tmp*'):
      # Within one process, a save that failed may still be writing.
      for _ in range(30):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
          break
        time.sleep(0.1)
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

    Raises:
      OSError: if this one, or the one before it, cannot be written; says for
        how much there must be room. Those that are whole stay as they are.
    """
    self.wait()
    trees = checkpoint.raw_items
    items: dict[str, Any] = {
      name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()
    }
    meta = {'layout': runs.LAYOUT, 'step': step, 'next_batch': step}
    items['meta'] = ocp.args.JsonSave({**meta, 'config': self._config})
    metrics = {} if accuracy is None else {'accuracy': accuracy}
    self._saving = step, sum(x.nbytes for x in jax.tree.leaves(trees))
    with self._explained():
      self._manager.save(
        step, args=ocp.args.Composite(**items), metrics=metrics, force=True
      )

  def wait(self) -> None:
    """Returns when the last save is on disk, or raises what it failed with."""
    with self._explained():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Says what a save that fails would have needed."""
    try:
      yield
    except (OSError, ValueError) as error:
      step, size = self._saving
      free = shutil.disk_usage(self._directory).free
      kept = self.steps()
      raise OSError(
        f'{self._directory}: checkpoint {step} could not be saved '
        f'({damage.line(error)}). Its arrays take up to {_bytes(size)}, '
        f'{_bytes(free)} are free on that disk. '
        + (f'Checkpoints {kept} are kept. ' if kept else '')
        + 'Make room, or have the quota raised, and run the same command '
        'again: it removes what was half written'
        + (f' and goes on from step {kept[-1]}.' if kept else '.')
      ) from error

  def _passed_over(self, step: int) -> str:
    return f', now in {self._set_aside(step)}'

  def _all_damaged(self, steps: list[int]) -> str:
    return (
      f'{self._directory}: none of the checkpoints {steps} can be read; '
      'they were moved to its folder `damaged`. Start in another workdir, '
      'or run the same command again to begin from the anchor.'
    )

  def _set_aside(self, step: int) -> str:
    """Moves a checkpoint to where it is in nobody's way."""

    def move() -> str:
      target = self._directory.parent / 'damaged' / str(step)
      for number in itertools.count(1):
        if not target.exists():
          break
        target = target.with_name(f'{step}.{number}')
      target.parent.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(target)
      return str(target)

    self._manager.close()
    moved = hosts.run_on_process_0(move)
    self._manager = self._open()
    return moved

  def close(self) -> None:
    """Finishes what is being saved and lets go of the folder."""
    with self._explained():
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


class _ForeignError(Exception):
  """A checkpoint is whole, but not of this run."""


def _read(
  folder: pathlib.Path, like: Checkpoint, config: dict[str, Any]
) -> Checkpoint:
  """The checkpoint in a folder; raises the same on all processes."""
  found, met, error = None, '0', None  # the worst that one has met is for all
  try:
    found = damage.read(folder, lambda: _read_once(folder, like, config))
  except damage.DamagedError as caught:
    met, error = f'1{caught}', caught
  except OSError as caught:
    met, error = f'2{caught}', caught
  except _ForeignError as caught:
    met, error = f'3{caught}', caught
  worst = max(hosts.gather(met))
  kinds = {'1': damage.DamagedError, '2': OSError, '3': ValueError}
  if worst != '0':
    raise kinds[worst[0]](worst[1:]) from error
  assert found is not None
  wrap = jax.jit(
    jax.random.wrap_key_data, out_shardings=like.state.key.sharding
  )
  return found._replace(state=found.state._replace(key=wrap(found.state.key)))


def _read_once(
  folder: pathlib.Path, like: Checkpoint, config: dict[str, Any]
) -> Checkpoint:
  """Reads a checkpoint, with the bits of its keys, if it is of this run."""
  try:
    meta = runs.read_meta(folder)
  except runs.NewerLayoutError as error:
    raise _ForeignError(str(error)) from None
  if config and meta['config']:
    different = changes_lib.changes(meta['config'], config).of_run
    if different:
      raise _ForeignError(
        f'{folder}: is of a run with another config:\n  '
        + '\n  '.join(different)
        + '\nChoose another workdir, or the config it was made with.'
      )
  handler = _handler()
  items = like.raw_items
  paths = {name: epath.Path(folder / name) for name in items}
  different = [
    line
    for name, tree in items.items()
    for line in _differences(name, handler.metadata(paths[name]).tree, tree)
  ]
  if different:
    raise _ForeignError(
      f'{folder}: is of another model; its leaves, and those of this one:\n  '
      + '\n  '.join(different)
      + '\nChoose another workdir, or the config it was made with.'
    )
  return like._replace(
    **{
      name: handler.restore(
        paths[name],
        args=ocp.args.PyTreeRestore(
          tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
        ),
      )
      for name, tree in items.items()
    }
  )


def _differences(name: str, saved: Any, like: Any) -> list[str]:
  """Return lines 'state/params/w: float32(2, 3), not float32(2, 4)'."""
  old, new = (
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): (
        f'{np.dtype(leaf.dtype).name}{tuple(leaf.shape)}'
      )
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    for tree in (saved, like)
  )
  return [
    f'{name}/{path}: {old.get(path, "absent")}, not {new.get(path, "absent")}'
    for path in sorted({*old, *new})
    if old.get(path) != new.get(path)
  ]


def _handler() -> ocp.PyTreeCheckpointHandler:
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_MIN_SLICE
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    )
  )


def _bytes(size: int) -> str:
  if size < 2**20:
    return f'{size / 2**10:.1f} KiB'
  return f'{size / 2**20:,.1f} MiB'


def _accuracy(metrics: dict[str, float]) -> float:
  """What decides the best; one that was not measured is the best of none."""
  return metrics.get('accuracy', -1.0)
