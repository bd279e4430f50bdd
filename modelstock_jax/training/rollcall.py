"""The processes of a run meet, and say who is missing.

JAX's own meeting aborts a process that has waited too long, without a word
about whom for. So they meet here first, on the port that JAX uses afterwards.
"""

import contextlib
import json
import socket
import time
from typing import Any
from typing import NamedTuple

_BUSY_SECONDS = 30.0  # that an earlier run may take to let go of the port
_LINE_BYTES = 4096


class Caller(NamedTuple):
  """Another process, on a line that stays open for as long as it lives."""

  host: str
  connection: socket.socket

  def is_there(self) -> bool:
    """Whether the line is open; nothing more is ever said on it."""
    self.connection.setblocking(False)
    try:
      return bool(self.connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
      return True
    except OSError:
      return False
    finally:
      self.connection.setblocking(True)


def meet(
  address: str, *, num_processes: int, process_id: int, timeout: float
) -> dict[int, Caller]:
  """Returns when all processes have called, on all of them.

  Args:
    address: of process 0, HOST:PORT.
    num_processes: that there are.
    process_id: of this one; 0 listens, the others call.
    timeout: seconds to wait for the others.

  Returns:
    On process 0 all others; on the others process 0.

  Raises:
    TimeoutError: if one does not come; names it, on every process that did.
    ValueError: if two say they are the same one, or are of different numbers
      of processes.
    OSError: if process 0 cannot listen.
  """
  deadline = time.monotonic() + timeout
  host, port = split(address)
  if process_id == 0:
    return _listen(port, num_processes, deadline, timeout)
  hello = dict(process=process_id, of=num_processes, host=socket.gethostname())
  return {0: _call(host, port, hello, deadline, timeout)}


def split(address: str) -> tuple[str, int]:
  """HOST:PORT as host and port.

  >>> split('10.0.0.1:1234')
  ('10.0.0.1', 1234)
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      f'--coordinator={address}: must be HOST:PORT of process 0, such as '
      '10.0.0.1:1234.'
    )
  return host.strip('[]'), int(port)


def answers(address: str, timeout: float = 2.0) -> bool:
  """Whether anyone listens there."""
  try:
    socket.create_connection(split(address), timeout).close()
  except OSError:
    return False
  return True


def _listen(
  port: int, num_processes: int, deadline: float, timeout: float
) -> dict[int, Caller]:
  """Process 0: waits for all, and tells them to go on or what is wrong."""
  came: dict[int, Caller] = {}
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_server(port, deadline))
    callers = []
    problem: Exception | None = None
    while problem is None and len(came) < num_processes - 1:
      left = max(deadline - time.monotonic(), 0.001)
      server.settimeout(left)
      try:
        connection, _ = server.accept()
      except TimeoutError:
        problem = TimeoutError(_missing(came, num_processes, timeout))
        break
      stack.enter_context(connection)
      hello = _read_line(connection, min(left, 5.0))
      if hello is None or not hello.keys() >= {'process', 'of', 'host'}:
        connection.close()  # nobody of ours
        continue
      callers.append(connection)
      caller = Caller(hello['host'], connection)
      problem = _enter(came, hello, caller, num_processes)
      if len(came) == num_processes - 1:  # unless one has left meanwhile
        for index in [i for i, c in came.items() if not c.is_there()]:
          came.pop(index).connection.close()
    # Who hears that all are here looks for JAX on this port: it must be free.
    server.close()
    answer = {}
    if problem is not None:
      answer = {'error': str(problem), 'kind': type(problem).__name__}
    for connection in callers:
      with contextlib.suppress(OSError):
        connection.sendall(json.dumps(answer).encode() + b'\n')
    if problem is not None:
      raise problem
    stack.pop_all()  # the lines stay open
  return came


def _server(port: int, deadline: float) -> socket.socket:
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  deadline = min(deadline, time.monotonic() + _BUSY_SECONDS)
  while True:
    try:
      return socket.create_server(
        ('', port), family=family, dualstack_ipv6=dual, backlog=1024
      )
    except OSError as error:
      if time.monotonic() > deadline:
        raise OSError(
          f'Process 0 cannot listen on port {port}: {error}. Another program '
          'or an earlier run may have it: give all processes another '
          '--coordinator=HOST:PORT.'
        ) from error
    time.sleep(0.2)


def _enter(
  came: dict[int, Caller],
  hello: dict[str, Any],
  caller: Caller,
  num_processes: int,
) -> ValueError | None:
  """Puts a caller on the list, or says what is wrong with it."""
  index, number = hello['process'], hello['of']
  before = came.get(index)
  if number != num_processes or not 0 < index < num_processes:
    problem = (
      f'Process {index} ({caller.host}) is of {number} processes, process 0 '
      f'({socket.gethostname()}) of {num_processes}.'
    )
  elif before is not None and before.is_there():
    problem = f'Two processes are number {index}: {before.host}, {caller.host}.'
  else:
    if before is not None:
      before.connection.close()
    came[index] = caller
    return None
  return ValueError(f'{problem} Check --num_processes and --process_id.')


def _missing(
  came: dict[int, Caller], num_processes: int, timeout: float
) -> str:
  missing = [i for i in range(1, num_processes) if i not in came]
  here = [f'{i} ({caller.host})' for i, caller in sorted(came.items())]
  here = ', '.join([f'0 ({socket.gethostname()})', *here])
  return (
    f'Missing after {timeout:g} s: process '
    f'{", ".join(map(str, missing))} of {num_processes} (0 to '
    f'{num_processes - 1}); here are {here}. Look at what those that are '
    'missing have printed, and whether they reach process 0.'
  )


def _call(
  host: str, port: int, hello: dict[str, Any], deadline: float, timeout: float
) -> Caller:
  """Another process: calls process 0 until it answers."""
  me = f'Process {hello["process"]} ({hello["host"]}) of {hello["of"]}'
  answer = line = None
  while answer is None:
    left = deadline - time.monotonic()
    if left < 0:
      raise TimeoutError(
        f'{me} has had no answer from process 0 at {host}:{port} for '
        f'{timeout:g} s. Look at what process 0 has printed, and whether this '
        'is its address and the port is open.'
      )
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
      line = stack.enter_context(
        socket.create_connection((host, port), min(left, 5.0))
      )
      line.sendall(json.dumps(hello).encode() + b'\n')
      # Process 0, which may have begun later, is the one to give up.
      answer = _read_line(line, left + timeout)
      if answer == {}:
        stack.pop_all()  # the line stays open
    time.sleep(0.05)
  if 'error' in answer or line is None:
    kind = TimeoutError if answer['kind'] == 'TimeoutError' else ValueError
    raise kind(answer['error'])
  # JAX tries again after a second if it finds nobody, we do so sooner.
  while not answers(f'{host}:{port}') and time.monotonic() < deadline:
    time.sleep(0.02)
  return Caller(host, line)


def _read_line(
  connection: socket.socket, timeout: float
) -> dict[str, Any] | None:
  """What the other side says; None if it is nobody of ours, or has left."""
  connection.settimeout(timeout)
  try:
    line = connection.makefile('rb').readline(_LINE_BYTES)
    said = json.loads(line)
    return said if isinstance(said, dict) else None
  except (OSError, ValueError):
    return None
