"""Checkpoints on disk: the one module of the trainer that uses Orbax.

A checkpoint holds the items `state`, everything that training resumes from;
`merged`, the merge of the models at that step; `anchor`, if the anchor moves;
and `meta`, JSON with the layout, the config, the step and the position in the
data, which is the step: a run's batches follow from it. The folder gets its
step number when it is complete, so a run that dies while saving still has the
checkpoint before. Then each process writes the hashes of the files that it has
written, in the background. The content does not depend on the devices, nor on
how the arrays were spread over them.

All processes of a run call the same methods in the same order; process 0
changes the folder for all of them.
"""

from collections.abc import Iterator
import contextlib
import functools
import json
import logging
import pathlib
import shutil
import threading
import time
from typing import Any
from typing import NamedTuple

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from modelstock_jax import merging
from modelstock_jax.clip import weights
from modelstock_jax.formats import compare
from modelstock_jax.formats import hashes
from modelstock_jax.formats import runs
from modelstock_jax.formats import text
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
  """The arrays that a run resumes from."""

  state: state_lib.State
  merged: merging.Merged | None = None  # None in a grid, which never merges
  anchor: Any | None = None  # params, if merge.anchor is 'last_merge'

  @property
  def raw_items(self) -> dict[str, Any]:
    """Items by name, without None; keys as bits, for any Orbax."""
    items = self._replace(state=state_lib.with_raw_key(self.state))._asdict()
    return {name: tree for name, tree in items.items() if tree is not None}


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one run: the latest two and the best one are kept."""

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    config: dict[str, Any] | None = None,
  ):
    """Open a folder of checkpoints, creating it if need be.

    What a save that did not end has left is removed, so the folder is for one
    run at a time.

    Args:
      directory: of this run alone.
      config: of the run, with `Setup.inputs` as 'inputs', as JSON values; kept
        in every checkpoint. None restores those of any run.
    """
    runs.silence_orbax()
    self._config = config or {}
    self.directory = pathlib.Path(directory).absolute()
    self._saving = (0, 0)  # the step, and its bytes
    self._hashing = threading.Thread()  # nothing yet
    self._hashing.start()
    hosts.run_on_process_0(self._tidy)
    policies = [
      checkpoint_managers.LatestN(2),
      checkpoint_managers.BestN(
        get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
      ),
    ]
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in Checkpoint._fields:
      registry.add(name, ocp.args.PyTreeSave, _handler())
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=_accuracy,  # without it metrics are not written to disk
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
      ),
      handler_registry=registry,
    )

  def _tidy(self) -> None:
    """Remove unfinished checkpoints, and metrics that cannot be read.

    Orbax reads the metrics of all checkpoints to open any of them. It would
    not wait for a save of this process that failed and is still writing.
    """
    for path in self.directory.glob('*.orbax-checkpoint-tmp*'):
      for _ in range(30):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
          break
        time.sleep(0.1)
    for path in self.directory.glob('*/metrics/metrics'):
      try:
        json.loads(path.read_text(encoding='utf-8'))
      except ValueError as error:
        path.unlink()
        _log.warning('%s: removed, it cannot be read: %s', path, error)

  def steps(self) -> list[int]:
    """Return the steps of all checkpoints on disk, ascending."""
    return sorted(ocp.utils.checkpoint_steps(self.directory))

  def restore(self, like: Checkpoint) -> Checkpoint | None:
    """Read the latest checkpoint that is not damaged, placed as `like` is.

    A damaged one (an incomplete copy, a partly deleted folder) is reported and
    moved to the folder `damaged` next to this one.

    Args:
      like: a checkpoint of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: the latest one is of another run, naming every key of its
        config or leaf that differs; or it has a newer layout.
      OSError: all checkpoints are damaged; or one cannot be read for another
        reason, such as a failing disk.
    """
    self._hashing.join()
    steps = hosts.run_on_process_0(self.steps)
    for step in reversed(steps):
      try:
        return _read(self.directory / str(step), like, self._config)
      except damage.DamagedError as error:
        _log.warning(
          'Checkpoint %d is damaged and was moved to %s: %s',
          *(step, self._set_aside(step), error),
        )
    if steps:
      raise OSError(
        f'{self.directory}: none of the checkpoints {steps} can be read; they '
        'were moved to its folder `damaged`. Rerun the same command to begin '
        'from the anchor.'
      )
    return None

  def save(
    self, step: int, checkpoint: Checkpoint, *, accuracy: float | None = None
  ) -> None:
    """Start to save; training may continue and donate the state.

    Args:
      step: optimizer steps taken.
      checkpoint: what to save.
      accuracy: of the merged model on the validation split, 0..1; decides
        which checkpoint is the best. None if it was not measured.

    Raises:
      OSError: this one, or the one before it, cannot be written; states the
        space that it requires. Complete checkpoints are not changed.
    """
    self.wait()
    self._hashing.join()
    trees = checkpoint.raw_items
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
    meta = ocp.args.JsonSave(
      {
        'layout': runs.LAYOUT,
        'step': step,
        'next_batch': step,
        'config': self._config,
      }
    )
    args = ocp.args.Composite(**items, meta=meta)
    metrics = {} if accuracy is None else {'accuracy': accuracy}
    self._saving = step, sum(x.nbytes for x in jax.tree.leaves(trees))
    with self._explained():
      self._manager.save(step, args=args, metrics=metrics, force=True)
    self._hashing = threading.Thread(target=self._hash, args=(step,))
    self._hashing.start()

  def _hash(self, step: int) -> None:
    """Write the hashes of what this process has saved, when it is complete."""
    folder = self.directory / str(step)
    try:
      self._manager.wait_until_finished()
      hashes.write(folder, jax.process_index())
    except Exception as error:
      if folder.exists():  # or else the save failed, which `wait` raises
        _log.warning('%s: is not hashed: %s', folder, text.line(error))

  def wait(self) -> None:
    """Wait until the last save is on disk; raise what it failed with."""
    with self._explained():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Raise with what a save that fails would have needed."""
    try:
      yield
    except (OSError, ValueError) as error:
      step, size = self._saving
      free = shutil.disk_usage(self.directory).free
      kept = self.steps()
      raise OSError(
        f'{self.directory}: checkpoint {step} could not be saved '
        f'({text.line(error)}). Its arrays take up to {size / 2**20:,.1f} '
        f'MiB, {free / 2**20:,.1f} MiB are free on that disk. '
        + (f'Checkpoints {kept} are kept. ' if kept else '')
        + 'Make room or raise the quota, and rerun the same command to resume'
        + (f' from step {kept[-1]}.' if kept else '.')
      ) from error

  def _set_aside(self, step: int) -> str:
    """Move a checkpoint to `damaged`; return the path it has there."""

    def move() -> str:
      folder = self.directory.parent / 'damaged'
      folder.mkdir(exist_ok=True)
      target = folder / str(step)
      while target.exists():
        number = int(target.suffix[1:] or 0) + 1
        target = folder / f'{step}.{number}'
      (self.directory / str(step)).rename(target)
      return str(target)

    moved = hosts.run_on_process_0(move)
    self._manager.reload()
    return moved

  def close(self) -> None:
    """Finish what is being saved and let go of the folder."""
    self._hashing.join()
    with self._explained():
      self._manager.close()

  def __exit__(self, *exception: object) -> None:
    self.close()


