"""Programs that end in one line, whichever error or signal stops them."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any

# Errors that a user can correct, which are printed without a traceback.
_EXPLAINED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def run(
  name: str,
  program: Callable[[], int | None],
  explain: Callable[[BaseException], str] = str,
) -> int:
  """Run a program; print in one line what has stopped it.

  SIGINT and SIGTERM raise KeyboardInterrupt in it, so that it removes what is
  incomplete; they end the process at once while modules are imported, which
  extensions written in C do not survive.

  Args:
    name: of the program.
    program: what to run; returns its exit status, None for 0.
    explain: returns the text of an error that a user can correct.

  Returns:
    The exit status: that of the program; 1 after an error that was explained;
    130 or 143 when interrupted by SIGINT or SIGTERM.
  """
  with _received(name) as numbers:
    try:
      return program() or 0
    except BaseException as error:
      # Where it was raised, libraries may have made another error of it.
      number = getattr(error, 'signal', None)  # of training.loop.Interrupted
      if number:
        line = str(error)
      elif numbers or isinstance(error, KeyboardInterrupt):
        number = numbers[0] if numbers else signal.SIGINT
        line = _line(number)
        # Python kills itself after an interrupt in an exec, such as that of
        # namedtuple, unless there is another exec.
        exec('')
      elif isinstance(error, _EXPLAINED):
        if _is_distributed():  # to show which process failed, and where
          traceback.print_exc()
        line = explain(error)
      else:
        raise
  print(f'{name}: {line}', file=sys.stderr)
  return 128 + number if number else 1


@contextlib.contextmanager
def _received(name: str) -> Iterator[list[int]]:
  """Raise KeyboardInterrupt for signals; yield a list that collects them."""
  numbers: list[int] = []
  ended = threading.Event()

  def receive(number: int, frame: types.FrameType | None) -> None:
    if _is_importing(frame):
      print(f'{name}: {_line(number)}', file=sys.stderr, flush=True)
      os._exit(128 + number)
    numbers.append(number)
    if not ended.is_set():
      raise KeyboardInterrupt

  before = {}
  if threading.current_thread() is threading.main_thread():
    _raise_again()
    for number in (signal.SIGINT, signal.SIGTERM):
      handler = signal.getsignal(number)
      if handler in (signal.SIG_DFL, signal.default_int_handler):
        before[number] = handler  # others are of who started this program
        signal.signal(number, receive)
  try:
    yield numbers
  finally:
    ended.set()
    for number, handler in before.items():
      signal.signal(number, handler)


@functools.cache
def _raise_again() -> None:
  """Raise a KeyboardInterrupt again that Python would only print.

  Python prints what is raised in callbacks, such as that of jax for each
  garbage collection. The next call of any function after it raises again.
  """
  hook = sys.unraisablehook

  def filtered(unraisable: Any) -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
      sys.setprofile(interrupt)
    else:
      hook(unraisable)

  def interrupt(_: types.FrameType, event: str, __: Any) -> None:
    if event in ('call', 'c_call'):  # not the return from the hook
      sys.setprofile(None)
      raise KeyboardInterrupt

  sys.unraisablehook = filtered


def _is_importing(frame: types.FrameType | None) -> bool:
  """Return True if the program of `run` is importing a module."""
  while frame is not None and frame.f_code is not run.__code__:
    if frame.f_code.co_filename == '<frozen importlib._bootstrap>':
      return True
    frame = frame.f_back
  return False


def _line(number: int) -> str:
  return f'interrupted by {signal.Signals(number).name}.'


def _is_distributed() -> bool:
  """Return True if there are other processes; does not import jax."""
  jax = sys.modules.get('jax')
  return jax is not None and jax.distributed.is_initialized()
