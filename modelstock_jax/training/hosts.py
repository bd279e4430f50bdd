"""The processes of a run: how they join, agree and stop.

Every host of a pod runs the same command, one process each, and all of their
devices are one mesh. JAX's coordination service detects a process that is lost
and ends the others; the scheduler, or the user, then reruns the command.
"""

import builtins
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

# Time until every host sees a file that another one wrote: caches of NFS.
_SEE_SECONDS = 15.0
_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
# The number of tasks that srun and mpirun have started.
_TASKS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  initialization_seconds: int = 300,
  heartbeat_seconds: int = 100,
  shutdown_seconds: int = 60,
) -> None:
  """Join the processes of a run; call it before anything that uses a device.

  Without arguments they come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
  and JAX_PROCESS_ID, or else from the cluster as JAX detects it: a TPU pod,
  SLURM's srun, Open MPI's mpirun. Where there is none, nothing happens.

  >>> start()  # alone
  >>> jax.process_count()
  1

  Args:
    coordinator: HOST:PORT of process 0, with a port that is free there.
    num_processes: number of processes.
    process_id: index of this process, from 0.
    initialization_seconds: time to wait for the others.
    heartbeat_seconds: time after which a silent process counts as lost, and
      all others end.
    shutdown_seconds: time that a process which ends waits for the others.

  Raises:
    ValueError: only some of the three are given, or they are out of range.
    RuntimeError: this process has used a device of a cluster already. If
      another process does not come, JAX aborts this one with its own message.
  """
  seconds = {
    'initialization_timeout': initialization_seconds,
    'heartbeat_timeout_seconds': heartbeat_seconds,
    'shutdown_timeout_seconds': shutdown_seconds,
  }
  place = _explicit(coordinator, num_processes, process_id)
  if place is not None:
    if place[1] > 1 and not jax.distributed.is_initialized():
      jax.distributed.initialize(*place, **seconds)
    return
  tasks = next((int(os.environ[k]) for k in _TASKS if k in os.environ), None)
  # In one task, as of `srun --pty bash`, JAX would wait for all of the job.
  if tasks == 1 or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(**seconds)
  except ValueError as error:  # JAX's message if there is no cluster
    if tasks or 'coordinator_address should be defined' not in str(error):
      raise
  except RuntimeError:  # devices are in use, which is fine for one process
    if tasks or jax.process_count() > 1:
      raise


def is_multihost() -> bool:
  """Return True if this is one of several processes."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _explicit(*values: str | int | None) -> tuple[str, int, int] | None:
  """Return the values of flags and environment; None if there are none."""
  texts = [
    os.environ.get(variable) if value in (None, '') else str(value)
    for value, variable in zip(values, _VARIABLES, strict=True)
  ]
  if texts == [None] * 3:
    return None
  address, number, position = (text or '' for text in texts)
  port = re.fullmatch(r'.+:(\d+)', address)
  if (
    not (port and 0 < int(port[1]) < 2**16)
    or not (number.isdecimal() and position.isdecimal())
    or int(position) >= int(number)
  ):
    raise ValueError(
      f'--coordinator={address} --num_processes={number} '
      f'--process_id={position}: give all three, as flags or as '
      f'{", ".join(_VARIABLES)}: HOST:PORT of process 0, such as '
      '10.0.0.1:1234; the number of processes; and the index of this process, '
      'from 0.'
    )
  return address, int(number), int(position)


# All processes call the functions below, in the same order.


def gather(text: str) -> list[str]:
  """Return the texts of all processes, by index.

  >>> gather('red')
  ['red']
  """
  if not is_multihost():
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]


def run_on_process_0(call: Callable[[], Any]) -> Any:
  """Run a function on process 0; return its result, or raise its error, on all.

  >>> run_on_process_0(lambda: 1 + 1)
  2

  Args:
    call: returns what JSON can hold.

  Raises:
    ValueError, OSError: what the call raises on process 0, on all of them.
  """
  if not is_multihost():
    return call()
  answer, error = ['', None], None
  if jax.process_index() == 0:
    try:
      answer = ['', call()]
    except (ValueError, OSError) as caught:
      answer, error = [type(caught).__name__, str(caught)], caught
  name, result = json.loads(gather(json.dumps(answer))[0])
  if error is not None:
    raise error
  if name:
    kind = getattr(builtins, name, ValueError)
    raise (kind if issubclass(kind, OSError) else ValueError)(result)
  return result


def check_shared(folder: pathlib.Path) -> None:
  """Check that all hosts see the same folder.

  Args:
    folder: where process 0 can write.

  Raises:
    OSError: on all processes, naming those that see another folder.
  """
  if not is_multihost():
    return
  name = f'.seen-by-all-{run_on_process_0(lambda: secrets.token_hex(8))}'
  token = folder / name
  run_on_process_0(token.touch)
  deadline = time.monotonic() + _SEE_SECONDS
  while not token.exists() and time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      os.listdir(folder)  # makes some network file systems look again
    time.sleep(0.2)
  problem = '' if token.exists() else f' ({socket.gethostname()}): {folder}'
  problems = gather(problem)
  writer = gather(socket.gethostname())[0]
  run_on_process_0(token.unlink)
  blind = [f'process {i}{text}' for i, text in enumerate(problems) if text]
  if blind:
    where = '\n  '.join(blind)
    raise OSError(
      f'--workdir is not shared: what process 0 ({writer}) has written there '
      f'is not seen by\n  {where}\nGive all processes one folder that all '
      'hosts mount (NFS, a mounted bucket): they write a checkpoint together.'
    )


class StopRequest:
  """SIGINT and SIGTERM of one process; SIGTERM on any of several.

  On several processes JAX's preemption service receives SIGTERM and makes all
  of them stop at the same step; no handler is installed here, so SIGINT raises
  KeyboardInterrupt.

  Attributes:
    signal: the number of the signal that was received, or None.
  """

  def __init__(self):
    """Create a request that has not been made."""
    self.signal: int | None = None
    self._calls = 0

  def after_step(self) -> int | None:
    """Return the signal to stop with, or None; call it after each step.

    On several processes the answer is the same on all of them.
    """
    # Over all stacks of a run: the service requires one ascending number.
    self._calls += 1
    if is_multihost() and multihost_utils.reached_preemption_sync_point(
      self._calls
    ):
      self.signal = signal.SIGTERM
    return self.signal

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    """Receive signals of one process meanwhile; a second SIGINT interrupts."""
    before: dict[int, Any] = {}
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and not is_multihost():
      for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, self._receive)
    try:
      yield
    finally:
      for number, handler in before.items():
        # Python cannot restore a handler that other code set, such as jax's.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _receive(self, number: int, _: Any) -> None:
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = number
