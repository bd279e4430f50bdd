"""Several processes of one run: how they start, and wait for one another.

Every host of a pod runs the same command, one process each, and all of their
devices are one mesh. They talk through the key-value store of JAX's
coordination service, which process 0 holds; not through the devices, whose
barriers wait for ever and do not say for whom. One process needs none of this.
"""

import builtins
import collections
from collections.abc import Callable
from collections.abc import Iterable
import contextlib
import json
import logging
import os
import pathlib
import secrets
import socket
import time
from typing import Any
from typing import NamedTuple

import jax

# Private, but the only way to the store: jax 0.6.2 to 0.12 have both.
from jax._src import clusters
from jax._src import distributed

from modelstock_jax.training import rollcall

_log = logging.getLogger(__name__)

START_SECONDS = 300.0
# Others may be a download, or a compilation, behind.
WAIT_SECONDS = 1800.0
_REMIND_SECONDS = 60.0
# For a file that one host wrote to be seen by another: caches of NFS.
_SEE_SECONDS = 15.0

_PREFIX = 'modelstock'
_uses: collections.Counter[str] = collections.Counter()
_lines: dict[int, rollcall.Caller] = {}


class _Place(NamedTuple):
  """Of this process among all of them."""

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: list[int] | None = None


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float = START_SECONDS,
) -> None:
  """Joins the processes of a run; before anything else that uses a device.

  Without arguments they come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
  and JAX_PROCESS_ID, or else from the cluster as JAX knows it: a TPU pod,
  SLURM's srun, Open MPI's mpirun. Where there is none, or one process of one,
  nothing happens.

  >>> start()  # alone
  >>> jax.process_count()
  1

  Args:
    coordinator: HOST:PORT of process 0, with a port that is free there.
    num_processes: that there are.
    process_id: of this one, from 0.
    timeout: seconds to wait for the others.

  Raises:
    ValueError: if only some of the three are given, or contradict another
      process.
    TimeoutError: if a process does not come; names it, on all that did.
    OSError: if process 0 cannot listen on its port.
  """
  place = _explicit(coordinator, num_processes, process_id) or _of_cluster()
  if place is None or place.num_processes == 1 or joined():
    return
  _lines.update(
    rollcall.meet(
      place.coordinator,
      num_processes=place.num_processes,
      process_id=place.process_id,
      timeout=timeout,
    )
  )
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    place.coordinator,
    place.num_processes,
    place.process_id,
    local_device_ids=place.local_device_ids,
    initialization_timeout=int(timeout),
  )
  introduce()
  _log.info('All %d processes are here.', place.num_processes)


def joined() -> bool:
  """Whether this is one of the processes of a run on several."""
  return distributed.global_state.client is not None


def several() -> bool:
  """Whether there are others; starts no device."""
  return joined() and count() > 1


def index() -> int:
  """Of this process, from 0; starts no device."""
  return distributed.global_state.process_id


def count() -> int:
  """Of all processes; starts no device."""
  return distributed.global_state.num_processes


def coordinator() -> str:
  """HOST:PORT of process 0."""
  return distributed.global_state.coordinator_address or 'unknown'


def _explicit(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> _Place | None:
  """From flags and environment; None if nothing is given."""
  given = {
    '--coordinator': coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS'),
    '--num_processes': num_processes
    if num_processes is not None
    else os.environ.get('JAX_NUM_PROCESSES'),
    '--process_id': process_id
    if process_id is not None
    else os.environ.get('JAX_PROCESS_ID'),
  }
  missing = [flag for flag, value in given.items() if value is None]
  if len(missing) == 3:
    return None
  if missing:
    raise ValueError(
      f'{", ".join(given)} (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, '
      f'JAX_PROCESS_ID) go together: {" and ".join(missing)} is missing.'
    )
  address, number, position = map(str, given.values())
  rollcall.split(address)
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
  return _Place(address, int(number), int(position))


def _of_cluster() -> _Place | None:
  """What JAX finds out by itself, where it is sure to be of several."""
  found = [clusters.SlurmCluster, clusters.OmpiCluster]
  if os.environ.get('JAX_PLATFORMS', 'tpu').startswith('tpu'):
    found += [clusters.GkeTpuCluster, clusters.GceTpuCluster]
  for cluster in found:
    if not cluster.is_env_present() or cluster.get_process_count() == 1:
      continue
    # Within `srun --pty bash` the step has one task, whatever the job has.
    if os.environ.get('SLURM_STEP_NUM_TASKS') == '1':
      continue
    place: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, cluster.name, int(START_SECONDS)
    )
    return _Place(*place)
  return None


# What follows is for all processes to call, in the same order.


def gather(name: str, value: str, timeout: float = WAIT_SECONDS) -> list[str]:
  """What each process says, by its index; waits for all of them.

  >>> gather('colours', 'red')
  ['red']

  Args:
    name: of what they wait at, for those who wait.
    value: of this process.
    timeout: seconds.

  Raises:
    TimeoutError: naming those who did not come.
  """
  if not several():
    return [value]
  key = _key(name)
  put(f'{key}/{index()}', value)
  found = _wait(name, key, range(count()), timeout)
  return [found[i] for i in range(count())]


