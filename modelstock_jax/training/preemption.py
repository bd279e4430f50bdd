"""Requests to stop a run: signals of one process, preemption of several."""

from collections.abc import Iterator
import contextlib
import signal
import threading
from typing import Any

from jax.experimental import multihost_utils

from modelstock_jax.training import hosts


class StopRequest:
  """SIGINT and SIGTERM of one process; SIGTERM on any of several.

  On several processes JAX's preemption service takes SIGTERM for itself and
  agrees with the others on a step; no handler is installed here. SIGINT then
  is what Python makes of it.

  Attributes:
    signal: the number of the signal that has come, or None.
  """

  def __init__(self):
    """Create a request that has not been made."""
    self.signal: int | None = None
    self._calls = 0

  def after_step(self) -> int | None:
    """Return the signal to stop with, or None; call it after each step.

    On several processes the answer is the same on all of them.
    """
    # All stacks of a run count on: the service wants one ascending number.
    self._calls += 1
    if hosts.is_multihost() and multihost_utils.reached_preemption_sync_point(
      self._calls
    ):
      self.signal = signal.SIGTERM
    return self.signal

  @contextlib.contextmanager
  def listen(self) -> Iterator[None]:
    """Take signals of one process meanwhile; a second SIGINT interrupts."""
    before: dict[int, Any] = {}
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and not hosts.is_multihost():
      for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, self._receive)
    try:
      yield
    finally:
      for number, handler in before.items():
        # Python cannot put back what other code has set, such as jax's own.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _receive(self, number: int, _: Any) -> None:
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = number