class _ForeignError(Exception):
  """A checkpoint is intact, but of another run."""


# By severity: the most severe error of any process is raised on all.
_ERRORS = (damage.DamagedError, OSError, _ForeignError)


def _read(
  folder: pathlib.Path, like: Checkpoint, config: dict[str, Any]
) -> Checkpoint:
  """Read the checkpoint in a folder; raise the same on all processes."""
  share = slice(jax.process_index(), None, jax.process_count())
  checkpoint: Any = None
  for attempt in (
    functools.partial(hashes.verify, folder, share=share),
    functools.partial(_read_once, folder, like, config),
  ):
    message, cause = '', None
    try:
      checkpoint = damage.read(folder, attempt)
    except _ERRORS as error:
      message, cause = f'{_ERRORS.index(type(error))}{error}', error
    worst = max(hosts.gather(message))
    if worst:
      kind = (*_ERRORS[:-1], ValueError)[int(worst[0])]
      raise kind(worst[1:]) from cause
  state = checkpoint.state
  wrap = jax.jit(
    jax.random.wrap_key_data, out_shardings=like.state.key.sharding
  )
  return checkpoint._replace(state=state._replace(key=wrap(state.key)))


def _read_once(
  folder: pathlib.Path, like: Checkpoint, config: dict[str, Any]
) -> Checkpoint:
  """Read a checkpoint, with the bits of its keys, if it is of this run."""
  try:
    meta = runs.read_meta(folder)
  except runs.NewerLayoutError as error:
    raise _ForeignError(str(error)) from None
  if config and meta['config']:
    # Older versions did not record them.
    meta['config'].setdefault('inputs', config.get('inputs', {}))
    _check_same(
      f'{folder}: is of a run with another config or inputs',
      changes_lib.of_run(changes_lib.differences(meta['config'], config)),
    )
  handler, items = _handler(), like.raw_items
  paths = {name: epath.Path(folder / name) for name in items}
  saved = {name: handler.metadata(paths[name]).tree for name in items}
  _check_same(
    f'{folder}: is of another model',
    compare.differences(
      dict(weights.flatten(items)), dict(weights.flatten(saved))
    ),
  )
  restored = {}
  for name, tree in items.items():
    arguments = ocp.checkpoint_utils.construct_restore_args(tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=arguments)
    restored[name] = handler.restore(paths[name], args=args)
  return like._replace(**restored)


def _check_same(summary: str, differences: list[str]) -> None:
  if differences:
    lines = '\n  '.join([f'{summary}:', *differences])
    raise _ForeignError(
      f'{lines}\nChoose another workdir, or restore what it was made with.'
    )


def _handler() -> ocp.PyTreeCheckpointHandler:
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_MIN_SLICE
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    )
  )


def _accuracy(metrics: dict[str, float]) -> float:
  """Return the accuracy, or -1 if it was not measured."""
  return metrics.get('accuracy', -1.0)