def barrier(name: str, timeout: float = WAIT_SECONDS) -> None:
  """Returns when all processes are here; raises as `gather` does."""
  gather(name, '', timeout)


def first(
  name: str, call: Callable[[], Any], timeout: float = WAIT_SECONDS
) -> Any:
  """What process 0 finds out by a call, or the error that it meets, for all.

  >>> first('a sum', lambda: 1 + 1)
  2

  Args:
    name: of what the others wait for.
    call: returns what JSON can hold.
    timeout: seconds.

  Raises:
    ValueError, OSError: what the call raises on process 0, on all of them.
    TimeoutError: if process 0 does not come.
  """
  if not several():
    return call()
  key = _key(name)
  if index() == 0:
    try:
      result = call()
    except (ValueError, OSError) as error:
      put(f'{key}/0', json.dumps([type(error).__name__, str(error)]))
      raise
    put(f'{key}/0', json.dumps(['', result]))
    return result
  kind, result = json.loads(_wait(name, key, [0], timeout)[0])
  if not kind:
    return result
  error = getattr(builtins, kind, ValueError)
  raise (error if issubclass(error, OSError) else ValueError)(result)


def check_shared(folder: pathlib.Path) -> None:
  """Makes sure that all hosts see the same folder.

  Args:
    folder: where process 0 can write.

  Raises:
    OSError: on all processes, naming those who see another folder.
  """
  if not several():
    return

  def leave() -> str:
    token = folder / f'.seen-by-all-{secrets.token_hex(8)}'
    token.touch()
    return token.name

  token = first('the first file in the workdir', leave)
  seen = folder / token
  deadline = time.monotonic() + _SEE_SECONDS
  while not seen.exists() and time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      os.listdir(folder)  # makes some network file systems look again
    time.sleep(0.2)
  folders = gather('the workdir', '' if seen.exists() else str(folder))
  if index() == 0:
    seen.unlink()
  strange = [i for i, found in enumerate(folders) if found]
  if strange:
    where = '\n  '.join(f'{describe(i)}: {folders[i]}' for i in strange)
    raise OSError(
      f'--workdir is not shared: what {describe(0)} has written there is not '
      f'seen by\n  {where}\nGive all processes one folder that all hosts mount '
      '(NFS, a mounted bucket): they write a checkpoint together.'
    )


def hung_up() -> set[int]:
  """Processes whose line from `start` has closed: they may have died."""
  return {process for process, line in _lines.items() if not line.is_there()}


def describe(process: int) -> str:
  """A process, as messages call it: with its host, where that is known.

  >>> describe(0)
  'process 0'
  """
  host = None
  if several():
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      host = read('host').get(str(process))
  return f'process {process} ({host})' if host else f'process {process}'


def describe_all(processes: Iterable[int]) -> str:
  """Several of them, or the first of many."""
  names = [describe(process) for process in processes]
  more = f' and {len(names) - 8} more' if len(names) > 8 else ''
  return ', '.join(names[:8]) + more


def introduce() -> None:
  """Tells the others the name of this host."""
  put(f'host/{index()}', socket.gethostname())


def put(key: str, value: str) -> None:
  """Writes a value for all to read."""
  _store().key_value_set(f'{_PREFIX}/{key}', value, allow_overwrite=True)


def read(folder: str) -> dict[str, str]:
  """The values in a folder of the store by the last part of their keys."""
  found = _store().key_value_dir_get(f'{_PREFIX}/{folder}/')
  return {key.rpartition('/')[2]: value for key, value in found}


def _store() -> Any:
  return distributed.global_state.client


def _key(name: str) -> str:
  """Where they meet: another place each time."""
  _uses[name] += 1
  return f'meet/{name}/{_uses[name]}'


def _wait(
  what: str, key: str, wanted: Iterable[int], timeout: float
) -> dict[int, str]:
  """Waits until all of these have written; says for whom now and then."""
  begun = time.monotonic()
  remind = begun + _REMIND_SECONDS
  pause = 0.005
  while True:
    found = {int(process): value for process, value in read(key).items()}
    missing = [i for i in wanted if i not in found]
    if not missing:
      return found
    now = time.monotonic()
    if now > begun + timeout:
      raise TimeoutError(
        f'Waited {timeout:g} s at {what!r} for {describe_all(missing)}. Look '
        'at what they have printed; the same command goes on from the last '
        'checkpoint.'
      )
    if now > remind:
      remind = now + _REMIND_SECONDS
      _log.warning(
        'At %r for %.0f s: waiting for %s.',
        what,
        now - begun,
        describe_all(missing),
      )
    time.sleep(pause)
    pause = min(2 * pause, 0.5)
