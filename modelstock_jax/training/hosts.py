"""Several processes of one run, through what JAX has for them.

Every host of a pod runs the same command, one process each, and all of their
devices are one mesh. JAX's coordination service notices a process that is lost
and ends the others; the scheduler, or the user, then reruns the command.
One process needs none of this.
"""

import builtins
from collections.abc import Callable
import contextlib
import json
import os
import pathlib
import secrets
import socket
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

# For a file that one host wrote to be seen by another: caches of NFS.
_SEE_SECONDS = 15.0
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
    ValueError: if only some of the three are given, or are out of range.
    RuntimeError: if this process has used a device of a cluster already. If
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
  # JAX would let one task, as of `srun --pty bash`, wait for its whole job.
  if tasks == 1 or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(**seconds)
  except ValueError as error:  # as JAX says that it has found no cluster
    if tasks or 'coordinator_address should be defined' not in str(error):
      raise
  except RuntimeError:  # devices are in use, which is fine for one process
    if tasks or jax.process_count() > 1:
      raise


def is_multihost() -> bool:
  """Return True if this is one of several processes."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _explicit(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int, int] | None:
  """Return what flags and environment give; None if they give nothing."""
  values = {
    flag: os.environ.get(variable) if value in (None, '') else str(value)
    for flag, variable, value in (
      ('--coordinator', 'JAX_COORDINATOR_ADDRESS', coordinator),
      ('--num_processes', 'JAX_NUM_PROCESSES', num_processes),
      ('--process_id', 'JAX_PROCESS_ID', process_id),
    )
  }
  missing = [flag for flag, value in values.items() if value is None]
  if len(missing) == 3:
    return None
  if missing:
    raise ValueError(
      f'{", ".join(values)} (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, '
      f'JAX_PROCESS_ID) go together: {" and ".join(missing)} is missing.'
    )
  address, number, position = map(str, values.values())
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      f'--coordinator={address}: must be HOST:PORT of process 0, such as '
      '10.0.0.1:1234.'
    )
  if not (number.isdecimal() and position.isdecimal()):
    raise ValueError(
      f'--num_processes={number}, --process_id={position}: must be whole '
      'numbers.'
    )
  if not int(position) < int(number):
    raise ValueError(
      f'--process_id={position}: must be 0 to {int(number) - 1}, with '
      f'--num_processes={number}.'
    )
  return address, int(number), int(position)


# All processes call what follows, in the same order.


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
  if not name:
    return result
  kind = getattr(builtins, name, ValueError)
  raise (kind if issubclass(kind, OSError) else ValueError)(result)


def check_shared(folder: pathlib.Path) -> None:
  """Check that all hosts see the same folder.

  Args:
    folder: where process 0 can write.

  Raises:
    OSError: on all processes, naming those who see another folder.
  """
  if not is_multihost():
    return

  def leave() -> str:
    token = folder / f'.seen-by-all-{secrets.token_hex(8)}'
    token.touch()
    return token.name

  seen = folder / run_on_process_0(leave)
  deadline = time.monotonic() + _SEE_SECONDS
  while not seen.exists() and time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      os.listdir(folder)  # makes some network file systems look again
    time.sleep(0.2)
  about = [socket.gethostname(), '' if seen.exists() else str(folder)]
  answers = [json.loads(text) for text in gather(json.dumps(about))]
  if jax.process_index() == 0:
    seen.unlink()
  strange = [
    f'process {index} ({host}): {other}'
    for index, (host, other) in enumerate(answers)
    if other
  ]
  if strange:
    where = '\n  '.join(strange)
    raise OSError(
      f'--workdir is not shared: what process 0 ({answers[0][0]}) has written '
      f'there is not seen by\n  {where}\nGive all processes one folder that '
      'all hosts mount (NFS, a mounted bucket): they write a checkpoint '
      'together.'
    )
