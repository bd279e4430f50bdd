import concurrent.futures
import json
import socket
import threading
import time

import pytest

from modelstock_jax.training import rollcall


@pytest.fixture
def port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _meet(port, callers, *, timeout=10.0, done=None):
  """What each (process, of) has raised, or None, in order."""

  done = done or threading.Event()

  def one(process, number):
    try:
      lines = rollcall.meet(
        f'127.0.0.1:{port}',
        num_processes=number,
        process_id=process,
        timeout=timeout,
      )
    except Exception as error:
      return error
    expected = {0} if process else set(range(1, number))
    assert lines.keys() == expected
    assert all(line.is_there() for line in lines.values())
    if process:
      done.wait(timeout)  # so that process 0 finds it there
      lines[0].connection.close()
      return None
    # Where all have come, each of them looks for jax on this port.
    with socket.create_server(('127.0.0.1', port)) as server:
      server.settimeout(timeout)
      for _ in range(number - 1):
        server.accept()[0].close()
    done.set()
    deadline = time.monotonic() + timeout
    while any(line.is_there() for line in lines.values()):  # until they leave
      assert time.monotonic() < deadline
    for line in lines.values():
      line.connection.close()
    return None

  with concurrent.futures.ThreadPoolExecutor(len(callers)) as pool:
    return list(pool.map(lambda caller: one(*caller), callers))


def test_all_come(port):
  assert _meet(port, [(2, 3), (0, 3), (1, 3)]) == [None] * 3


def test_who_is_missing_is_named_to_all_who_came(port):
  errors = _meet(port, [(0, 4), (2, 4)], timeout=0.5)
  assert [type(error) for error in errors] == [TimeoutError] * 2
  assert str(errors[0]) == str(errors[1])
  host = socket.gethostname()
  assert (
    f'Missing after 0.5 s: process 1, 3 of 4 (0 to 3); here are 0 ({host}), '
    f'2 ({host}).'
  ) in str(errors[0])


def test_process_0_is_missing(port):
  [error] = _meet(port, [(1, 2)], timeout=0.3)
  assert isinstance(error, TimeoutError)
  assert f'no answer from process 0 at 127.0.0.1:{port} for 0.3 s' in str(error)


@pytest.mark.parametrize(
  ('callers', 'message'),
  [
    ([(0, 3), (1, 3), (1, 3)], 'Two processes are number 1'),
    ([(0, 3), (1, 2)], 'Process 1 .* is of 2 processes, process 0 .* of 3'),
    ([(0, 2), (2, 3)], 'Process 2 .* is of 3 processes, process 0 .* of 2'),
  ],
)
def test_contradictions_are_told_to_all(port, callers, message):
  errors = _meet(port, callers)
  for error in errors:
    assert isinstance(error, ValueError)
    assert error.args == errors[0].args
    with pytest.raises(ValueError, match=message):
      raise error


def test_strangers_and_those_who_leave_do_not_count(port):
  """A port scanner, and a process that died and was started again."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    done = threading.Event()
    waiting = pool.submit(_meet, port, [(0, 3)], done=done)
    deadline = time.monotonic() + 5
    while not rollcall.answers(f'127.0.0.1:{port}'):
      assert time.monotonic() < deadline
      time.sleep(0.01)
    with socket.create_connection(('127.0.0.1', port)) as stranger:
      stranger.sendall(b'GET / HTTP/1.1\r\n\r\n')
    with socket.create_connection(('127.0.0.1', port)) as dying:
      dying.sendall(json.dumps(dict(process=2, of=3, host='x')).encode())
      dying.sendall(b'\n')
    assert _meet(port, [(1, 3), (2, 3)], done=done) == [None, None]
    assert waiting.result() == [None]


def test_a_port_that_is_taken(port, monkeypatch):
  monkeypatch.setattr(rollcall, '_BUSY_SECONDS', 0.3)
  with socket.create_server(('0.0.0.0', port)):
    [error] = _meet(port, [(0, 2)])
  assert isinstance(error, OSError)
  assert f'cannot listen on port {port}' in str(error)


def test_an_earlier_run_may_take_a_moment_to_let_go(port):
  server = socket.create_server(('0.0.0.0', port))
  threading.Timer(0.5, server.close).start()
  assert _meet(port, [(0, 2), (1, 2)]) == [None, None]


@pytest.mark.parametrize('address', ['host', 'host:', ':80', 'h:x', 'h:70000'])
def test_addresses_that_are_none(address):
  with pytest.raises(ValueError, match=f'--coordinator={address}: must be'):
    rollcall.split(address)


def test_an_address_of_ipv6():
  assert rollcall.split('[::1]:80') == ('::1', 80)
