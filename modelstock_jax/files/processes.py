"""Processes, on one host or several, that share the tensors of a merge.

They meet in the hidden folder of the output, on a disk that all of them see.
Process 0 creates it, and the files of the output at their full size, into which
each process writes its tensors. `I.json` is the state of process I, replaced
every second while it works, and at last with its measurements. When all are
done, process 0 gives the output its name.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import hashlib
import json
import os
import pathlib
import threading
import time
from typing import Any

import numpy as np

from modelstock_jax.files import output as output_lib
from modelstock_jax.files import work
from modelstock_jax.formats import text
from modelstock_jax.formats import write as write_lib

# Seconds without a new state, after which a process counts as dead.
TIME_LIMIT = 120.0
_BEAT = 1.0
_ARRAYS = ('cosine', 'ratio', 'gram', 'unmoved')
# Index and number of processes, in the order in which jax.distributed looks. Of
# Slurm those of the step: a shell in an allocation is one process of one.
_LAUNCHERS = (
  ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'),
  ('SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'),
)


def of_launcher() -> tuple[int, int]:
  """Return index and number of processes, as `mpirun` or `srun` gives them.

  Raises:
    ValueError: neither has started this process.
  """
  for names in _LAUNCHERS:
    if all(name in os.environ for name in names):
      index, count = (int(os.environ[name]) for name in names)
      return index, count
  raise ValueError(
    'num_processes auto: neither srun nor mpirun has started this process. '
    'Give --num_processes N --process_id I.'
  )


class Processes:
  """The processes of a merge, as the one at `index` sees them."""

  def __init__(
    self, target: pathlib.Path, index: int, count: int, settings: Any
  ):
    """See `open_output`, which calls this."""
    self.index, self._count, self._target = index, count, target
    self._folder = write_lib.partial_folder(target)
    self._state = {'settings': json.loads(_to_json(settings))}
    self._heard = dict.fromkeys(range(count), (0, time.monotonic()))
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)

  def join(self) -> pathlib.Path:
    """Wait for process 0; return the folder that it made for the files."""
    beats: dict[str, set[int]] = {}
    while True:
      state = self._read(0)  # that of a killed process stays the same
      seen = beats.setdefault(state.get('run', ''), set())
      seen.add(state.get('beats', 0))
      if state and len(seen) > 1:
        return self._folder / state['run']
      self._check_heard(0)
      time.sleep(_BEAT / 4)

  @contextlib.contextmanager
  def working(self, folder: pathlib.Path) -> Iterator[None]:
    """Tell the other processes that this one works, or why it failed."""
    self._state = {**self._state, 'run': folder.name}
    self._thread.start()
    try:
      yield
    except BaseException as error:
      line = text.first_line(error) or type(error).__name__
      self._state = {**self._state, 'error': line}
      raise
    finally:
      self._done.set()
      self._thread.join()

  def _beat(self) -> None:
    beats = 0
    with contextlib.suppress(FileNotFoundError):  # process 0 has ended
      while beats == 0 or not self._done.wait(_BEAT):
        beats += 1
        self._write(beats)
      self._write(beats + 1)

  def _write(self, beats: int) -> None:
    path = self._folder / f'{self.index}.json'
    path.with_suffix('.new').write_text(
      _to_json(self._state | {'beats': beats})
    )
    path.with_suffix('.new').replace(path)

  def _read(self, index: int) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
      return json.loads((self._folder / f'{index}.json').read_text())
    return {}

  def run(
    self,
    merger: work.Work,
    groups: Sequence[list[str]],
    threads: int,
    progress: Callable[[int, int], None] | None,
  ) -> list[work.Measured]:
    """Merge the groups of this process, and wait until all are done.

    Args:
      merger: merges them.
      groups: those of all processes.
      threads: see `work.Work.run`.
      progress: is called with the bytes that this process has merged, and is
        to merge.

    Returns:
      The measurements; as process 0 those of all processes.
    """

    def report(done: int, total: int) -> None:
      self.check()
      if progress is not None:
        progress(done, total)

    loads, shares = [0] * self._count, [[] for _ in range(self._count)]
    order: dict[str, int] = {}
    # The largest first: nobody has to wait for one at the end.
    groups = sorted(groups, key=merger.nbytes, reverse=True)
    for place, names in enumerate(groups):
      least = loads.index(min(loads))
      loads[least] += merger.nbytes(names)
      shares[least].append(names)
      order |= dict.fromkeys(names, place)
    measured = merger.run(shares[self.index], threads, report)
    return sorted(self._gather(measured), key=lambda x: order[x.names[0]])

  def check(self) -> list[dict[str, Any]]:
    """Return the states of those that are done, of all that this one needs.

    Raises:
      TimeoutError: one has given no sign of life for `TIME_LIMIT`.
      ValueError: one has failed, or has other arguments.
    """
    settings, done = self._state['settings'], []
    for index in [0] if self.index else range(1, self._count):
      state = self._read(index)
      if state.get('run') == self._state['run']:
        if 'error' in state:
          raise ValueError(f'process {index}: {state["error"]}')
        if state['settings'] != settings:
          keys = [k for k in settings if state['settings'][k] != settings[k]]
          raise ValueError(
            f'process {index} has other arguments than this one: '
            f'{", ".join(keys)}. Give all processes the same.'
          )
        if state['beats'] != self._heard[index][0]:
          self._heard[index] = state['beats'], time.monotonic()
      elif self.index and not self._target.exists():
        raise ValueError(
          'process 0 ended before the output was complete; it says why.'
        )
      if 'measured' in state:
        done.append(state)
      else:
        self._check_heard(index)
    return done

  def _check_heard(self, index: int) -> None:
    if time.monotonic() - self._heard[index][1] > TIME_LIMIT:
      raise TimeoutError(
        f'process {index} of {self._count}: no sign of life for '
        f'{TIME_LIMIT:g} s in {self._folder}, which all must see. Start all '
        'of them again.'
      )

  def _gather(self, measured: list[work.Measured]) -> list[work.Measured]:
    if self.index:
      parts = [layer._asdict() for layer in measured]
      self._state = {**self._state, 'measured': parts}
      self._done.set()
      while not self._target.exists():
        self.check()
        time.sleep(_BEAT / 4)
      return measured
    while len(done := self.check()) < self._count - 1:
      time.sleep(_BEAT / 4)
    for layer in (layer for state in done for layer in state['measured']):
      layer |= {name: np.array(layer[name]) for name in _ARRAYS}
      measured.append(work.Measured(**layer))
    return measured


@contextlib.contextmanager
def open_output(
  target: pathlib.Path | None,
  plans: Sequence[output_lib.Plan],
  index: int,
  count: int,
  settings: Mapping[str, Any],
) -> Iterator[tuple[output_lib.Output | None, Processes]]:
  """Open the output of a merge that several processes share.

  Args:
    target: see `output.open_output`; None if nothing is written, by one.
    plans: see `output.open_output`.
    index: this process, from 0.
    count: number of processes.
    settings: what all must have in common.

  Raises:
    BlockingIOError, FileExistsError, OSError: as `output.open_output`.
    TimeoutError: there is no process 0.
    ValueError: wrong numbers; another process fails.
  """
  if not 0 <= index < count or (target is None and count > 1):
    raise ValueError(
      f'process_id {index}, num_processes {count}: processes count from 0 '
      'to num_processes - 1, and share an output.'
    )
  if target is None:
    yield None, Processes(pathlib.Path('none'), 0, 1, {})  # nobody to meet
    return
  files = hashlib.sha256(repr(plans).encode()).hexdigest()
  processes = Processes(target, index, count, {**settings, 'files': files})
  with contextlib.ExitStack() as stack:
    if index == 0:
      out = stack.enter_context(output_lib.open_output(target, plans))
    else:
      output_lib.check_free(target)
      out = output_lib.Output(target, processes.join(), plans)
    if count > 1:
      stack.enter_context(processes.working(out.folder))
    yield out, processes


def _to_json(value: Any) -> str:
  return json.dumps(value, default=lambda array: array.tolist())
